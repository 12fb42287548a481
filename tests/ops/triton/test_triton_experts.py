"""Experts in Triton, plain and packed: values and gradients of the definition in float64, and a token's own bits in any batch."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.rounding import EXACT, ReleasedRounding
from fathom.ops.triton import experts as triton_experts
from fathom.quant.formats import E8M0, dequantise, quantise_fp4, quantise_fp8

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
PACK = {"fp8": quantise_fp8, "fp8 base": lambda x: quantise_fp8(x, torch.float32), "fp4": quantise_fp4}


def problem(tokens, experts, chosen, width, hidden, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + experts + width)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    expert = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)])
    weight = torch.rand(tokens, chosen, generator=generator)
    matrices = [(torch.randn(experts, *shape, generator=generator) * 2 * width**-0.5).to(dtype)
                for shape in ((hidden, width), (hidden, width), (width, hidden))]
    return x, expert, weight, *matrices


def assert_near(found, expected, dtype):
    torch.testing.assert_close(found.double(), expected.double(), atol=TOLERANCE[dtype] * float(expected.abs().max()), rtol=TOLERANCE[dtype])


def run(implementation, dtype, x, expert, weight, *matrices, limit=1.5):
    """Output and gradients, of what is float64 where the definition runs."""
    leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in (x, weight, *matrices)]
    with ops.using(implementation):
        arguments = leaves[0], expert, *leaves[1:], limit
        assert ops.routed_experts.choose(*arguments)[0] == implementation
        out = ops.routed_experts(*arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_is_definition(problem, dtype):
    for expected, found in zip(run("definition", torch.float64, *problem), run("triton", None, *problem), strict=True):
        assert_near(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, experts, chosen, width, hidden", [
    (1, 1, 1, 5, 3), (1, 8, 3, 40, 66), (9, 4, 4, 64, 128), (23, 3, 2, 70, 60), (70, 2, 1, 34, 20)])
def test_values_and_gradients_are_the_definitions(tokens, experts, chosen, width, hidden, dtype):
    """Tiles of 16 pairs and of 64, experts without a pair, with a full tile and with one more."""
    assert_is_definition(problem(tokens, experts, chosen, width, hidden, dtype), dtype)


@pytest.mark.parametrize("experts, tokens", [(5, 17), (2, 65)])
def test_one_expert_gets_every_pair(experts, tokens):
    x, expert, *rest = problem(tokens, experts, 1, 20, 24)
    for last in (0, experts - 1):
        assert_is_definition((x, expert.fill_(last), *rest), torch.float32)


def test_bfloat16_matrices_under_float32_inputs_and_the_other_way_round():
    x, expert, weight, *matrices = problem(9, 4, 2, 20, 24)
    assert_is_definition((x, expert, weight, *(each.bfloat16() for each in matrices)), torch.bfloat16)
    assert_is_definition((x.bfloat16(), expert, weight.bfloat16(), *matrices), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_tokens_bits_do_not_depend_on_the_other_tokens(tokens, dtype):
    x, expert, weight, *matrices = problem(60, 3, 2, 70, 66, dtype)
    with torch.no_grad(), ops.using("triton"):
        together = ops.routed_experts(x, expert, weight, *matrices, 1.5)
        assert torch.equal(together, ops.routed_experts(x, expert, weight, *matrices, 1.5))
        some = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:tokens]
        assert torch.equal(ops.routed_experts(x[some], expert[some], weight[some], *matrices, 1.5), together[some])


def test_gradients_are_the_same_bits_twice():
    arguments = problem(40, 3, 2, 34, 40)
    for one, other in zip(run("triton", None, *arguments), run("triton", None, *arguments), strict=True):
        assert torch.equal(one, other)


def test_only_gradients_that_are_asked_for_are_made(monkeypatch):
    x, expert, weight, *matrices = problem(5, 3, 2, 20, 24)
    *_, expected = run("triton", None, x, expert, weight, *matrices)
    matrices[2].requires_grad_()
    monkeypatch.setattr(triton_experts, "_x_backward", None)
    with ops.using("triton"):
        out = ops.routed_experts(x, expert, weight, *matrices, 1.5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.autograd.grad(out, matrices[2], grad)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", PACK)
@pytest.mark.parametrize("tokens, width, hidden", [(4, 34, 70), (50, 160, 66)])
def test_packed_experts_are_the_dequantised_ones_in_values_and_gradients(form, tokens, width, hidden, dtype):
    x, expert, weight, *matrices = problem(tokens, 3, 2, width, hidden, dtype)
    packed = [PACK[form](each) for each in matrices]
    out, x_grad, weight_grad, *_ = run("definition", torch.float64, x, expert, weight, *(dequantise(each, dtype) for each in packed))
    x.requires_grad_(), weight.requires_grad_()
    with ops.using("triton"):
        assert ops.routed_experts.choose(x, expert, weight, *packed, 1.5)[0] == "triton"
        found = ops.routed_experts(x, expert, weight, *packed, 1.5)
    assert_near(found.detach(), out, dtype)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    for got, expected in zip(torch.autograd.grad(found, (x, weight), grad), (x_grad, weight_grad), strict=True):
        assert_near(got, expected, dtype)


def exact_problem(form):
    """Products of gate and up that are exact sums: no order of summing moves what is rounded before down."""
    generator = torch.Generator().manual_seed(5)
    x, expert, weight, *_ = problem(12, 3, 2, 160, 66)
    matrices = [torch.randint(-6, 7, (3, *shape), generator=generator) / 16 for shape in ((66, 160), (66, 160), (160, 66))]
    return (x * 4).round() / 4, expert, weight, *(matrices if form is None else [PACK[form](each) for each in matrices])


@pytest.mark.parametrize("form", [None, "fp8", "fp4"])
def test_inputs_of_all_products_are_rounded_and_gradients_pass_straight(form):
    x, expert, weight, *matrices = exact_problem(form)
    results = []
    for implementation in ("definition", "triton"):
        leaves = [each.clone().requires_grad_() for each in (x, weight, *(matrices if form is None else ()))]
        with ops.using(implementation):
            arguments = leaves[0], expert, leaves[1], *(leaves[2:] or matrices), 2.0, ReleasedRounding(16)
            assert ops.routed_experts.choose(*arguments)[0] == implementation
            out = ops.routed_experts(*arguments)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    for expected, found in zip(*results, strict=True):
        assert_near(found, expected, torch.float32)
    with ops.using("triton"):
        unrounded = ops.routed_experts(x, expert, weight, *matrices, 2.0, EXACT)
    assert (unrounded - results[0][0]).abs().max() > 1e-3 * unrounded.abs().max()


def test_formats_are_mixed_where_gate_and_up_agree():
    x, expert, weight, gate, up, down = problem(5, 3, 2, 34, 20)
    arguments = x, expert, weight, quantise_fp4(gate), quantise_fp4(up), quantise_fp8(down), 1.5
    with ops.using("triton"):
        assert ops.routed_experts.choose(*arguments)[0] == "triton"
        assert ops.routed_experts.choose(x, expert, weight, gate, quantise_fp8(up), down, 1.5)[0] == "definition"
        assert ops.routed_experts.choose(x.double(), *arguments[1:])[0] == "definition"
        found = ops.routed_experts(*arguments)
    assert arguments[3].scale.dtype == E8M0
    assert_near(found, ops.routed_experts.definition(*arguments), torch.float32)
    assert ops.routed_experts.choose(*arguments)[0] != "triton"  # on CPU it must be asked for


@pytest.mark.parametrize("dtype, up_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 1100), (0, 4)])
def test_clamped_swiglu_is_the_definition_in_values_and_gradients(shape, dtype, up_dtype):
    generator = torch.Generator().manual_seed(7)
    gate, up = (torch.randn(shape, generator=generator) * 3 for _ in range(2))
    results = []
    for implementation in ("definition", "triton"):
        double = implementation == "definition"
        leaves = [each.to(each_dtype).to(torch.float64 if double else each_dtype).requires_grad_()
                  for each, each_dtype in ((gate, dtype), (up, up_dtype))]
        with ops.using(implementation):
            assert ops.clamped_swiglu.choose(*leaves, 2.0)[0] == implementation
            out = ops.clamped_swiglu(*leaves, 2.0)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert results[1][0].dtype == torch.float32
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5 if found.dtype == torch.float32 else 1e-2)


def test_clamped_swiglu_at_its_limits_and_beyond_numbers():
    """A gate or up at its limit still gets its gradient; what is no number stays none."""
    gate, up = torch.tensor([2.0, 2.5, -80.0, float("nan"), 1.0]), torch.tensor([-2.0, 2.0, -2.5, 1.0, float("nan")])
    results = []
    for implementation in ("definition", "triton"):
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        with ops.using(implementation):
            out = ops.clamped_swiglu(*leaves, 2.0)
        results.append([out.detach(), *(each[:3] for each in torch.autograd.grad(out.sum(), leaves))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, equal_nan=True)
