"""FP4 matrices in FP8: exactly, or marked where FP8 cannot hold them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.quant.formats import E4M3, E8M0, Packed, dequantise, encode_e2m1, fp4_to_fp8, pack_nibbles, unpack_nibbles
from tests.quant.oracle import BOUNDED, E2M1_TABLE, E4M3_TABLE, assert_same_bits, matrices


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
