"""Mixed precision: products of rounded numbers, everything between them in float32."""

import json

import pytest
import torch

from fathom import ops
from fathom.data.packing import Batch
from fathom.errors import RecipeError
from fathom.model.layers import Linear
from fathom.model.transformer import Transformer
from fathom.ops.precision import narrow_dtype, products_dtype
from fathom.recipe import load
from fathom.train.loop import Loop
from fathom.train.objective import LossWeights, objective
from fathom.train.pretrain import Pretrain
from tests.models import random_model, random_tokens, small_config
from tests.ops.test_attention import problem as attention_problem
from tests.runs import fathom, losses, micro_recipe

BF16 = torch.bfloat16


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_experts(x, weight, *matrices):
    expert = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n))[:2] for n in range(len(x))])
    return ops.routed_experts(x, expert, weight, *matrices, 10.0)  # nothing near the clamps, whose slopes jump


def of_attention(q, kv_window, kv_entries, sink):
    _, window, entries, _ = attention_problem(20, torch.arange(65).expand(2, 65), "blocks", selected=5)
    return ops.attention(q, window._replace(kv_BTD=kv_window), entries._replace(kv_BMD=kv_entries), sink)


def of_loss(hidden, head):
    return ops.cross_entropy(hidden, head, torch.arange(90) % 50)


# The function, its arguments in float64, and which of them are rounded.
PRODUCTS = {
    "linear": (ops.linear, [randn(3, 90, 64), randn(48, 64, seed=1)], (0, 1)),
    "grouped": (ops.grouped_linear, [randn(2, 30, 4, 64), randn(32, 64, seed=1)], (0, 1)),
    "experts": (of_experts, [randn(200, 64), randn(200, 2, seed=1).abs(), *(randn(6, *shape, seed=2) / 8 for shape in ((48, 64), (48, 64), (64, 48)))],
                (0, 2, 3, 4)),
    "attention": (of_attention, [randn(2, 65, 3, 8), randn(2, 65, 8, seed=1), randn(2, 16, 8, seed=2), randn(3, seed=3)], (0, 1, 2)),
    "cross-entropy": (of_loss, [randn(90, 64), randn(50, 64, seed=1) / 8], (0, 1)),
}


def value_and_gradients(function, arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = function(*leaves)
    weight = randn(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("using", ["definition", "fast"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_rounded_numbers_with_gradients_in_float32(name, using):
    function, arguments, narrow = PRODUCTS[name]
    rounded = [x.to(BF16).double() if place in narrow else x for place, x in enumerate(arguments)]
    expected = value_and_gradients(function, rounded)
    with ops.using(using), ops.products_in(BF16):
        found, again = (value_and_gradients(function, [x.float() for x in arguments]) for _ in range(2))
    for one, same, exact in zip(found, again, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, same)
        assert distance(one, exact) < 8e-3  # rounded numbers between the products too
    plain, unrounded = value_and_gradients(function, [x.float() for x in arguments]), value_and_gradients(function, arguments)
    assert all(distance(one, exact) < 1e-5 for one, exact in zip(plain, unrounded, strict=True))


def test_outside_and_in_wide_layers_nothing_is_rounded():
    x, (narrow, wide) = randn(5, 64).float(), (Linear(64, 32, wide=flag) for flag in (False, True))
    for layer in (narrow, wide):
        layer.weight.data = randn(32, 64, seed=1).float()
    expected = narrow(x)
    with ops.products_in(BF16):
        assert torch.equal(wide(x), expected) and not torch.equal(narrow(x), expected) and narrow(x).dtype == torch.float32
        with ops.products_in(None):
            assert torch.equal(narrow(x), expected)
        assert products_dtype() == BF16
        assert torch.equal(narrow(x.double()), ops.linear(x.to(torch.float32), narrow.weight))  # a layer computes in its weight's dtype
    assert torch.equal(narrow(x), expected)
    with pytest.raises(ZeroDivisionError), ops.products_in(BF16):
        raise ZeroDivisionError
    assert products_dtype() is None


def test_auto_is_bfloat16_where_the_device_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, expected in (({}, None), ({"avx512_bf16": True}, BF16), ({"amx_bf16": False}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known)
        assert narrow_dtype("auto", cpu) == expected and narrow_dtype("bfloat16", cpu) == BF16 and narrow_dtype("float32", cpu) is None
    assert narrow_dtype("auto", torch.device("cuda")) == BF16
    with pytest.raises(RecipeError, match="precision is 'fp4'; allowed: auto, bfloat16, float32"):
        Loop(precision="fp4")


def gradients_of(model: Transformer, dtype):
    tokens = random_tokens(model.config, 2, 150)
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], ops.IGNORE)], 1)
    model.zero_grad(set_to_none=True)
    with ops.products_in(dtype):
        found = objective(model, Batch(tokens, targets, torch.arange(150).expand(2, 150)), LossWeights(), 0.0, "sparse")
        found.total.backward()
    return found.parts["loss"], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def test_a_steps_gradients_are_near_those_of_float32_and_recomputed_blocks_give_the_same(monkeypatch):
    model = random_model(small_config([0, 4, 128])).train()
    (loss, exact), (narrow_loss, narrow), again = gradients_of(model, None), gradients_of(model, BF16), gradients_of(model, BF16)
    assert 0 < abs(narrow_loss - loss) < 0.02 and 1e-3 < distance(narrow, exact) < 0.1
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in model.parameters() if p.grad is not None)
    assert torch.equal(narrow, again[1])
    monkeypatch.setattr(type(model), "recompute_above", 10)
    assert torch.equal(gradients_of(model, BF16)[1], narrow)


def test_a_run_in_bfloat16_learns_saves_float32_and_says_so(tmp_path):
    recipe = micro_recipe(tmp_path, steps=20)
    for run, precision in (("exact", "float32"), ("narrow", "bfloat16")):
        fathom("train", recipe, "--set", f"run={tmp_path / run}", "--set", f"loop.precision={precision}", check=True)
    exact, narrow = ([loss for _, loss in losses(tmp_path / run)] for run in ("exact", "narrow"))
    assert exact != narrow and narrow == pytest.approx(exact, rel=0.05) and narrow[-1] < 0.8 * narrow[0]
    assert json.loads((tmp_path / "narrow" / "checkpoints" / "step-000020" / "config.json").read_text())["torch_dtype"] == "float32"
    assert load(Pretrain, tmp_path / "narrow" / "recipe.toml", []).loop.precision == "bfloat16"
    wrong = fathom("train", recipe, "--set", "loop.precision=int8")
    assert wrong.returncode == 2 and "precision is 'int8'" in wrong.stderr and wrong.stderr.count("\n") == 1
