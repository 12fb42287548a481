"""Experts in FP8 and FP4: the dequantised experts' results, and the released rounding of what goes into each product."""

import pytest
import torch
import torch.nn.functional as F

from fathom import ops
from fathom.ops.rounding import EXACT, ReleasedRounding
from fathom.quant.formats import E4M3, E8M0, Packed, dequantise
from tests.quant.oracle import E4M3_TABLE, blocks_by_definition

LIMIT = 2.0
KINDS = [("fp4", E8M0, torch.float32), ("fp4", E8M0, torch.bfloat16), ("fp8", E8M0, torch.float32),
         ("fp8", E8M0, torch.bfloat16), ("fp8", torch.float32, torch.float32), ("fp4", torch.float32, torch.float32)]
SIZES = [(256, 128), (34, 70), (72, 160)]  # width and hidden


def stack(kind, scale_dtype, experts, rows, columns, generator):
    """Experts whose products with FP8 inputs are exact sums in float32: FP4 numbers, or whole ones, and scales within 4."""
    exponent = torch.randint(120, 122, (experts, *_scale_shape(kind, rows, columns)), generator=generator).to(torch.uint8)
    scale = exponent.view(E8M0).to(scale_dtype)
    if kind == "fp4":
        return Packed(torch.randint(-128, 128, (experts, rows, columns // 2), generator=generator, dtype=torch.int8), scale)
    return Packed(torch.randint(-15, 16, (experts, rows, columns), generator=generator).float().to(E4M3), scale)


def _scale_shape(kind, rows, columns):
    return (rows, -(-columns // 32)) if kind == "fp4" else (-(-rows // 128), -(-columns // 128))


def problem(kind, tokens, experts=8, chosen=3, width=256, hidden=128):
    """Inputs [N, W] of sizes 1/8 ... 8, which FP8 makes multiples of 2^-7 or more; experts 0 and 5 get nothing."""
    form, scale_dtype, dtype = kind
    generator = torch.Generator().manual_seed(tokens + width)
    size = 2.0 ** (torch.rand(tokens, width, generator=generator) * 6 - 3)
    x = (size * (torch.randint(0, 2, size.shape, generator=generator) * 2 - 1)).to(dtype)
    some = torch.tensor([e for e in range(experts) if e not in (0, 5)])
    expert = torch.stack([some[torch.randperm(len(some), generator=generator)[:chosen]] for _ in range(tokens)])
    weight = torch.rand(tokens, chosen, generator=generator)
    return x, expert, weight, *(stack(form, scale_dtype, experts, *shape, generator)
                                for shape in ((hidden, width), (hidden, width), (width, hidden)))


def rounded(x):
    """x [C] in FP8, one scale for each 128 channels: by table, in float64."""
    return torch.from_numpy(blocks_by_definition(x.double().numpy(), 128, E4M3_TABLE, 1e-4)[0]).to(x.dtype)


def slowly(x, expert, weight, gate, up, down, round_inputs, weight_inside=True):
    """Token by token and expert by expert on dequantised matrices; every product in the dtype of x."""
    gate, up, down = (dequantise(each, x.dtype) for each in (gate, up, down))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for n, k in torch.cartesian_prod(torch.arange(len(x)), torch.arange(expert.shape[1])).tolist():
        e, token = int(expert[n, k]), round_inputs(x[n])
        hidden = F.silu((gate[e] @ token).float().clamp(max=LIMIT)) * (up[e] @ token).float().clamp(-LIMIT, LIMIT)
        hidden = round_inputs((hidden * (weight[n, k] if weight_inside else 1)).to(x.dtype))
        out[n] += down[e].double() @ hidden.double() * (1 if weight_inside else weight[n, k].double())
    return out


def assert_near(out, expected, dtype):
    """To the order of float32's sums; in bfloat16 each expert's output is rounded as well."""
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    assert out.dtype == torch.float32 and out.shape == expected.shape and expected.std() > 0
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("rounding", [EXACT, ReleasedRounding(16)], ids=["exact", "released"])
@pytest.mark.parametrize("width, hidden", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_experts_are_the_dequantised_ones(kind, width, hidden, rounding):
    x, expert, weight, *packed = problem(kind, 20, width=width, hidden=hidden)
    plain = [dequantise(each, x.dtype) for each in packed]
    assert_near(ops.routed_experts(x, expert, weight, *packed, LIMIT, rounding),
                ops.routed_experts(x, expert, weight, *plain, LIMIT, rounding).double(), x.dtype)


@pytest.mark.parametrize("tokens", [1, 2, 12])
@pytest.mark.parametrize("width, hidden", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_inputs_of_all_three_products_are_rounded_as_released(kind, width, hidden, tokens):
    """Gate and up are exact sums here, so that no other order of summing moves what is rounded before down."""
    x, expert, weight, *packed = problem(kind, tokens, width=width, hidden=hidden)
    out = ops.routed_experts(x, expert, weight, *packed, LIMIT, ReleasedRounding(16))
    expected = slowly(x, expert, weight, *packed, rounded)
    assert_near(out, expected, x.dtype)
    if tokens == 12 and x.dtype == torch.float32:  # what the formats and the weight's place change is seen at this tolerance
        for other in (slowly(x, expert, weight, *packed, lambda x: x), slowly(x, expert, weight, *packed, rounded, False)):
            assert (other - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_rounding_nothing_is_rounded(kind):
    x, expert, weight, *packed = problem(kind, 10)
    assert_near(ops.routed_experts(x, expert, weight, *packed, LIMIT), slowly(x, expert, weight, *packed, lambda x: x), x.dtype)


@pytest.mark.parametrize("kind", KINDS[:3])
@torch.no_grad()
def test_a_tokens_result_does_not_depend_on_the_other_tokens(kind):
    x, expert, weight, *packed = problem(kind, 25)
    together = ops.routed_experts(x, expert, weight, *packed, LIMIT, ReleasedRounding(16))
    alone = torch.cat([ops.routed_experts(x[n:n + 1], expert[n:n + 1], weight[n:n + 1], *packed, LIMIT, ReleasedRounding(16))
                       for n in range(len(x))])
    assert_near(together, alone.double(), x.dtype)


@torch.no_grad()
def test_an_expert_that_gets_every_token_and_experts_that_get_none():
    x, expert, weight, *packed = problem(KINDS[0], 12, chosen=1)
    expert.fill_(7)
    out = ops.routed_experts(x, expert, weight, *packed, LIMIT, ReleasedRounding(16))
    assert_near(out, slowly(x, expert, weight, *packed, rounded), x.dtype)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_gradients_pass_through_packed_experts_to_inputs_and_weights(kind):
    x, expert, weight, *packed = problem(kind, 6)
    plain = [dequantise(each) for each in packed]
    grads = []
    for matrices in (packed, plain):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = ops.routed_experts(inputs[0], expert, inputs[1], *matrices, LIMIT, ReleasedRounding(16))
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for got, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
