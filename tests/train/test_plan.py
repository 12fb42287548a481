"""What a dry run counts: the published sizes and tokens, FLOPs and activations against what really happens."""

import dataclasses
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fathom.accounting import flops_per_token, parameters
from fathom.config import ModelConfig
from fathom.data.packing import Batch
from fathom.errors import RecipeError
from fathom.model.transformer import Transformer
from fathom.ops.native.library import library
from fathom.optim.muon import AdamW, Muon
from fathom.optim.schedules import Schedule
from fathom.recipe import load
from fathom.train import plan
from fathom.train.loop import Stage, speed
from fathom.train.objective import LossWeights, objective
from fathom.train.plan import Optimizers, Plan, activation_bytes, cost, training_flops_per_token
from fathom.train.pretrain import Pretrain, dry_run
from tests.models import small_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def planned(name, *changes):
    return dry_run(load(Pretrain, RECIPES / f"{name}.toml", changes), RECIPES, Console(quiet=True))


@pytest.mark.parametrize("name, total, mtp, tokens", [("flash", 284.33, 6.61, 32.0), ("pro", 1573.0, 25.84, 33.0)])
def test_the_published_models_come_out_at_the_published_sizes_and_tokens(name, total, mtp, tokens):
    recipe, found = load(Pretrain, RECIPES / f"{name}.toml"), planned(name)
    counts = parameters(ModelConfig.preset(name))
    assert counts.total / 1e9 == pytest.approx(total, abs=0.01) and counts.mtp / 1e9 == pytest.approx(mtp, abs=0.01)
    assert found.parameters + _router_biases(name) == counts.total + counts.mtp
    assert found.tokens / 1e12 == pytest.approx(tokens, rel=1e-4) and found.tokens == recipe.schedule.tokens
    assert recipe.schedule.lengths == (4096, 16384, 65536, 1048576)
    sparse = next(segment for segment in found.segments if segment.attention == "sparse")
    assert sparse.length == 65536
    dense = sum(segment.tokens for segment in found.segments if segment.attention == "dense")
    assert dense / 1e12 == pytest.approx({"flash": 1.0, "pro": 2.0}[name], rel=1e-3)


def _router_biases(name):
    """Numbers that the released layout counts and that no gradient moves."""
    config = ModelConfig.preset(name)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return sum(not config.routes_by_hash(layer) for layer in range(layers)) * config.n_routed_experts


@pytest.mark.parametrize("name", ["nano", "tiny-stages", "tiny"])
def test_the_other_recipes_resolve_too(name):
    found = planned(name)
    assert found.tokens > 0 and found.seconds > 0


def test_memory_is_shared_by_ranks_and_duration_by_throughput():
    one, eight = planned("nano"), planned("nano", "plan.ranks=8")
    for name in ("weights (float32)", "gradients (float32)", "optimiser (float32)"):
        assert one.memory[name] == 8 * eight.memory[name]
    assert one.memory["weights (float32)"] == 4 * one.parameters
    assert one.seconds == pytest.approx(8 * eight.seconds)
    assert planned("nano", "plan.flops_per_second=1e15").seconds == pytest.approx(one.flops / 1e15)


def test_a_steps_flops_are_those_that_the_plan_counts_and_mfu_is_their_share_of_the_peak():
    recipe = load(Pretrain, RECIPES / "tiny-stages.toml")
    stage = Stage(batch=None, loss=None, rate=None, bias_speed=None, validate=None, quantised=None,
                  flops=lambda step: training_flops_per_token(small_config([4, 0]), recipe.schedule.length_at(step), recipe.schedule.attention_at(step)))
    metrics = {"tokens": 2048, "seconds": 0.5}
    found = speed(metrics, stage, 0)
    assert recipe.schedule.attention_at(0) == "dense" and set(found) == {"tokens_per_second", "flops_per_second"}
    assert found["flops_per_second"] == 4096 * training_flops_per_token(small_config([4, 0]), 512, "dense")
    assert speed(metrics, stage, recipe.schedule.steps - 1)["flops_per_second"] > found["flops_per_second"]  # longer sequences, and the indexer's loss
    assert speed(metrics, replace(stage, peak_flops=8 * found["flops_per_second"]), 0)["mfu"] == 0.125
    assert speed(metrics, replace(stage, flops=None), 0) == {"tokens_per_second": 4096}


def test_adamw_for_all_matrices_costs_their_second_moment():
    config, schedule = small_config([4, 0]), Schedule(steps=10, batch_tokens=64, lengths=(32,), warmup_steps=0)
    muon, adamw = (cost(config, schedule, Plan(), Optimizers(Muon(), AdamW(), matrices), 8192).memory["optimiser (float32)"]
                   for matrices in ("muon", "adamw"))
    with torch.device("meta"):
        model = Transformer(config)
    count, tensors = sum(parameter.numel() for parameter in model.parameters()), len(list(model.parameters()))
    assert adamw == 8 * count + 4 * tensors and muon < adamw


def test_flops_are_the_mean_over_a_documents_places():
    config = small_config([4, 0, 128], num_nextn_predict_layers=0, compress_ratios=[4, 0, 128])
    places = [flops_per_token(config, place) for place in range(1024)]
    exact = sum(3 * (place["weights"] + place["attention"]) + 4 * place["indexer"] for place in places) / 1024
    assert training_flops_per_token(config, 1024, "sparse") == pytest.approx(exact, rel=0.01)
    everything = [flops_per_token(dataclasses.replace(config, index_topk=1024), place) for place in range(1024)]
    dense = sum(3 * (place["weights"] + place["attention"]) for place in everything) / 1024
    assert training_flops_per_token(config, 1024, "dense") == pytest.approx(dense, rel=0.01)


@pytest.mark.skipif(library() is None, reason="there is no C compiler, without which more is kept")
@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_what_autograd_keeps(recomputed):
    config = ModelConfig.preset("tiny")
    model = Transformer(config).initialise(0)
    model.recompute_above = 0 if recomputed else 1 << 30
    tokens = torch.randint(0, config.vocab_size, (1, 257), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:].clone(), torch.arange(256)[None])
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = objective(model, batch, LossWeights(), 0.3, "sparse")
    found = sum(storage.nbytes() for storage in kept.values())
    expected = activation_bytes(config, 256, 4, model.recompute_above)
    if recomputed:  # the block that is computed anew is not kept between the passes
        expected -= 256 * 4 * max(map(partial(plan._block_numbers, config), range(4)))
    assert found == pytest.approx(expected, rel=0.12 if recomputed else 0.06) and losses.total > 0


@pytest.mark.parametrize("change", [dict(ranks=0), dict(ranks=8, expert_ranks=3), dict(mfu=1.5), dict(flops_per_second=0.0)])
def test_impossible_machines_are_refused(change):
    with pytest.raises(RecipeError, match="allowed"):
        Plan(**change)
