"""Logits against Hugging Face transformers' deepseek_v4, an independent implementation, through files on disk.

Where an indexer's last chosen and first left-out scores differ by no more than float32 rounding, either choice is right and
the two programs may differ from there on; such a position ends its row's comparison.
"""

import pytest
import torch
import transformers

import fathom
from fathom import ops
from fathom.checkpoint.released import save_model
from tests.models import random_model, random_tokens, small_config

SCHEDULES = {"window": [0, 0], "csa": [4, 4], "hca": [128, 128], "mixed": [0, 4, 128, 4]}
_gaps: list[torch.Tensor] | None = None


@ops.index_topk.register("watched", supports=lambda *_: _gaps is not None)
def _watched_topk(q, weight, keys, first, count, k):
    """The definition, with the distance of each query's k-th from its next score in units of their spread noted."""
    visible = ops.visible_entries(first, count, keys.shape[1])
    scores = ops.index_scores(q, weight, keys).masked_fill(~visible, float("-inf"))
    best = scores.topk(k + 1).values
    _gaps.append(((best[..., k - 1] - best[..., k]) / scores[visible].std()).masked_fill(count <= k, float("inf")))
    return ops.index_topk.definition(q, weight, keys, first, count, k)


def compared(model, tokens):
    """Our logits, and the mask [B, S] of positions before each row's first near tie."""
    global _gaps
    _gaps = []
    try:
        logits = model(tokens).logits
        near = torch.stack([torch.zeros(tokens.shape, dtype=torch.bool), *(gap < 5e-6 for gap in _gaps)]).any(0)
    finally:
        _gaps = None
    return logits, near.cumsum(1) == 0


@pytest.fixture(scope="module", params=SCHEDULES)
def pair(request, tmp_path_factory):
    """Our model and transformers', both read from the same folder in the released layout."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    ratios = SCHEDULES[request.param]
    config = small_config(ratios, num_hash_layers=1 if len(ratios) > 2 else len(ratios) // 2)
    save_model(random_model(config, seed=len(ratios)), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return fathom.load_model(folder), theirs


@pytest.mark.parametrize("length", [1, 3, 127, 128, 129, 640, 1500])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_logits_equal_transformers(pair, length, batch):
    ours, theirs = pair
    tokens = random_tokens(ours.config, batch, length, seed=length)
    expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.5  # the comparison means something
    logits, clear = compared(ours, tokens)
    assert clear.float().mean() > 0.2
    torch.testing.assert_close(logits[clear], expected[clear], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["definition", "cpu"])
@torch.no_grad()
def test_definitions_and_fast_paths_both_equal_transformers(pair, implementation):
    ours, theirs = pair
    tokens = random_tokens(ours.config, 2, 200, seed=7)
    _, clear = compared(ours, tokens)
    with ops.using(implementation):
        logits = ours(tokens).logits
    torch.testing.assert_close(logits[clear], theirs(tokens, use_cache=False).logits[clear], atol=1e-4, rtol=0)


@pytest.mark.parametrize("hash_layers", [0, 3])
@torch.no_grad()
def test_all_learned_and_all_hash_routing_equal_transformers(tmp_path, hash_layers):
    config = small_config([0, 4, 128], num_hash_layers=hash_layers)
    save_model(random_model(config), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = random_tokens(config, 2, 200)
    logits, clear = compared(fathom.load_model(tmp_path / "model"), tokens)
    torch.testing.assert_close(logits[clear], theirs(tokens, use_cache=False).logits[clear], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoding_equals_transformers_with_its_own_cache(pair):
    ours, theirs = pair
    tokens = random_tokens(ours.config, 1, 200)
    cache = ours.new_cache(1, 200)
    mine = [ours(tokens[:, :180], cache=cache).logits]
    their_cache = theirs(tokens[:, :180], use_cache=True)
    expected = [their_cache.logits]
    for step in range(180, 200):
        mine.append(ours(tokens[:, step:step + 1], cache=cache).logits)
        their_cache = theirs(tokens[:, step:step + 1], past_key_values=their_cache.past_key_values, use_cache=True)
        expected.append(their_cache.logits)
    _, clear = compared(ours, tokens)
    torch.testing.assert_close(torch.cat(mine, 1)[clear], torch.cat(expected, 1)[clear], atol=1e-4, rtol=0)
