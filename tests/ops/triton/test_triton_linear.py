"""Packed products in Triton: the definition's numbers bit for bit, its sums in float64 to rounding, gradients of the inputs."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.triton.linear import linear_triton
from fathom.quant.formats import E4M3, E8M0, Packed, dequantise
from tests.ops.test_linear import assert_is_product, assert_same_bits
from tests.ops.test_linear import packed as random_packed

KINDS = [("fp8", E8M0, torch.float32), ("fp8", E8M0, torch.bfloat16), ("fp8", torch.float32, torch.float32), ("fp8", torch.float32, torch.bfloat16),
         ("fp4", E8M0, torch.float32), ("fp4", E8M0, torch.bfloat16), ("fp4", torch.float32, torch.float32)]
MATRICES = [(1, 2), (65, 34), (160, 130), (130, 262)]


packed = partial(random_packed, low=120, high=125)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_values_and_gradients_are_the_definitions(kind, scale_dtype, dtype, shape):
    weight = packed(kind, scale_dtype, shape)
    matrix = dequantise(weight, dtype).double()
    for x_shape in ((), (1,), (2, 9)):
        x = inputs(*x_shape, shape[1], dtype=dtype).requires_grad_()
        with ops.using("triton"):
            assert ops.linear.choose(x, weight) == ("triton", linear_triton)
            out = ops.linear(x, weight)
        assert_is_product(out.detach(), x.detach(), matrix)
        grad = inputs(*out.shape, dtype=dtype)
        x_grad, = torch.autograd.grad(out, x, grad)
        assert_is_product(x_grad, grad, matrix.mT)


@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_weights_are_dequantised_bit_for_bit(kind, scale_dtype, dtype):
    """Products with one-hot rows are the weight's columns."""
    weight = packed(kind, scale_dtype, (70, 66), low=60, high=190)
    with ops.using("triton"):
        columns = ops.linear(torch.eye(66, dtype=dtype), weight)
    assert_same_bits(columns.mT.contiguous() + 0, dequantise(weight, dtype) + 0)  # + 0: a sum has no negative zero


@pytest.mark.parametrize("fp4", [True, False])
def test_every_code_and_scales_at_both_ends(fp4):
    byte = torch.arange(256).to(torch.uint8)
    codes = byte[None].view(torch.int8) if fp4 else byte[(byte & 127) != 127][None].view(E4M3)
    inputs = codes.shape[1] * (2 if fp4 else 1)
    for exponent in (0, 1, 3, 127, 240):  # 2^-127 has no exponent bits of its own
        scale = torch.full((1, inputs // 32 if fp4 else 2), exponent, dtype=torch.uint8).view(E8M0)
        with ops.using("triton"):
            columns = ops.linear(torch.eye(inputs), Packed(codes, scale))
        assert_same_bits(columns.mT.contiguous() + 0, dequantise(Packed(codes, scale)) + 0)


def test_what_is_no_number_stays_none():
    weight = packed("fp8", E8M0, (3, 5))
    weight.codes.view(torch.uint8)[1, 2] = 255
    with ops.using("triton"):
        assert ops.linear(torch.ones(5), weight).isnan().tolist() == [False, True, False]
        assert ops.linear(torch.ones(5), Packed(weight.codes.float().nan_to_num().to(E4M3), torch.tensor([[255]], dtype=torch.uint8).view(E8M0))).isnan().all()


@pytest.mark.parametrize("kind, scale_dtype, dtype", [KINDS[1], KINDS[4]])
def test_a_row_has_the_same_bits_in_any_batch(kind, scale_dtype, dtype):
    weight, x = packed(kind, scale_dtype, (70, 290)), inputs(70, 290, dtype=dtype)
    with ops.using("triton"):
        together = ops.linear(x, weight)
        assert_same_bits(together, ops.linear(x, weight))
        for rows in (slice(0, 1), slice(3, 12), slice(60, 70), slice(5, 40)):
            assert_same_bits(ops.linear(x[rows], weight), together[rows])


def test_views_of_weights_and_inputs():
    weight, x = packed("fp8", E8M0, (2, 256, 256)), inputs(3, 512)
    view = Packed(weight.codes[1, :, 128:], weight.scale[1, :, 1:])
    with ops.using("triton"):
        assert_is_product(ops.linear(x[:, ::4], view), x[:, ::4], dequantise(view).double())
        assert ops.linear(x[:0, :256], weight[0]).shape == (0, 256)


def test_the_definition_takes_the_rest():
    weight, x = packed("fp8", E8M0, (4, 6)), torch.zeros(2, 6)
    assert ops.linear.choose(x, weight)[0] != "triton"  # on CPU it must be asked for
    with ops.using("triton"):
        assert ops.linear.choose(x, torch.zeros(4, 6))[0] == "definition"
        assert ops.linear.choose(x.double(), weight)[0] == "definition"
        assert ops.linear.choose(x, Packed(weight.codes, weight.scale.bfloat16()))[0] == "definition"
