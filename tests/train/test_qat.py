"""Quantisation-aware training: the forward pass is the exported model's, the masters and their gradients stay in full precision."""

import pytest
import torch

import fathom
from fathom.checkpoint.released import save_model
from fathom.checkpoint.training import find_model
from fathom.ops.rounding import EXACT
from fathom.train.qat import released_numbers
from tests.models import random_model, random_tokens, small_config
from tests.runs import fathom as run_fathom
from tests.runs import losses, micro_recipe

CONFIG = small_config([0, 4, 128], hidden_size=96, moe_intermediate_size=80, q_lora_rank=130, num_hash_layers=1)


def training_logits(model, tokens):
    """Logits of the training forward, with the indexer's selection."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model.head(model.features(tokens, positions, [], "sparse").hidden_BSW)


def test_the_training_forward_equals_the_exported_model_bit_for_bit(tmp_path):
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 2, 200)
    save_model(model, tmp_path / "exported", layout="official-fp4")
    with released_numbers(model), torch.no_grad():
        trained = training_logits(model, tokens)
    with torch.no_grad():
        exported = fathom.load_model(tmp_path / "exported", simulate_quantization=True)
        assert torch.equal(exported(tokens).logits, trained)
        plain = training_logits(model, tokens)
    assert (trained - plain).abs().mean() > 0.1  # the formats are felt


def test_masters_come_back_and_get_the_rounded_models_gradients(tmp_path):
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 1, 130)
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with released_numbers(model):
        training_logits(model, tokens).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name]), name
    assert all(module.rounding is EXACT for module in model.modules() if hasattr(module, "rounding"))

    save_model(model, tmp_path / "exported", layout="official-fp4")
    exported = fathom.load_model(tmp_path / "exported", simulate_quantization=True)
    training_logits(exported, tokens).square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), exported.parameters(), strict=True):
        if other.grad is not None:
            assert torch.equal(parameter.grad, other.grad), name


def test_masters_come_back_after_an_error():
    model = random_model(CONFIG)
    before = model.head.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), released_numbers(model):
        assert not torch.equal(model.head.weight, before)
        raise ZeroDivisionError
    assert torch.equal(model.head.weight, before)


def test_a_recipe_switches_it_on_at_a_step_and_its_export_computes_the_same(tmp_path):
    plain, late, early = (micro_recipe(tmp_path / name, **schedule) for name, schedule in (
        ("plain", {}), ("late", {"quantise_from": 12}), ("early", {"quantise_from": 0})))
    for recipe in (plain, late, early):
        assert run_fathom("train", recipe).returncode == 0
    curves = [losses(recipe.parent / "run") for recipe in (plain, late, early)]
    assert curves[0][:12] == curves[1][:12] and curves[0][12:] != curves[1][12:] and curves[0][:1] != curves[2][:1]

    checkpoint = find_model(late.parent / "run")
    assert run_fathom("convert", late.parent / "run", tmp_path / "fp4", "--to", "official-fp4").returncode == 0
    exported = fathom.load_model(tmp_path / "fp4", simulate_quantization=True)
    model, tokens = fathom.load_model(checkpoint), random_tokens(exported.config, 1, 64)
    with released_numbers(model), torch.no_grad():
        assert torch.equal(model(tokens).logits, exported(tokens).logits)


@pytest.mark.parametrize("value", ["-1", "soon"])
def test_a_wrong_step_is_one_line(tmp_path, value):
    result = run_fathom("train", micro_recipe(tmp_path), "--set", f"schedule.quantise_from={value}")
    assert result.returncode == 2 and "quantise_from" in result.stderr and result.stderr.count("\n") == 1
