"""The rounding object: the released code's numbers by a slow definition, and gradients that pass straight through."""

import numpy as np
import pytest
import torch

from fathom.ops.rounding import EXACT, ReleasedRounding, Rounding
from fathom.quant.formats import hadamard, round_fp4
from tests.quant.oracle import (
    E2M1_TABLE,
    E4M3_TABLE,
    FLOATS,
    assert_same_bits,
    blocks_by_definition,
    spread,
    sylvester,
)

PARTS = ["inputs", "entries", "index"]


def rounded(x, block, table, smallest=0.0):
    return torch.from_numpy(blocks_by_definition(x.double().numpy(), block, table, smallest)[0]).to(x.dtype)


@pytest.mark.parametrize("part", PARTS)
def test_exact_returns_its_argument(part):
    x = torch.randn(2, 3, requires_grad=True)
    assert getattr(EXACT, part)(x) is x and isinstance(ReleasedRounding(64), Rounding)


@pytest.mark.parametrize("shape", [(3, 5, 256), (4, 200), (2, 48), (300,)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_rounded_to_fp8_by_128_channels(shape, dtype):
    x = spread(shape, 1, -25, 10).to(dtype)  # blocks below the floor of 1e-4 and above
    assert_same_bits(ReleasedRounding(64).inputs(x), rounded(x, 128, E4M3_TABLE, 1e-4))


@pytest.mark.parametrize("channels, rotary", [(512, 64), (64, 16), (96, 32), (200, 8)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_entries_are_rounded_to_fp8_by_64_channels_but_for_the_rotary_ones(channels, rotary, dtype):
    x = spread((3, 7, channels), 2, -25, 10).to(dtype)
    plain = rounded(x[..., :-rotary], 64, E4M3_TABLE, 1e-4)
    got = ReleasedRounding(rotary).entries(x)
    assert_same_bits(got, torch.cat([plain, x[..., -rotary:]], -1))
    assert not torch.equal(plain, x[..., :-rotary])


@pytest.mark.parametrize("part", ["inputs", "entries"])
def test_fp8_scales_stop_shrinking_at_a_largest_value_of_1e_4(part):
    x = torch.zeros(128)
    x[:3] = torch.tensor([2.0**-20, 2.0**-32, 1.01 * 2.0**-32])  # scale 2^-22: the smallest value but 0 is 2^-31
    assert getattr(ReleasedRounding(64), part)(x)[:4].tolist() == [2.0**-20, 0, 2.0**-31, 0]


def test_fp4_scales_keep_shrinking():
    x = spread((4, 128), 8, -3, 3)
    assert_same_bits(ReleasedRounding(64).index(x * 2.0**-60), ReleasedRounding(64).index(x) * 2.0**-60)


@pytest.mark.parametrize("channels, block", [(128, 128), (64, 64), (96, 32)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_index_vectors_are_turned_and_rounded_to_mxfp4(channels, block, dtype):
    x = np.random.default_rng(channels).integers(-64, 65, (3, 5, channels))  # integers: any order of summing is exact
    turned = (x @ np.kron(np.eye(channels // block), sylvester(block))).astype(np.float32) * np.float32(block**-0.5)
    got = ReleasedRounding(64).index(torch.from_numpy(x).to(dtype))
    assert_same_bits(got, rounded(torch.from_numpy(turned).to(dtype), 32, E2M1_TABLE))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gradient_changes_no_bit_of_the_value_and_the_argument_stays(part, dtype):
    x, rounding = spread((4, 128), 3).to(dtype), ReleasedRounding(64)
    kept, expected = x.clone(), getattr(rounding, part)(x)
    got = getattr(rounding, part)(x.requires_grad_())
    assert got.requires_grad and not expected.requires_grad
    assert_same_bits(got.detach(), expected)
    assert_same_bits(x.detach(), kept)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_pass_straight_through(part, dtype):
    x, grad = spread((4, 128), 4).to(dtype).requires_grad_(), spread((4, 128), 5, -3, 3).to(dtype)
    expected = hadamard(grad) if part == "index" else grad
    got, = torch.autograd.grad(getattr(ReleasedRounding(64), part)(x), x, grad)
    assert_same_bits(got, expected)


def test_the_gradient_of_index_vectors_is_turned_back():
    x, grad = spread((4, 128), 6).requires_grad_(), torch.randn(4, 128, generator=torch.Generator().manual_seed(6))
    got, = torch.autograd.grad(ReleasedRounding(64).index(x), x, grad)
    torch.testing.assert_close(got, grad @ torch.from_numpy(sylvester(128) * 128**-0.5).float(), atol=1e-5, rtol=0)


def test_rounding_again_changes_nothing_but_index_vectors():
    x, rounding = spread((6, 256), 7), ReleasedRounding(64)
    for part in (rounding.inputs, rounding.entries):
        assert_same_bits(part(part(x)), part(x))
    index = rounding.index(x)
    assert_same_bits(round_fp4(index), index)
    assert not torch.equal(rounding.index(index), index)
