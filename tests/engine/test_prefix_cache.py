"""What the prefix cache gives back is what would be computed: every prompt length, policy, tenant, in memory and from disk.

Lengths are sampled for some policies and for the disk; with FATHOM_EVERY_LENGTH=1 none is left out.
"""

import os
from dataclasses import replace

import pytest
import torch

from fathom.engine.disk_cache import DiskCache
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config

SETTINGS = EngineSettings(prefill_chunk=256, interval=256)
LENGTH = 1200


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a small page of text"] * 3, 300)


@pytest.fixture(scope="module")
def model():
    return random_model(small_config([4, 128], vocab_size=320, num_nextn_predict_layers=1))


@pytest.fixture(scope="module")
def text():
    return tuple(torch.randint(25, 320, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist())


@pytest.fixture(scope="module")
def expected(model, tokenizer, text):
    """After each prefix of the text, the most likely next tokens and their log-probabilities, from one whole pass."""
    with torch.no_grad():
        logs_SV = model(torch.tensor([text])).logits[0, :, :tokenizer.vocab_size].log_softmax(-1)
    return logs_SV


def ask(engine, prompt, **changes):
    request = Request(tuple(prompt), Sampling(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True), **changes)
    output, = engine.run(request)
    return output


def check(output, logs_V):
    token, = output.tokens
    best = logs_V.topk(5)
    assert token.token == int(best.indices[0]) and [token for token, _ in token.top] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([value for _, value in token.top]), best.values, atol=1e-4, rtol=0)


def edges(step):
    """All lengths up to 700 in steps, and those about the ends of blocks."""
    step = 1 if os.environ.get("FATHOM_EVERY_LENGTH") else step
    return sorted({*range(1, 701, step), *(128 * k + around for k in range(1, 9) for around in (-1, 0, 1))})


@pytest.mark.parametrize(("window", "step"), [("periodic", 1), ("full", 5), ("zero", 5)])
def test_a_hit_gives_the_same_logits_as_no_hit_at_every_prompt_length(model, tokenizer, text, expected, window, step):
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, window=window))
    check(ask(engine, text), expected[-1])
    for length in edges(step):
        output = ask(engine, text[:length])
        check(output, expected[length - 1])
        if window == "full":
            assert output.hit_tokens >= (length - 1) // 128 * 128
        if window == "zero":
            assert output.hit_tokens == max((length - 1) // 128 * 128 - 2 * 128, 0)
        again = ask(engine, text[:length])
        check(again, expected[length - 1])
        assert window == "zero" or length <= 128 or again.hit_tokens == length - 1
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("window", ["periodic", "full", "zero"])
def test_hits_from_disk_after_a_restart_give_the_same_logits(model, tokenizer, text, expected, window, tmp_path):
    def started():
        return Engine(model, tokenizer, settings=replace(SETTINGS, window=window), disk=DiskCache(tmp_path, 1 << 30, "model", sync=False))

    engine = started()
    check(ask(engine, text), expected[-1])
    check(ask(engine, text[:500], input_end=450), expected[499])
    engine.close()
    for length in edges(40):
        engine = started()
        output = ask(engine, text[:length])
        check(output, expected[length - 1])
        floor = {"periodic": (length - 1) // 256 * 256, "full": (length - 1) // 128 * 128, "zero": (length - 1) // 128 * 128 - 256}
        assert output.hit_tokens >= floor[window]
        engine.close()
    other_model = Engine(model, tokenizer, settings=SETTINGS, disk=DiskCache(tmp_path, 1 << 30, "another", sync=False))
    assert ask(other_model, text[:500]).hit_tokens == 0
    other_model.close()


@pytest.mark.parametrize("window", ["periodic", "full", "zero"])
@pytest.mark.parametrize("with_disk", [False, True])
def test_hits_stay_right_while_memory_churns(model, tokenizer, window, with_disk, tmp_path, monkeypatch):
    """A pool smaller than what is asked for: blocks and states come and go all the time."""
    monkeypatch.setattr("fathom.engine.engine._sizes", lambda *_: (4, 12))
    disk = DiskCache(tmp_path, 3 << 20, "model", sync=False) if with_disk else None
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, window=window, state_bytes=600_000), disk=disk)
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(25, 320, (6, 1200), generator=generator)
    texts[3:, :400] = texts[:3, :400]  # three pairs with a common beginning
    with torch.no_grad():
        logs = model(texts).logits[..., :tokenizer.vocab_size].log_softmax(-1)
    hits = 0
    for pick, length in zip(torch.randint(0, 6, (70,), generator=generator).tolist(),
                            torch.randint(1, 1200, (70,), generator=generator).tolist(), strict=True):
        output = ask(engine, texts[pick, :length].tolist())
        check(output, logs[pick, length - 1])
        hits += output.hit_tokens
    stats = engine.stats()
    assert hits > 0 and stats.blocks_used == 0 and stats.state_bytes <= 600_000
    engine.close()


def test_a_damaged_file_is_dropped_and_the_answer_stays_right(model, tokenizer, text, expected, tmp_path):
    def started():
        return Engine(model, tokenizer, settings=SETTINGS, disk=DiskCache(tmp_path, 1 << 30, "model", sync=False))

    engine = started()
    ask(engine, text)
    engine.close()
    for number, path in enumerate(sorted(path for path in tmp_path.rglob("*") if path.suffix in (".block", ".state"))):
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    engine = started()
    for length in (1200, 700, 385):
        check(ask(engine, text[:length]), expected[length - 1])
    assert engine.stats().disk_dropped > 0
    engine.close()


