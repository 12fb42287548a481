"""Packed documents, causality, and what a token can never see."""

import pytest
import torch

from fathom.errors import InputError
from tests.models import random_model, random_tokens, small_config

CONFIG = small_config([0, 4, 128, 3], sliding_window=24, index_topk=6)
LENGTHS = [130, 1, 7, 261, 3, 40]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG).double()


@pytest.fixture(scope="module")
def packed():
    tokens = random_tokens(CONFIG, 1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return tokens, positions


@torch.no_grad()
def test_packed_documents_logits_equal_the_documents_alone(model, packed):
    tokens, positions = packed
    together = model(tokens, position_BS=positions).logits[0]
    alone = torch.cat([model(document[None]).logits[0] for document in tokens[0].split(LENGTHS)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


@torch.no_grad()
def test_packed_documents_mtp_logits_equal_the_documents_alone(model, packed):
    tokens, positions = packed
    together, begin = model.mtp_logits(tokens, positions)[0], 0
    for document in tokens[0].split(LENGTHS):
        if len(document) > 1:
            alone = model.mtp_logits(document[None])[0]
            torch.testing.assert_close(together[begin:begin + len(alone)], alone, atol=1e-9, rtol=0)
        begin += len(document)


def test_packed_documents_gradients_equal_the_documents_alone(model, packed):
    tokens, positions = packed
    weight = torch.randn(CONFIG.vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(losses):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                if parameter.grad is not None}

    together = gradients([(model(tokens, position_BS=positions).logits * weight).sum()])
    alone = gradients((model(document[None]).logits * weight).sum() for document in tokens[0].split(LENGTHS))
    assert together.keys() == alone.keys() and len(together) > 50
    for name in together:
        torch.testing.assert_close(together[name], alone[name], atol=1e-7, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_no_token_sees_a_later_one(model):
    tokens = random_tokens(CONFIG, 1, 200)
    changed = tokens.clone()
    changed[:, 150:] = (changed[:, 150:] + 1) % CONFIG.vocab_size
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :150], after[:, :150], atol=1e-12, rtol=0)
    assert (before[:, 150] - after[:, 150]).abs().max() > 1e-3


@torch.no_grad()
def test_compressed_layers_see_beyond_the_window(model):
    tokens = random_tokens(CONFIG, 1, 300)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % CONFIG.vocab_size
    assert (model(tokens).logits[:, -1] - model(changed).logits[:, -1]).abs().max() > 1e-6
    window_only = random_model(small_config([0, 0], sliding_window=24)).double()
    torch.testing.assert_close(window_only(tokens).logits[:, -1], window_only(changed).logits[:, -1], atol=1e-12, rtol=0)


@torch.no_grad()
def test_mtp_position_t_sees_the_next_token_and_no_later_one(model):
    tokens = random_tokens(CONFIG, 1, 40)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % CONFIG.vocab_size
    before, after = model.mtp_logits(tokens), model.mtp_logits(changed)
    assert before.shape == (1, 39, CONFIG.vocab_size)
    torch.testing.assert_close(before[:, :19], after[:, :19], atol=1e-12, rtol=0)
    assert (before[:, 19] - after[:, 19]).abs().max() > 1e-3


@pytest.mark.parametrize(("tokens", "words"), [
    ([[1, 300]], "token id 300 is outside the vocabulary of 300 ids"), ([[-1, 2]], "token id -1 is outside"),
    ([[]], "non-empty"), ([1, 2], r"\[batch, tokens\] tensor, not \[2\]")])
def test_unusable_token_ids_are_one_clear_line(model, tokens, words):
    tokens = torch.tensor(tokens, dtype=torch.int64)
    for call in (model, model.mtp_logits):
        with pytest.raises(InputError, match=words):
            call(tokens)
