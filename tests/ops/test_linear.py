"""Packed matrices on CPU: the tables give the definition's numbers bit for bit, products tile by tile its sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import ops
from fathom.ops.cpu import products
from fathom.ops.cpu.linear import dense_cpu, linear_cpu
from fathom.ops.cpu.products import times, times_relu
from fathom.ops.dispatch import DEFINITION
from fathom.quant.formats import E4M3, E8M0, Packed

# Format of the codes, dtype of the scales, dtype computed in. Arbitrary float32 scales need not be exact in bfloat16.
KINDS = [("fp8", E8M0, torch.float32), ("fp8", E8M0, torch.bfloat16), ("fp8", torch.float32, torch.float32),
         ("fp4", E8M0, torch.float32), ("fp4", E8M0, torch.bfloat16), ("fp4", torch.float32, torch.float32)]
MATRICES = [(1, 2), (128, 128), (130, 34), (160, 96), (300, 4100)]
STACKS = [*MATRICES, (3, 5, 64), (2, 2, 130, 36), (2, 257, 260)]
X_SHAPES = [(), (1,), (7,), (2, 3), (1, 200)]


@pytest.fixture(autouse=True)
def without_native_kernels(monkeypatch):
    """These tests are about the implementations in PyTorch, which do all the work where there is no C compiler."""
    monkeypatch.setattr("fathom.ops.native.library.library", lambda: None)
    monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda: 0)


def packed(kind, scale_dtype, shape, seed=0, low=90, high=130):
    """Random codes, every FP8 number among them, and scales from 2^(low - 127) to 2^(high - 127), or beside the powers of two."""
    generator = torch.Generator().manual_seed(seed)
    *stack, rows, columns = shape
    if kind == "fp4":
        codes = torch.randint(-128, 128, (*stack, rows, columns // 2), generator=generator, dtype=torch.int8)
        scale_shape = *stack, rows, -(-columns // 32)
    else:
        byte = torch.randint(0, 254, shape, generator=generator)
        codes = (byte + (byte >= 127)).to(torch.uint8).view(E4M3)  # all but 127 and 255, which are no numbers
        scale_shape = *stack, -(-rows // 128), -(-columns // 128)
    exponent = torch.randint(low, high, scale_shape, generator=generator).to(torch.uint8)
    scale = exponent.view(E8M0)
    return Packed(codes, scale if scale_dtype == E8M0 else scale.float() * (1 + torch.rand(scale_shape, generator=generator)))


def odd_bytes(weight):
    return weight.codes.shape[-1] % 2 == 1


def assert_same_bits(one, other):
    integer = {4: torch.int32, 2: torch.int16}[other.element_size()]
    assert one.dtype == other.dtype and torch.equal(one.view(integer), other.view(integer))


def assert_is_product(out, x, matrix):
    """`out` is x times the matrix (float64) up to a few roundings of the sum in float32 and one of the result."""
    exact, size = x.double() @ matrix.mT, x.double().abs() @ matrix.abs().mT
    bound = 4 * torch.finfo(torch.float32).eps * size + torch.finfo(out.dtype).eps * exact.abs()
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_dense_is_the_definition_bit_for_bit(kind, scale_dtype, dtype, shape):
    weight = packed(kind, scale_dtype, shape)
    expected = ops.dense.definition(weight, dtype)
    assert expected.abs().max() > 0 and expected.shape == shape
    assert_same_bits(ops.dense(weight, dtype), expected)
    if not odd_bytes(weight):
        assert_same_bits(dense_cpu(weight, dtype), expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 300), columns=st.integers(1, 70), stack=st.sampled_from([(), (1,), (3,)]))
def test_dense_of_any_shape_is_the_definition(kind, rows, columns, stack):
    weight = packed(*kind[:2], (*stack, rows, 4 * columns), rows + columns)
    assert_same_bits(dense_cpu(weight, kind[2]), ops.dense.definition(weight, kind[2]))


@pytest.mark.parametrize("low, high", [(0, 1), (0, 30), (225, 247), (254, 255)])
@pytest.mark.parametrize("kind, dtype", [("fp8", torch.float32), ("fp8", torch.bfloat16), ("fp4", torch.float32),
                                         ("fp4", torch.bfloat16)])
def test_dense_is_the_definition_for_the_smallest_and_the_largest_scales(kind, dtype, low, high):
    """Down to 2^-127 times 2^-9, which bfloat16 does not hold, and beyond the largest numbers."""
    weight = packed(kind, E8M0, (130, 68), low=low, high=high)
    assert_same_bits(dense_cpu(weight, dtype), ops.dense.definition(weight, dtype))


@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_every_code_is_looked_up(kind, scale_dtype, dtype):
    """One row with every pair of bytes that are numbers."""
    byte = torch.arange(256).to(torch.uint8)
    byte = byte if kind == "fp4" else byte[(byte & 127) != 127]
    codes = torch.cartesian_prod(byte, byte).view(1, -1).view(torch.int8 if kind == "fp4" else E4M3)
    block = 16 if kind == "fp4" else 128
    scale = torch.ones(1, -(-codes.shape[1] // block)).to(scale_dtype)
    assert_same_bits(dense_cpu(Packed(codes, scale), dtype), ops.dense.definition(Packed(codes, scale), dtype))


def test_dense_of_views_is_the_definition():
    weight = packed("fp8", E8M0, (4, 256, 512))
    for view in (weight[3], Packed(weight.codes[1, 128:], weight.scale[1, 1:]),
                 Packed(weight.codes[:, :, 128:384], weight.scale[:, :, 1:3])):
        assert_same_bits(ops.dense(view, torch.float32), ops.dense.definition(view, torch.float32))


def test_dense_of_a_plain_matrix_is_a_cast():
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert ops.dense(weight, torch.float32) is weight
    assert_same_bits(ops.dense(weight, torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_linear_is_the_definition_up_to_the_order_of_its_sums(kind, scale_dtype, dtype, shape):
    weight = packed(kind, scale_dtype, shape, low=120, high=125)
    matrix = ops.dense.definition(weight, torch.float32).double()
    for number, x_shape in enumerate(X_SHAPES):
        x = torch.randn(*x_shape, shape[1], generator=torch.Generator().manual_seed(number)).to(dtype)
        first, second = ops.linear(x, weight), ops.linear(x, weight)
        assert_is_product(first, x, matrix)
        assert_same_bits(first, second)
        if not odd_bytes(weight):
            assert_same_bits(linear_cpu(x, weight), first)
    assert_is_product(ops.linear.definition(x, weight), x, matrix)


@pytest.mark.parametrize("rows", [1, 9])
def test_linear_goes_over_the_seams_of_its_tiles(rows):
    """Rows of 9000 numbers: tiles of 128 rows, the last one short; each tile has a scale of its own."""
    weight = packed("fp8", E8M0, (300, 9000), low=110, high=130)
    x = torch.randn(rows, 9000, generator=torch.Generator().manual_seed(2))
    out = ops.linear(x, weight)
    assert_is_product(out, x, ops.dense.definition(weight, torch.float32).double())
    for first in (0, 128, 256):
        part = Packed(weight.codes[first:first + 128], weight.scale[first // 128:first // 128 + 1])
        assert_same_bits(out[:, first:first + 128].contiguous(), ops.linear(x, part))


@pytest.mark.parametrize("x_shape", X_SHAPES)
@torch.no_grad()
def test_a_bfloat16_matrix_under_float32_inputs_is_widened_tile_by_tile(x_shape):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1100, 1000, generator=generator).bfloat16()  # tiles of 1024 and 76 rows
    x = torch.randn(*x_shape, 1000, generator=generator)
    assert ops.linear.choose(x, weight) == ("cpu", linear_cpu)
    out = ops.linear(x, weight)
    assert_is_product(out, x, weight.double())
    assert_is_product(F.linear(x, weight.float()), x, weight.double())
    assert_same_bits(out, ops.linear(x, weight))


def chosen(operator, *arguments):
    return operator.choose(*arguments)[0]


@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_the_tables_serve_packed_matrices(kind, scale_dtype, dtype):
    weight = packed(kind, scale_dtype, (160, 96))
    x = torch.zeros(2, 96, dtype=dtype)
    assert chosen(ops.dense, weight, dtype) == chosen(ops.linear, x, weight) == "cpu"
    with ops.using(DEFINITION):
        assert chosen(ops.dense, weight, dtype) == chosen(ops.linear, x, weight) == DEFINITION


@pytest.mark.parametrize("weight, dtype", [
    (packed("fp8", torch.float32, (160, 96)), torch.bfloat16),  # the scale would be rounded
    (packed("fp4", torch.float32, (160, 96)), torch.bfloat16),
    (packed("fp8", E8M0, (160, 97)), torch.float32),  # an odd number of bytes a row
    (packed("fp4", E8M0, (130, 34)), torch.float32),
    (packed("fp8", E8M0, (160, 96)), torch.float64),
    (packed("fp8", E8M0, (160, 96)), torch.float16),
    (torch.zeros(160, 96), torch.float64),
], ids=["fp8 under bfloat16", "fp4 under bfloat16", "odd fp8", "odd fp4", "float64", "float16", "plain"])
def test_the_definition_takes_what_the_tables_cannot(weight, dtype):
    assert chosen(ops.dense, weight, dtype) == DEFINITION
    assert chosen(ops.linear, torch.zeros(2, weight.shape[1], dtype=dtype), weight) == DEFINITION


def test_float32_scales_under_bfloat16_are_rounded_once():
    weight = packed("fp8", torch.float32, (160, 96))
    scale = weight.scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :96]
    assert_same_bits(ops.dense(weight, torch.bfloat16), (weight.codes.float() * scale).bfloat16())


@pytest.mark.parametrize("kind, scale_dtype, dtype", KINDS)
def test_the_definition_gives_inputs_their_gradients(kind, scale_dtype, dtype):
    weight, generator = packed(kind, scale_dtype, (160, 96), low=120, high=125), torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 96, generator=generator).to(dtype)
    assert chosen(ops.linear, x, weight) == "cpu"
    x.requires_grad_()
    assert chosen(ops.linear, x, weight) == DEFINITION
    grad = torch.randn(2, 3, 160, generator=generator).to(dtype)
    got, = torch.autograd.grad(ops.linear(x, weight), x, grad)
    assert_is_product(got, grad, ops.dense.definition(weight, torch.float32).double().mT)
    with torch.no_grad():
        assert chosen(ops.linear, x, weight) == "cpu"


def test_plain_matrices_are_widened_by_tiles_where_nothing_is_learned():
    x, matrix = torch.zeros(1, 1024), torch.zeros(1025, 1024, dtype=torch.bfloat16)
    assert chosen(ops.linear, x, matrix) == "cpu"
    assert chosen(ops.linear, x.requires_grad_(), matrix) == DEFINITION
    with torch.no_grad():
        assert chosen(ops.linear, x.bfloat16(), matrix) == DEFINITION  # nothing to widen
        assert chosen(ops.linear, x.double(), matrix) == DEFINITION


ROWS = [(1,), (3,), (2, 5), (33,), (1, 1, 1), (0,)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (24, 2048), (256, 512), (300, 513)])
def test_float32_products_equal_the_definition_in_values_and_gradients(rows, outputs, inputs):
    """Either side of the sizes from which oneDNN multiplies."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(*rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    grad = torch.randn(*rows, outputs, generator=generator)
    assert chosen(ops.linear, x, weight) == "oneDNN"
    with torch.no_grad():
        assert_is_product(ops.linear(x, weight), x, weight.double())
        assert_same_bits(ops.linear(x, weight), ops.linear(x, weight))
    x.requires_grad_(), weight.requires_grad_()
    x_grad, weight_grad = torch.autograd.grad(ops.linear(x, weight), (x, weight), grad)
    assert_is_product(x_grad, grad, weight.detach().double().mT)
    assert_is_product(weight_grad, grad.flatten(0, -2).mT, x.detach().flatten(0, -2).double().mT)


def test_float32_products_read_transposed_and_strided_views():
    x, weight = torch.randn(40, 2 * 300), torch.randn(512, 300)
    assert_is_product(times(x[:, ::2], weight), x[:, ::2], weight.double())
    assert_is_product(times(x[:, :300].T.contiguous().T, weight.T.contiguous().T), x[:, :300], weight.double())
    assert_is_product(times(weight.T, x[:, :512].contiguous()), weight.T, x[:, :512].double())
    assert_same_bits(times_relu(x[:, :300], weight), times(x[:, :300], weight).relu())


def test_without_onednn_torchs_own_product_serves(monkeypatch):
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    monkeypatch.setattr(products, "_ONEDNN", None)
    assert_same_bits(times(x, weight), F.linear(x, weight))
    assert_same_bits(times_relu(x, weight), F.linear(x, weight).relu())
