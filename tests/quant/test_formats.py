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
    ACTIVATION_BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3,
    E4M3_MAX,
    E8M0,
    ENTRY_BLOCK,
    FP4_BLOCK,
    Packed,
    block_scale,
    decode_e2m1,
    dequantise,
    encode_e2m1,
    fp4_to_fp8,
    fp8_blocks,
    hadamard,
    pack_nibbles,
    quantise_fp4,
    quantise_fp8,
    round_e2m1,
    round_fp4,
    round_fp8,
    unpack_nibbles,
)
from tests.quant.oracle import (
    BOUNDED,
    E2M1_TABLE,
    E4M3_TABLE,
    FLOAT32_MAX,
    FLOATS,
    HUGE,
    SHAPES,
    SMALLEST,
    assert_same_bits,
    blocks_by_definition,
    matrices,
    nearest,
    scale_by_definition,
    signed_codes,
    spread,
    sylvester,
    tiles_by_definition,
    vectors,
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


# ---- properties

def half_ulp(x, table):
    """The largest error of a number (float64) that was rounded: half a step of its binade, or of the values next to zero.

    e4m3: |x| 2^-4 and 2^-10. e2m1 has one bit of mantissa: steps of at most |x| / 2 from 1 on, of 1/2 below: |x| / 4 and 1/4.
    """
    return np.maximum(np.abs(x) * (2.0**-4 if len(table) > 8 else 0.25), 2.0**-10 if len(table) > 8 else 0.25)


def assert_rounded(x, got, scale, table):
    """Within half an ulp of x, of the same sign, finite, and values of the table times the scale (float64)."""
    x, got = x.double().numpy(), got.double().numpy()
    assert np.isfinite(got).all() and np.array_equal(np.signbit(got), np.signbit(x))
    assert (np.abs(x - got) <= half_ulp(x / scale, table) * scale).all()
    assert np.isin(np.abs(got) / scale, table).all()


@pytest.mark.parametrize("block", [ENTRY_BLOCK, ACTIVATION_BLOCK, 48])
@pytest.mark.parametrize("dtype", FLOATS)
@BOUNDED
@given(x=vectors())
def test_rounding_to_fp8_is_stable_and_within_half_an_ulp(block, dtype, x):
    x = x.to(dtype)
    got = round_fp8(x, block)
    assert_same_bits(round_fp8(got, block), got)
    for part, rounded in zip(x.split(block), got.split(block), strict=True):
        assert_rounded(part, rounded, scale_by_definition(part.double().numpy(), E4M3_TABLE, 1e-4), E4M3_TABLE)


@pytest.mark.parametrize("dtype", FLOATS)
@BOUNDED
@given(x=vectors())
def test_rounding_to_fp4_is_stable_and_within_half_an_ulp(dtype, x):
    x = x.to(dtype)
    got = round_fp4(x)
    assert_same_bits(round_fp4(got), got)
    for part, rounded in zip(x.split(FP4_BLOCK), got.split(FP4_BLOCK), strict=True):
        assert_rounded(part, rounded, scale_by_definition(part.double().numpy(), E2M1_TABLE), E2M1_TABLE)


@BOUNDED
@given(matrices())
def test_fp8_matrices_are_stable_and_within_half_an_ulp(x):
    values = dequantise(quantise_fp8(x))
    assert_same_bits(dequantise(quantise_fp8(values)), values)
    for rows, row_values in zip(x.split(128, -2), values.split(128, -2), strict=True):
        for tile, got in zip(rows.split(128, -1), row_values.split(128, -1), strict=True):
            for index in np.ndindex(tile.shape[:-2]):
                scale = scale_by_definition(tile[index].double().numpy(), E4M3_TABLE)
                assert_rounded(tile[index], got[index], scale, E4M3_TABLE)


@BOUNDED
@given(matrices())
def test_fp4_matrices_are_stable_and_equal_to_the_rounding(x):
    packed = quantise_fp4(x)
    values = dequantise(packed)
    assert_same_bits(values, round_fp4(x))
    assert_same_bits(dequantise(quantise_fp4(values)), values)
    assert torch.equal(dequantise(packed, torch.bfloat16).float(), values)


@BOUNDED
@given(matrices())
def test_fp8_matrices_are_exact_in_bfloat16(x):
    packed = quantise_fp8(x.where(x.abs() > 1e-34, 1e-34))  # smaller blocks reach below bfloat16's subnormal numbers
    assert torch.equal(dequantise(packed, torch.bfloat16).float(), dequantise(packed))


@pytest.mark.parametrize("shape", [(1, 2), (130, 34), (3, 5, 64)])
def test_blocks_of_zeros_stay_zeros_with_a_valid_scale(shape):
    zeros = torch.zeros(shape)
    for packed in (quantise_fp8(zeros), quantise_fp4(zeros)):
        assert (packed.scale.float() == SMALLEST).all()
        assert_same_bits(dequantise(packed), zeros)
    assert_same_bits(round_fp8(zeros, 64), zeros)
    assert_same_bits(round_fp4(zeros), zeros)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 3 * SMALLEST, HUGE])
