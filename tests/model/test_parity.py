"""Logits against Hugging Face transformers' deepseek_v4, an independent implementation, through files on disk."""

import pytest
import torch
import transformers

import fathom
from fathom.checkpoint.released import save_model
from tests.models import random_model, random_tokens, small_config

SCHEDULES = {"window": [0, 0], "csa": [4, 4], "hca": [128, 128], "mixed": [0, 4, 128, 4]}


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
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("hash_layers", [0, 3])
@torch.no_grad()
def test_all_learned_and_all_hash_routing_equal_transformers(tmp_path, hash_layers):
    config = small_config([0, 4, 128], num_hash_layers=hash_layers)
    save_model(random_model(config), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = random_tokens(config, 2, 200)
    ours = fathom.load_model(tmp_path / "model")(tokens).logits
    torch.testing.assert_close(ours, theirs(tokens, use_cache=False).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoding_equals_transformers_with_its_own_cache(pair):
    ours, theirs = pair
    tokens = random_tokens(ours.config, 1, 300)
    cache = ours.new_cache(1, 300)
    mine = [ours(tokens[:, :280], cache=cache).logits]
    their_cache = theirs(tokens[:, :280], use_cache=True)
    expected = [their_cache.logits]
    for step in range(280, 300):
        mine.append(ours(tokens[:, step:step + 1], cache=cache).logits)
        their_cache = theirs(tokens[:, step:step + 1], past_key_values=their_cache.past_key_values, use_cache=True)
        expected.append(their_cache.logits)
    torch.testing.assert_close(torch.cat(mine, 1), torch.cat(expected, 1), atol=1e-4, rtol=0)
