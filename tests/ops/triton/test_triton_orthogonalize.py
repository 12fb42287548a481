"""Newton-Schulz in Triton against its definition: products with an own transpose, singular values, whole matrices, an optimiser's step."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.orthogonalize import orthogonalize
from fathom.ops.triton.orthogonalize import orthogonalize_triton, own_product
from fathom.optim.muon import Muon, MuonOptimizer
from tests.ops.test_orthogonalize import random_matrices

SHAPES = [(1, 1), (1, 70), (33, 65), (130, 40), (129, 257)]  # of one tile and of several, with edges inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_with_the_own_transpose(shape, dtype):
    a_BNK = random_matrices(2, *shape).to(dtype)
    with ops.using("triton"):
        found = own_product(a_BNK, 0.75)
        again = own_product(found, -1.5, 0.25)
    assert found.dtype == again.dtype == dtype
    rounding = 2e-6 if dtype == torch.float32 else 8e-3
    for result, factors, expected in ((found, a_BNK, 0.75 * a_BNK.double() @ a_BNK.double().mT),
                                      (again, found, -1.5 * found.double() @ found.double() + 0.25 * found.double())):
        size = factors.double().abs() @ factors.double().abs().mT + factors.double().abs().amax()  # of what is added up
        assert ((result - expected).abs() <= rounding * 1.5 * size).all()
        assert torch.equal(result.tril(-1), result.mT.tril(-1)) or shape[0] <= 128  # tiles are mirrored to the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_has_the_same_bits_in_any_batch(dtype):
    a_BNK = random_matrices(3, 130, 70).to(dtype)
    with ops.using("triton"):
        together = own_product(a_BNK)
        assert torch.equal(together, own_product(a_BNK))
        for number in range(3):
            assert torch.equal(own_product(a_BNK[number:number + 1])[0], together[number])


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (24, 96), (96, 24), (65, 63), (130, 200)])
def test_it_is_the_definition(shape):
    matrices_BNM = random_matrices(3, *shape)
    matrices_BNM[1] = 0
    with ops.using("triton"):
        assert orthogonalize.choose(matrices_BNM) == ("triton", orthogonalize_triton)
        found, narrow = orthogonalize(matrices_BNM), orthogonalize(matrices_BNM, dtype=torch.bfloat16)
    expected = orthogonalize.definition(matrices_BNM.double())
    assert found.dtype == narrow.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    assert (narrow - expected).norm() < 0.03 * expected.norm()
    assert not found[1].any() and not narrow[1].any()


def test_what_it_does_not_take_is_the_definitions():
    with ops.using("triton"):
        for matrices, dtype in ((random_matrices(1, 4, 4, torch.float64), None), (random_matrices(1, 4, 4), torch.float16), (torch.empty(0, 4, 4), None)):
            assert orthogonalize.choose(matrices, dtype=dtype)[0] != "triton"


def test_muon_moves_matrices_as_with_the_definition():
    moved = []
    for name in ("triton", "definition"):
        parameters = [torch.nn.Parameter(random_matrices(1, 48, 32)[0]), torch.nn.Parameter(random_matrices(1, 33, 70)[0])]
        optimizer = MuonOptimizer([{"params": [parameter], "blocks": blocks, "lr": 0.1} for parameter, blocks in zip(parameters, (2, 1), strict=True)],
                                  Muon(precision="float32"))
        for parameter in parameters:
            parameter.grad = parameter.detach().cos()
        with ops.using(name):
            optimizer.step()
        moved.append([parameter.detach() for parameter in parameters])
    for found, expected in zip(*moved, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