def test_tiny_and_huge_numbers_have_valid_scales_and_finite_values(size):
    x = torch.tensor([[size, -size, size / 2, 0.0]])
    for packed in (quantise_fp8(x), quantise_fp4(x)):
        values = dequantise(packed)
        assert 1 <= packed.scale.view(torch.uint8).item() <= 254
        assert torch.isfinite(values).all()
        assert ((values - x).abs() <= max(size / 4, SMALLEST / 4)).all()
    assert torch.isfinite(round_fp8(x, 64)).all() and torch.isfinite(round_fp4(x)).all()


def test_numbers_up_to_3e38_stay_finite_in_fp8():
    x = torch.tensor([[3e38, -3e38]])
    assert torch.isfinite(round_fp8(x, 64)).all() and torch.isfinite(dequantise(quantise_fp8(x))).all()


def test_numbers_up_to_3_and_a_half_times_2_to_the_126_stay_finite_in_fp4():
    """The next ones are rounded to 4 * 2^126, which float32 does not hold."""
    assert round_fp4(torch.tensor([3.5 * 2.0**126]).nextafter(torch.zeros(1))).item() == 3 * 2.0**126


@pytest.mark.parametrize("smallest", [1e-4, 2.0**-20, 3.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_activation_blocks_scale_stops_shrinking(smallest, dtype):
    x = spread((40, 200), 3, -30, 4).to(dtype)
    values, codes, scales = blocks_by_definition(x.double().numpy(), 64, E4M3_TABLE, smallest)
    assert scales.min() == scale_by_definition(np.zeros(1), E4M3_TABLE, smallest)
    assert_same_bits(round_fp8(x, 64, smallest), torch.from_numpy(values).to(dtype))
    got_codes, got_scales = fp8_blocks(x, 64, smallest)
    assert got_codes.shape == (40, 4, 64) and got_scales.dtype == torch.float32
    assert np.array_equal(got_scales.numpy(), scales)
    flat = got_codes.view(torch.uint8).flatten(-2).numpy()
    assert np.array_equal(flat[:, :200], codes) and not flat[:, 200:].any()


# ---- from FP4 to FP8

def fp4_matrix(O, I, low=127, apart=0, seed=0):
    """Random codes, each block's scale between 2^(low - 127) and 2^apart times that."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (O, I), generator=generator, dtype=torch.uint8)
    byte = torch.randint(low, low + apart + 1, (O, -(-I // 32)), generator=generator).to(torch.uint8)
    return Packed(pack_nibbles(codes), byte.view(E8M0))


def moved_by_definition(packed):
    """Which tiles hold a value that times its FP4 scale over the tile's FP8 scale is no value of e4m3, and those FP8 scales."""
    values = E2M1_TABLE[unpack_nibbles(packed.codes).numpy() % 8]
    scale = 2.0**(packed.scale.view(torch.uint8).numpy().astype(float) - 127)
    rows, columns = (-(-size // 128) for size in values.shape)
    inexact, tile_scale = np.zeros((rows, columns), bool), np.zeros((rows, columns))
    for o, i in np.ndindex(rows, columns):
        part = scale[128 * o:128 * o + 128, 4 * i:4 * i + 4]
        tile_scale[o, i] = part.max() / 64
        moved = values[128 * o:128 * o + 128, 128 * i:128 * i + 128]
        moved = moved * (part.repeat(32, 1)[:, :moved.shape[1]] / tile_scale[o, i])
        inexact[o, i] = not np.isin(moved, E4M3_TABLE).all()
    return inexact, tile_scale


def assert_moved(packed, scale_dtype=E8M0):
    """As defined, with the same values (signs of zeros too) in every exact tile; returns the mask."""
    moved, mask = fp4_to_fp8(packed, scale_dtype)
    inexact, tile_scale = moved_by_definition(packed)
    assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), inexact)
    assert moved.codes.dtype == E4M3 and moved.scale.dtype == scale_dtype and moved.shape == packed.shape
    assert np.array_equal(moved.scale.float().numpy(), tile_scale)
    O, I = packed.shape
    exact = ~mask.repeat_interleave(128, 0)[:O].repeat_interleave(128, 1)[:, :I]
    assert_same_bits(dequantise(moved)[exact], dequantise(packed)[exact])
    return mask


@pytest.mark.parametrize("scale_dtype", [E8M0, torch.float32])
@pytest.mark.parametrize("O, I", [(128, 128), (160, 256), (160, 96), (1, 2), (130, 34)])
def test_fp4_moves_to_fp8_exactly_where_scales_lie_within_2_to_the_14(O, I, scale_dtype):
    for low, apart in ((127, 0), (120, 14), (7, 14), (238, 14)):
        assert not assert_moved(fp4_matrix(O, I, low, apart), scale_dtype).any()


def test_the_mask_marks_precisely_the_tiles_that_fp8_cannot_hold():
    packed = fp4_matrix(500, 650, low=110, seed=1)
    apart = torch.randint(10, 22, (4, 6), generator=torch.Generator().manual_seed(1))
    higher = apart.repeat_interleave(128, 0)[:500].repeat_interleave(4, 1)[:, :21]
    higher[torch.arange(500) % 100 != 5] = 0  # one row of each tile, or two
    packed.scale.view(torch.uint8).add_(higher.byte())
    mask = assert_moved(packed)
    assert torch.equal(mask, apart > 14) and 5 < mask.sum() < 19


@BOUNDED
@given(O=st.integers(1, 256), I=st.integers(1, 64), low=st.integers(6, 200), apart=st.integers(0, 50), seed=st.integers(0, 99))
def test_the_mask_is_that_of_the_definition(O, I, low, apart, seed):
    assert_moved(fp4_matrix(O, 2 * I, low, apart, seed))


@pytest.mark.parametrize("apart, small, inexact", [
    (14, [0.5, 1.5, 6], False),  # 0.5 * 2^-14 * 64 is e4m3's smallest value
    (15, [1, 2, 3, 4, 6], False), (15, [0.5], True), (15, [1.5], True), (15, [-0.5], True),
    (16, [2, 4, 6], False), (16, [3], True), (16, [1], True),
    (40, [0, -0.0], False), (40, [6], True),
])
def test_how_far_apart_scales_may_lie_depends_on_the_values(apart, small, inexact):
    values = torch.full((128, 128), 6.0)
    values[7] = 0
    values[7, :len(small)] = torch.tensor(small)
    byte = torch.full((128, 4), 127, dtype=torch.uint8)
    byte[7] -= apart
    assert assert_moved(Packed(pack_nibbles(encode_e2m1(values)), byte.view(E8M0))).tolist() == [[inexact]]


def test_one_tile_that_cannot_be_moved_marks_no_other():
    packed = fp4_matrix(300, 300)
    packed.scale.view(torch.uint8)[130, 4] = 160  # 2^33 times the tile's other scales
    assert assert_moved(packed).nonzero().tolist() == [[1, 1]]


def test_stacks_move_as_their_matrices_do():
    matrices = [fp4_matrix(130, 40, apart=apart, seed=apart) for apart in (0, 14, 30)]
    stack = Packed(torch.stack([m.codes for m in matrices]), torch.stack([m.scale for m in matrices]))
    moved, mask = fp4_to_fp8(stack)
    assert mask.shape == (3, 2, 1) and mask.any(-1).any(-1).tolist() == [False, False, True]
    for i, matrix in enumerate(matrices):
        alone, alone_mask = fp4_to_fp8(matrix)
        assert torch.equal(mask[i], alone_mask)
        assert_same_bits(moved[i].codes, alone.codes)
        assert_same_bits(moved[i].scale, alone.scale)


@pytest.mark.parametrize("largest, tile_scale", [(127, 2.0**-6), (6, 2.0**-127), (2, 2.0**-127), (0, 2.0**-127), (252, 2.0**119)])
def test_the_smallest_and_largest_scales_move_exactly(largest, tile_scale):
    packed = fp4_matrix(4, 64, low=largest)
    moved, mask = fp4_to_fp8(packed)
    assert not mask.any() and (moved.scale.double() == tile_scale).all()
    assert_same_bits(dequantise(moved), dequantise(packed))


def test_values_that_vanish_altogether_are_marked():
    values = torch.ones(2, 32)
    byte = torch.tensor([[227], [67]], dtype=torch.uint8)
    assert_moved(Packed(pack_nibbles(encode_e2m1(values)), byte.view(E8M0)))


# ---- Hadamard

@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_hadamard_is_the_sylvester_matrix(size):
    assert_hadamard(size, sylvester(size) * size**-0.5)


@pytest.mark.parametrize("size, block", [(96, 32), (48, 16), (6, 2), (33, 1)])
def test_hadamard_turns_each_block_where_the_size_is_no_power_of_two(size, block):
    assert_hadamard(size, np.kron(np.eye(size // block), sylvester(block) * block**-0.5))


def assert_hadamard(size, matrix):
    """Row after row, and bit for bit for integers, whose sums are exact; computed in float32 (float64) and rounded once."""
    assert_close = torch.testing.assert_close
    assert_close(hadamard(torch.eye(size, dtype=torch.float64)), torch.from_numpy(matrix), atol=0, rtol=1e-15)
    integers = np.random.default_rng(size).integers(-99, 100, (5, 2, size))
    unit = np.abs(matrix).max()
    expected = torch.from_numpy((integers @ np.sign(matrix)).astype(np.float32) * np.float32(unit))
    for dtype in FLOATS:
        assert_same_bits(hadamard(torch.from_numpy(integers).to(dtype)), expected.to(dtype))


@pytest.mark.parametrize("size", [1, 8, 128, 96, 48])
def test_hadamard_is_its_own_inverse_and_keeps_dot_products(size):
    x, y = torch.randn(2, 10, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=1e-13, rtol=0)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1, 8, 12])
def test_hadamard_has_the_gradient_of_a_linear_map(size):
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size), requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x)
    grad = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(hadamard(x), x, grad)[0], hadamard(grad), atol=1e-14, rtol=0)


@pytest.mark.parametrize("size", [128, 96])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_vector_alone_has_the_bits_that_it_has_in_a_batch(size, dtype):
    batch = spread((3, 7, size), 4).to(dtype)
    for together in (hadamard(batch), hadamard(batch.transpose(0, 1)).transpose(0, 1)):
        for index in np.ndindex(3, 7):
            assert_same_bits(together[index], hadamard(batch[index]))
