"""The Hadamard rotation."""

import numpy as np
import pytest
import torch

from fathom.quant.formats import hadamard
from tests.quant.oracle import FLOATS, assert_same_bits, spread, sylvester


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
