"""Generation: greedy and sampled, stops, streaming, and prompts that cannot be used."""

import pytest
import torch

from fathom.engine.chat_session import ChatSession
from fathom.engine.engine import Engine
from fathom.engine.sampler import Sampler, Sampling
from fathom.errors import InputError
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


@pytest.mark.parametrize(("settings", "words"), [
    ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"), ({"max_tokens": 0}, "max_tokens"), ({"seed": 2**64}, "seed")])
def test_unusable_sampling_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        Sampling(**settings)


def test_samples_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=2.0, seed=0))
    counts = torch.zeros(4)
    for _ in range(20000):
        counts[sampler.next_token(logits)] += 1
    torch.testing.assert_close(counts / 20000, (logits / 2).softmax(0), atol=0.015, rtol=0)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = {p: {Sampler(Sampling(top_p=p, seed=seed)).next_token(logits) for seed in range(200)}
             for p in (0.1, 0.5, 0.6, 0.81, 1.0)}
    assert draws == {0.1: {0}, 0.5: {0}, 0.6: {0, 1}, 0.81: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


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
