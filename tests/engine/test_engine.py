"""Generation: one request or many, the same answers; stops, choices, cancelling, little memory, and prompts that cannot be used."""

from dataclasses import replace

import pytest
import torch

from fathom.engine.chat_session import ChatSession
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError, QueueFull
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, random_tokens, small_config


@pytest.fixture(scope="module")
def engine():
    tokenizer = Tokenizer.train(["a small page of text"] * 3, 300)
    config = small_config([4, 128], vocab_size=320, max_position_embeddings=1200)
    return Engine(random_model(config), tokenizer)


def test_greedy_equals_the_argmax_of_whole_passes(engine):
    prompt = random_tokens(engine.model.config, 700).tolist()  # longer than one prefill chunk
    got = list(engine.stream(prompt, Sampling(temperature=0, max_tokens=6)))
    expected = []
    with torch.no_grad():
        while len(expected) < len(got):
            expected.append(int(engine.model(torch.tensor([prompt + expected])).logits[0, -1, :engine.tokenizer.vocab_size].argmax()))
    assert got == expected and (len(got) == 6 or got[-1] == engine.model.config.eos_token_id)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(engine):
    first, again, other = (list(engine.stream([5, 6, 7], Sampling(seed=seed, max_tokens=30))) for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_token_ends_the_stream_and_is_yielded(engine):
    free = list(engine.stream([5], Sampling(temperature=0, max_tokens=20)))
    stopped = list(engine.stream([5], Sampling(temperature=0, max_tokens=20), stop_ids=[free[3]]))
    assert stopped == free[:free.index(free[3]) + 1]


def test_generation_ends_where_the_context_is_full(engine):
    prompt = random_tokens(engine.model.config, 1195).tolist()
    made = list(engine.stream(prompt, Sampling(temperature=0, max_tokens=50), stop_ids=()))
    assert len(made) <= 5


@pytest.mark.parametrize(("prompt", "words"), [
    ([], "prompt is empty"), ([1, 320], "token id 320 is outside the vocabulary of 320"),
    ([-1], "token id -1 is outside"), ([1] * 1200, "prompt has 1200 tokens; the model holds 1200")])
def test_unusable_prompts_are_refused_before_anything_runs(engine, prompt, words):
    with pytest.raises(InputError, match=words):
        engine.stream(prompt, Sampling())


@pytest.mark.parametrize("token", [-1, 300, 10**9])
def test_a_bias_for_a_token_that_cannot_be_written_is_refused(engine, token):
    assert engine.tokenizer.vocab_size <= 300
    with pytest.raises(InputError, match=f"logit_bias: token id {token} is outside"):
        engine.add(Request((1, 2), Sampling(logit_bias={token: 1.0})))


def test_text_streams_whole_characters_that_join_to_the_decoded_tokens(engine):
    sampling = Sampling(seed=3, max_tokens=40)
    pieces = list(engine.text("a small", sampling))
    ids = list(engine.stream([engine.tokenizer.bos_id, *engine.tokenizer.encode("a small")], sampling))
    assert "".join(pieces) == engine.tokenizer.decode(ids, skip_special=True)
    with pytest.raises(InputError, match="prompt is empty"):
        list(engine.text("", sampling))


def test_a_chat_keeps_its_history_and_its_mode(engine):
    session = ChatSession(engine, Sampling(seed=1, max_tokens=12), think="high")
    pieces = list(session.answer("hello"))
    assert pieces[0].reasoning
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    session.set_thinking("off")
    assert not any(piece.reasoning for piece in session.answer("and again"))
    assert len(session.messages) == 4
    session.reset()
    assert session.messages == []
    with pytest.raises(InputError, match="allowed: off, high, max"):
        session.set_thinking("deep")


def test_an_answer_that_is_stopped_stays_in_the_history(engine):
    session = ChatSession(engine, Sampling(seed=1, max_tokens=50), think="off")
    answer = session.answer("hello")
    next(answer)
    answer.close()
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


SMALL_SETTINGS = EngineSettings(prefill_chunk=256)


@pytest.fixture(scope="module")
def model():
    return random_model(small_config([0, 4, 128], vocab_size=320, num_nextn_predict_layers=1))


def made(model, tokenizer, **settings):
    return Engine(model, tokenizer, settings=replace(SMALL_SETTINGS, **settings))


def answers(engine, requests):
    """Texts, tokens and reasons of all requests' choices, run together."""
    ids, found = [engine.add(request) for request in requests], {}
    while engine.has_work:
        for output in engine.step():
            text, tokens, _ = found.get(output[:2], ("", (), None))
            found[output[:2]] = text + output.text, tokens + tuple(written.token for written in output.tokens), output.finish
    assert engine.stats().blocks_used == 0
    return [[found[number, choice] for choice in range(request.choices)] for number, request in zip(ids, requests, strict=True)]


def mixed_requests(count, seed=0, longest=500):
    generator = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(25, 320, (int(length),), generator=generator).tolist())
               for length in torch.randint(1, longest, (count,), generator=generator)]
    return [Request(prompt, Sampling(temperature=(0, 1.0, 0.7)[index % 3], top_p=(1, 0.9)[index % 2], top_k=(0, 40)[index % 5 == 0],
                                     seed=index, max_tokens=8 + index, presence_penalty=0.3 * (index % 4 == 0)))
            for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def alone(model, engine):
    """32 requests and their answers, each computed with nothing else running."""
    requests = mixed_requests(32)
    return requests, [answers(made(model, engine.tokenizer, prefix_cache=False), [request])[0] for request in requests]


@pytest.mark.parametrize("settings", [
    dict(prefix_cache=False), dict(), dict(running=5), dict(window="full"), dict(window="zero"), dict(prefix_cache=False, drafts=2),
    dict(drafts=3, running=9)], ids=str)
def test_a_request_gets_the_same_answer_alone_and_among_others(model, engine, alone, settings):
    requests, expected = alone
    shared = made(model, engine.tokenizer, **settings)
    assert answers(shared, requests) == expected
    assert answers(shared, [*reversed(requests)]) == [*reversed(expected)]  # now partly from the prefix cache


@pytest.fixture(scope="module")
def growing(model, engine):
    """6 requests whose answers need more and more memory, and those answers, each computed with nothing else running."""
    requests = [replace(request, sampling=replace(request.sampling, max_tokens=220)) for request in mixed_requests(6, 7, longest=120)]
    return requests, [answers(made(model, engine.tokenizer, prefix_cache=False), [request])[0] for request in requests]


@pytest.mark.parametrize("settings", [dict(prefix_cache=False), dict(), dict(drafts=2), dict(window="zero")], ids=str)
def test_answers_stay_the_same_where_memory_is_so_short_that_requests_give_way(model, engine, alone, growing, settings, monkeypatch):
    monkeypatch.setattr("fathom.engine.engine._sizes", lambda *_: (6, 6))  # slots and blocks
    tight = made(model, engine.tokenizer, **settings)
    assert answers(tight, growing[0]) == growing[1] and tight.stats().preemptions > 0
    assert answers(tight, alone[0][:5]) == alone[1][:5]


def test_choices_share_the_prompt_and_differ(model, engine):
    request = Request(mixed_requests(3)[2].prompt * 2, Sampling(seed=3, max_tokens=20), choices=6)
    shared = made(model, engine.tokenizer)
    found, = answers(shared, [request])
    assert len({tokens for _, tokens, _ in found}) == 6 and shared.stats().prompt_tokens == len(request.prompt)
    narrow = made(model, engine.tokenizer, running=2)  # four of them have to wait
    assert answers(narrow, [request]) == [found] == answers(made(model, engine.tokenizer, drafts=2), [request])
    first, = answers(shared, [replace(request, choices=1)])
    assert first[0] == found[0]


def test_cancelling_frees_all_memory_at_once_whatever_the_request_was_doing(model, engine):
    shared = made(model, engine.tokenizer, prefill_chunk=64, running=3)
    requests = [replace(request, choices=1 + index % 3) for index, request in enumerate(mixed_requests(12, seed=4))]
    for steps in range(12):
        numbers = [shared.add(request) for request in requests]
        for _ in range(steps):
            shared.step()
        for number in numbers:
            shared.cancel(number)
        stats = shared.stats()
        assert not shared.has_work and stats.blocks_used == stats.running == stats.waiting == 0
        assert shared.step() == []
    shared.cancel(12345)


def test_a_full_queue_refuses_and_takes_again_later(model, engine):
    shared = made(model, engine.tokenizer, waiting=2, running=1)
    request = Request((30, 31), Sampling(max_tokens=3))
    shared.add(request)
    shared.step()
    shared.add(request)
    shared.add(request)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        shared.add(request)
    while shared.has_work:
        shared.step()
    shared.add(request)


def test_stop_strings_end_an_answer_across_token_borders_and_are_not_part_of_it(model, engine):
    shared, prompt = made(model, engine.tokenizer), mixed_requests(2)[1].prompt
    free = Request(prompt, Sampling(seed=4, max_tokens=60))
    (text, _, _), = answers(shared, [free])[0]
    stop = text[20:26]
    outputs = [*shared.run(replace(free, sampling=replace(free.sampling, stop=("not there", stop))))]
    assert "".join(output.text for output in outputs) == text[:text.index(stop)]
    assert (outputs[-1].finish, outputs[-1].stop) == ("stop", stop)


def test_log_probabilities_come_with_each_token(model, engine):
    request = Request((40, 41, 42), Sampling(seed=1, max_tokens=5, temperature=0.5, logprobs=3))
    written = [token for output in made(model, engine.tokenizer).run(request) for token in output.tokens]
    tokens = list(request.prompt)
    for token in written:
        with torch.no_grad():
            logs_V = model(torch.tensor([tokens])).logits[0, -1, :engine.tokenizer.vocab_size].log_softmax(-1)
        assert token.logprob == pytest.approx(float(logs_V[token.token]), abs=1e-4)
        assert [token for token, _ in token.top] == logs_V.topk(3).indices.tolist()
        tokens.append(token.token)


def test_two_requests_can_be_followed_at_the_same_time(model, engine):
    shared, requests = made(model, engine.tokenizer), mixed_requests(4)[2:]
    expected = [answers(made(model, engine.tokenizer), [request])[0] for request in requests]
    follow = [shared.run(request) for request in requests]
    texts = ["", ""]
    for one, other in zip(*follow, strict=False):
        texts = [texts[0] + one.text, texts[1] + other.text]
    shortest = min(len(text) for text in texts)
    assert shortest > 3 and all(answer[0][0].startswith(text) for answer, text in zip(expected, texts, strict=True))
    for each in follow:
        each.close()
    assert not shared.has_work and shared.stats().blocks_used == 0


@pytest.mark.parametrize(("settings", "words"), [
    (dict(cache_bytes=1000), "cache_bytes is 1000; this model needs at least"), (dict(running=0), "running is 0"),
    (dict(window="half"), "allowed: full, periodic, zero")])
def test_settings_that_do_not_fit_are_named(model, engine, settings, words):
    with pytest.raises(InputError, match=words):
        made(model, engine.tokenizer, **settings)


def test_drafts_need_an_mtp_block(engine):
    with pytest.raises(InputError, match="no MTP block"):
        Engine(random_model(small_config([4], vocab_size=320, num_nextn_predict_layers=0, compress_ratios=[4])), engine.tokenizer,
               settings=EngineSettings(drafts=1))


def test_a_prompt_longer_than_the_pool_is_refused(model, engine, monkeypatch):
    monkeypatch.setattr("fathom.engine.engine._sizes", lambda *_: (2, 3))
    small = made(model, engine.tokenizer)
    assert small.max_tokens == 3 * 128
    with pytest.raises(InputError, match="the model holds 384 .cache_bytes., the answer included"):
        small.add(Request((30,) * 384))


def test_an_answer_that_stopped_goes_on_as_if_it_had_not(model, engine):
    prompt = tuple(random_tokens(model.config, 9).tolist())
    whole = {choice: [token for token, *_ in tokens] for choice, tokens in enumerate(_choices(made(model, engine.tokenizer), Request(
        prompt, Sampling(seed=6, max_tokens=24, ignore_eos=True), choices=3)))}
    for choice, done in ((1, 10), (2, 23), (0, 0)):
        rest = Request((*prompt, *whole[choice][:done]), Sampling(seed=6, max_tokens=24 - done, ignore_eos=True, drawn=done),
                       first_choice=choice)
        outputs = [*made(model, engine.tokenizer).run(rest)]
        assert {output.choice for output in outputs} == {choice}
        assert [written.token for output in outputs for written in output.tokens] == whole[choice][done:]


def _choices(shared, request):
    found = [[] for _ in range(request.choices)]
    for output in shared.run(request):
        found[output.choice] += output.tokens
    return found
