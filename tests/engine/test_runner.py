"""Drafts change nothing but the number of steps: right ones, wrong ones, and both at once."""

import random
from dataclasses import replace

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.runner import Runner
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config

PROMPTS = 200


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a small page of text"] * 3, 300)


@pytest.fixture(scope="module")
def model():
    return random_model(small_config([4, 128], vocab_size=320, num_nextn_predict_layers=1))


def made(model, tokenizer, drafts):
    return Engine(model, tokenizer, settings=EngineSettings(prefix_cache=False, drafts=drafts, running=40))


def requests(temperature):
    generator = torch.Generator().manual_seed(2)
    for index in range(PROMPTS):
        length = int(torch.randint(1, 200, (), generator=generator))
        prompt = tuple(torch.randint(25, 320, (length,), generator=generator).tolist())
        yield Request(prompt, Sampling(temperature=temperature, seed=index, max_tokens=12 + index % 9))


def tokens_of(engine, asked):
    numbers, found = [engine.add(request) for request in asked], {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request, []).extend(written.token for written in output.tokens)
    return [found[number] for number in numbers]


class Oracle(Runner):
    """Knows the answers, and lies about every third of its drafts."""

    truth: dict[tuple[int, ...], list[int]] = {}
    random = random.Random(0)

    def _draft(self, group, starts, counts, streams_BSNW):
        super()._draft(group, starts, counts, streams_BSNW)
        for answer in group:
            written = len(answer.tokens) - len(answer.request.prompt)
            right = self.truth[answer.request.prompt][written:written + len(answer.drafts)]
            answer.drafts = [token if self.random.random() > 0.3 else 30 for token in right]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_drafts_change_no_token_over_200_prompts(model, tokenizer, temperature, monkeypatch):
    asked = [*requests(temperature)]
    plain = made(model, tokenizer, 0)
    expected = tokens_of(plain, asked)
    assert tokens_of(made(model, tokenizer, 2), asked) == expected  # the untrained block's own, mostly wrong
    monkeypatch.setattr("fathom.engine.engine.Runner", Oracle)
    monkeypatch.setattr(Oracle, "truth", {request.prompt: tokens for request, tokens in zip(asked, expected, strict=True)})
    for drafts in (1, 4):
        engine = made(model, tokenizer, drafts)
        assert tokens_of(engine, asked) == expected
        stats = engine.stats()
        assert 0.3 < stats.accepted_tokens / stats.drafted_tokens < 0.9


def test_the_mtp_block_proposes_what_it_would_in_one_whole_pass(model, tokenizer, monkeypatch):
    """Its own cache, filled piece by piece and through rejections, gives the drafts of `Transformer.mtp_logits`."""
    seen = []
    original = Runner._draft

    def spy(self, group, starts, counts, streams_BSNW):
        original(self, group, starts, counts, streams_BSNW)
        seen.extend(([*answer.tokens], answer.drafts[0]) for answer in group if answer.drafts)

    monkeypatch.setattr(Runner, "_draft", spy)
    tokens_of(made(model, tokenizer, 2), [replace(request, sampling=replace(request.sampling, max_tokens=30))
                                           for request in [*requests(0.8)][:12]])
    assert len(seen) > 150
    for tokens, draft in seen:
        logits_V = model.mtp_logits(torch.tensor([tokens]))[0, -1, :tokenizer.vocab_size]
        assert draft == int(logits_V.argmax())