def test_tenants_share_nothing(model, tokenizer, text):
    engine = Engine(model, tokenizer, settings=SETTINGS)
    assert ask(engine, text[:600], tenant="one").hit_tokens == 0
    assert ask(engine, text[:600], tenant="two").hit_tokens == 0
    assert ask(engine, text[:600]).hit_tokens == 0
    assert ask(engine, text[:600], tenant="one").hit_tokens == 599


def test_a_thousand_probes_of_another_tenant_find_nothing(model, tokenizer, text):
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, prefill_chunk=1024))
    ask(engine, text[:300], tenant="victim")
    hashes = [engine._prefix.root("victim")]
    engine._prefix.extend(hashes, text[:300])
    probes = [f"attacker {number}" for number in range(990)] + ["", "victim ", " victim", "Victim", "victim\0", "victim" + hashes[1].hex(),
                                                                 hashes[0].hex(), "\0", "victi", "m"]
    for tenant in probes:
        start = engine._prefix.find(_hashes(engine, tenant, text), text[:300]).start
        assert start == (0, 0, [])
    assert engine._prefix.find(_hashes(engine, "victim", text), text[:300]).start.computed == 299


def _hashes(engine, tenant, text):
    hashes = [engine._prefix.root(tenant)]
    engine._prefix.extend(hashes, text[:300])
    return hashes


def test_a_common_beginning_becomes_a_hit_from_the_third_request_on(model, tokenizer, text):
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, interval=1 << 20))
    first, second, third = (text[:700] + text[800 + 100 * number:900 + 100 * number] for number in range(3))
    assert [ask(engine, prompt).hit_tokens for prompt in (first, second, third)] == [0, 640 - 256, 640]


@pytest.mark.parametrize(("window", "sizes"), [("periodic", (6, 60)), ("full", (6, 60)), ("zero", (6, 60)), ("periodic", (4, 15)), ("full", (3, 15))])
def test_requests_that_come_together_share_a_beginning_that_none_had_read(model, tokenizer, text, window, sizes, monkeypatch):
    monkeypatch.setattr("fathom.engine.engine._sizes", lambda *_: sizes)
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, window=window, interval=1 << 20))
    prompts = torch.tensor([text[:700] + text[700 + 80 * number:780 + 80 * number] for number in range(6)])
    sampling = Sampling(temperature=0, max_tokens=3, logprobs=5, ignore_eos=True)
    numbers = [engine.add(Request(tuple(prompt), sampling)) for prompt in prompts.tolist()]
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    hits = [max(output.hit_tokens for output in outputs if output.request == number) for number in numbers]
    written = torch.tensor([[token.token for output in outputs if output.request == number for token in output.tokens] for number in numbers])
    with torch.no_grad():
        logs = model(torch.cat([prompts, written], 1)).logits[:, 779:-1, :tokenizer.vocab_size].log_softmax(-1)
    for number, logs_SV in zip(numbers, logs, strict=True):
        tokens = [token for output in outputs if output.request == number for token in output.tokens]
        assert [token.token for token in tokens] == logs_SV.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), logs_SV.amax(-1), atol=1e-4, rtol=0)
    third = 640 if window != "zero" else 640 - 256
    assert hits[0] == 0 and all(hit >= third for hit in hits[2:])
    stats = engine.stats()
    assert stats.hit_tokens == sum(hits) and stats.prompt_tokens == 6 * 780 and stats.blocks_used == 0


def test_the_next_turn_starts_where_the_input_or_the_answer_ended(model, tokenizer, text):
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, interval=1 << 20))
    request = Request(text[:300], Sampling(temperature=0, max_tokens=20, ignore_eos=True), input_end=298)
    written = tuple(token.token for output in engine.run(request) for token in output.tokens)
    assert ask(engine, text[:298] + text[700:720]).hit_tokens == 298  # the same input, another think tag
    assert ask(engine, text[:300] + written + text[700:720]).hit_tokens == 300 + len(written) - 1


def test_a_sequence_that_was_interrupted_goes_on_where_it_was(model, tokenizer, text, monkeypatch):
    monkeypatch.setattr("fathom.engine.engine._sizes", lambda *_: (4, 8))
    engine = Engine(model, tokenizer, settings=SETTINGS)
    numbers = [engine.add(Request(text[begin:begin + 250], Sampling(temperature=0, max_tokens=500, ignore_eos=True)))
               for begin in (0, 300)]
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert engine.stats().preemptions > 0
    for number, begin in zip(numbers, (0, 300), strict=True):
        written = [token.token for output in outputs if output.request == number for token in output.tokens]
        with torch.no_grad():
            tokens = torch.tensor([[*text[begin:begin + 250], *written]])
            best = model(tokens).logits[0, 249:-1, :tokenizer.vocab_size].argmax(-1).tolist()
        assert written == best and len(written) == 500


def test_with_drafts_hits_stay_exact(model, tokenizer, text, expected):
    engine = Engine(model, tokenizer, settings=replace(SETTINGS, drafts=2))
    ask(engine, text)
    for length in edges(60):
        check(ask(engine, text[:length]), expected[length - 1])
