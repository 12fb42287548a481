"""FP8 and FP4 numbers bit for bit: against tables of every code's value, ml_dtypes and exact arithmetic."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.quant.formats import (
    E2M1_MAX, E2M1_VALUES, E4M3, E4M3_MAX, E8M0, Packed, block_scale, decode_e2m1, dequantise, encode_e2m1, fp8_blocks, pack_nibbles, quantise_fp4,
    quantise_fp8, round_e2m1, round_fp4, round_fp8, unpack_nibbles,
)
from tests.quant.oracle import (
    BOUNDED, E2M1_TABLE, E4M3_TABLE, FLOAT32_MAX, FLOATS, SHAPES, assert_same_bits, blocks_by_definition, matrices, nearest, signed_codes, spread,
    tiles_by_definition,
)


# ---- single numbers

def all_numbers(dtype, limit):
    """Every number of a 16-bit dtype within +-limit, both zeros included."""
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    return x[x.abs() <= limit]


def test_the_tables_hold_every_value_of_the_formats():
    codes = np.arange(127, dtype=np.uint8)
    assert np.array_equal(E4M3_TABLE, codes.view(ml_dtypes.float8_e4m3fn).astype(float)) and E4M3_TABLE[-1] == E4M3_MAX
    assert np.array_equal(E2M1_TABLE, codes[:8].view(ml_dtypes.float4_e2m1fn).astype(float))
    assert tuple(E2M1_TABLE) == E2M1_VALUES == (0, 0.5, 1, 1.5, 2, 3, 4, 6) and E2M1_TABLE[-1] == E2M1_MAX


@pytest.mark.parametrize("dtype, count", [(torch.bfloat16, 2 * (135 * 128 + 97)), (torch.float16, 2 * (23 * 1024 + 769))])
def test_every_16_bit_number_is_rounded_to_the_nearest_e4m3_value(dtype, count):
    x = all_numbers(dtype, 448)
    assert len(x) == count
    pairs = torch.stack([x, torch.full_like(x, 448)], -1)  # beside a 448 the scale is 1
    codes, scale = fp8_blocks(pairs, 2)
    assert (scale == 1).all()
    exact = x.double().numpy()
    assert np.array_equal(codes[:, 0, 0].view(torch.uint8).numpy(), signed_codes(exact, E4M3_TABLE))
    assert np.array_equal(codes[:, 0, 0].view(torch.uint8).numpy(), exact.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert_same_bits(round_fp8(pairs, 2)[:, 0], torch.from_numpy(nearest(exact, E4M3_TABLE)).to(dtype))


@pytest.mark.parametrize("dtype, count", [(torch.bfloat16, 2 * (129 * 128 + 65)), (torch.float16, 2 * (17 * 1024 + 513))])
def test_every_16_bit_number_is_rounded_to_the_nearest_e2m1_value(dtype, count):
    x = all_numbers(dtype, 6)
    assert len(x) == count
    exact = x.double().numpy()
    expected = signed_codes(exact, E2M1_TABLE)
    assert np.array_equal(expected, exact.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    assert np.array_equal(encode_e2m1(x).numpy(), expected)
    value = torch.from_numpy(nearest(exact, E2M1_TABLE))
    assert_same_bits(round_e2m1(x).to(dtype), value.to(dtype))
    assert_same_bits(decode_e2m1(encode_e2m1(x)), value.float())
    pairs = torch.stack([x, torch.full_like(x, 6)], -1)  # beside a 6 the scale is 1
    assert_same_bits(round_fp4(pairs)[:, 0], value.to(dtype))


@pytest.mark.parametrize("x, expected", [
    (0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (6, 6)])
def test_ties_go_to_the_even_e2m1_code(x, expected):
    assert round_e2m1(torch.tensor([x, -x])).tolist() == [expected, -expected]
    assert encode_e2m1(torch.tensor([x, -x])).tolist() == [E2M1_VALUES.index(expected), 8 + E2M1_VALUES.index(expected)]


@pytest.mark.parametrize("x, expected", [(2.0**-10, 0), (3 * 2.0**-10, 2.0**-8), (17, 16), (19, 20), (232, 224), (432, 448)])
def test_ties_go_to_the_even_e4m3_code(x, expected):
    assert round_fp8(torch.tensor([x, -x, 448.0]), 3).tolist() == [expected, -expected, 448]


def test_the_sign_of_zero_is_kept():
    zeros, codes = torch.tensor([0.0, -0.0, 0.1, -0.1]), [0, 8, 0, 8]
    assert encode_e2m1(zeros).tolist() == codes
    assert round_e2m1(zeros).signbit().tolist() == decode_e2m1(encode_e2m1(zeros)).signbit().tolist() == [False, True] * 2
    assert fp8_blocks(zeros[:2], 2)[0].view(torch.uint8).tolist() == [[0, 128]]


def test_every_e2m1_code_encodes_its_value():
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes).tolist() == [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    assert torch.equal(encode_e2m1(decode_e2m1(codes.view(2, 8))), codes.view(2, 8))


def test_the_even_channel_is_the_low_nibble():
    packed = pack_nibbles(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8))
    assert packed.dtype == torch.int8 and packed.tolist() == [[0x21, 0xF3 - 256]]
    assert unpack_nibbles(packed).tolist() == [[1, 2, 3, 15]]


def test_every_byte_is_unpacked_and_packed():
    byte = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    codes = unpack_nibbles(byte.view(torch.int8))
    assert codes[..., ::2].eq(byte % 16).all() and codes[..., 1::2].eq(byte // 16).all()
    assert torch.equal(pack_nibbles(codes), byte.view(torch.int8))
    turned = byte.view(torch.int8).mT  # not contiguous
    assert torch.equal(pack_nibbles(unpack_nibbles(turned)), turned)


# ---- scales

def assert_smallest_scale(largest, limit, scale):
    largest, scale = Fraction(largest), Fraction(scale)
    assert math.frexp(scale)[0] == 0.5
    assert largest <= Fraction(limit) * scale and largest > Fraction(limit) * scale / 2


@pytest.mark.parametrize("limit", [448.0, 6.0])
def test_block_scale_is_the_smallest_power_of_two_at_the_limits_and_beside_them(limit):
    highest = math.floor(math.log2(FLOAT32_MAX / limit))
    limits = torch.tensor([limit * 2.0**k for k in range(-126, highest + 1)])
    below, above = (limits.nextafter(torch.tensor(end)) for end in (0.0, math.inf))
    expected = torch.tensor([2.0**k for k in range(-126, highest + 1)])
    assert_same_bits(block_scale(limits, limit), expected)
    assert_same_bits(block_scale(below, limit), expected)
    assert_same_bits(block_scale(above, limit), expected * 2)
    for x in (limits, below[1:], above):
        for largest, scale in zip(x.tolist(), block_scale(x, limit).tolist(), strict=True):
            assert_smallest_scale(largest, limit, scale)


@pytest.mark.parametrize("limit", [448.0, 6.0])
@settings(BOUNDED, max_examples=200)
@given(mantissa=st.integers(2**23, 2**24 - 1), exponent=st.integers(-117, 127))
def test_block_scale_is_the_smallest_power_of_two(limit, mantissa, exponent):
    largest = torch.tensor(mantissa * 2.0**(exponent - 23))
    assert_smallest_scale(largest.item(), limit, block_scale(largest, limit).item())


@settings(BOUNDED)
@given(matrices())
def test_scales_are_powers_of_two_and_the_same_in_float32(x):
    packed, plain = quantise_fp8(x), quantise_fp8(x, torch.float32)
    assert packed.scale.dtype == E8M0 and plain.scale.dtype == torch.float32
    assert (plain.scale.frexp()[0] == 0.5).all()
    assert torch.equal(packed.scale.float(), plain.scale)
    assert_same_bits(plain.codes, packed.codes)
    assert_same_bits(dequantise(plain), dequantise(packed))


# ---- matrices

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_codes_and_scales_are_those_of_the_definition(shape, dtype):
    x = spread(shape, seed=len(shape)).to(dtype)
    packed = quantise_fp8(x)
    assert packed.codes.dtype == E4M3 and packed.shape == x.shape and not packed.is_fp4
    assert packed.scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    assert packed.nbytes == x.numel() + packed.scale.numel()
    for index in np.ndindex(shape[:-2]):
        codes, scales = tiles_by_definition(x[index].double().numpy())
        assert np.array_equal(packed.codes[index].view(torch.uint8).numpy(), codes)
        assert np.array_equal(packed.scale[index].float().numpy(), scales)
        assert torch.equal(packed.scale[index].view(torch.uint8), torch.from_numpy(scales).float().log2().add(127).byte())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp4_codes_and_scales_are_those_of_the_definition(shape, dtype):
    x = spread(shape, seed=len(shape)).to(dtype)
    packed = quantise_fp4(x)
    assert packed.codes.dtype == torch.int8 and packed.shape == x.shape and packed.is_fp4
    assert packed.codes.shape == (*shape[:-1], shape[-1] // 2)
    assert packed.nbytes == x.numel() // 2 + packed.scale.numel()
    values, codes, scales = blocks_by_definition(x.double().numpy(), 32, E2M1_TABLE)
    assert np.array_equal(unpack_nibbles(packed.codes).numpy(), codes)
    assert packed.scale.dtype == E8M0 and np.array_equal(packed.scale.float().numpy(), scales)
    assert_same_bits(dequantise(packed), torch.from_numpy(values).float())


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_fp4])
def test_a_matrix_of_a_stack_is_the_matrix_alone(quantise):
    stack = spread((3, 130, 96), seed=1)
    packed = quantise(stack)
    for i, matrix in enumerate(stack):
        alone = quantise(matrix)
        assert packed[i].shape == matrix.shape
        assert_same_bits(packed[i].codes, alone.codes)
        assert_same_bits(packed[i].scale, alone.scale)
        assert_same_bits(dequantise(packed)[i], dequantise(alone))


def test_every_fp8_code_times_every_scale_is_dequantised_exactly():
    codes = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8).view(E4M3)
    byte = torch.arange(0, 247, dtype=torch.uint8)  # 448 * 2^119 is the largest within float32
    packed = Packed(codes.expand(len(byte), 1, -1), byte.view(-1, 1, 1).expand(-1, 1, 2).view(E8M0))
    exact = codes.double() * 2.0**(byte.double()[:, None, None] - 127)
    assert_same_bits(dequantise(packed), exact.float())
    assert torch.equal(dequantise(packed).double(), exact)
    bf16 = dequantise(packed, torch.bfloat16)
    assert bf16.dtype == torch.bfloat16 and torch.equal(bf16[3:].double(), exact[3:])  # 2^-133: bfloat16's smallest


def test_every_fp4_code_times_every_scale_is_dequantised_exactly():
    codes, byte = torch.arange(16, dtype=torch.uint8), torch.arange(0, 253, dtype=torch.uint8)
    packed = Packed(pack_nibbles(codes).expand(len(byte), -1), byte[:, None].view(E8M0))
    exact = decode_e2m1(codes).double() * 2.0**(byte.double()[:, None] - 127)
    for dtype in FLOATS:
        assert dequantise(packed, dtype).dtype == dtype
        assert torch.equal(dequantise(packed, dtype).double(), exact)


def test_scales_that_are_no_powers_of_two_are_multiplied_with():
    x, scale = spread((130, 140), seed=2, low=0, high=0), torch.tensor([[0.3, 1.7], [5.0, 0.01]])
    expected = x.to(E4M3).float() * scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :140]
    assert torch.equal(dequantise(Packed(x.to(E4M3), scale)), expected)
