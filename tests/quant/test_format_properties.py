"""What holds for any numbers that are rounded to FP8 or FP4."""

import numpy as np
import pytest
import torch
from hypothesis import given

from fathom.quant.formats import ACTIVATION_BLOCK, ENTRY_BLOCK, FP4_BLOCK, dequantise, fp8_blocks, quantise_fp4, quantise_fp8, round_fp4, round_fp8
from tests.quant.oracle import (
    BOUNDED, E2M1_TABLE, E4M3_TABLE, FLOATS, HUGE, SMALLEST, assert_same_bits, blocks_by_definition, matrices, scale_by_definition, spread, vectors,
)


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
