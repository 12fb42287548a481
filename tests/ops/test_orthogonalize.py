"""Newton-Schulz against the singular value decomposition."""

import pytest
import torch

from fathom.ops.cpu import orthogonalize as cpu
from fathom.ops.dispatch import using
from fathom.ops.native.library import library
from fathom.ops.orthogonalize import HYBRID, orthogonalize

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (16, 16), (24, 96), (96, 24), (64, 64), (65, 63), (128, 640)]


def random_matrices(batch: int, rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(batch, rows, columns, generator=generator, dtype=dtype)


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e15])
def test_singular_values_settle_at_one(rows, columns, magnitude):
    X_BNM = orthogonalize(random_matrices(3, rows, columns) * magnitude)
    assert X_BNM.shape == (3, rows, columns) and X_BNM.dtype == torch.float32
    values = torch.linalg.svdvals(X_BNM)
    assert values.min() > 0.9 and values.max() < 1.1


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_directions_are_those_of_the_decomposition(rows, columns):
    matrices_BNM = random_matrices(2, rows, columns, torch.float64)
    U, S, Vh = torch.linalg.svd(matrices_BNM, full_matrices=False)
    difference = torch.linalg.matrix_norm(orthogonalize(matrices_BNM) - U @ Vh, ord=2)
    assert difference.max() < 0.1


def test_each_step_is_the_polynomial_of_the_singular_values():
    matrix_NM = random_matrices(1, 6, 9, torch.float64)[0]
    U, S, Vh = torch.linalg.svd(matrix_NM, full_matrices=False)
    S = S / S.square().sum().sqrt()
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
        S = a * S + b * S**3 + c * S**5
    torch.testing.assert_close(orthogonalize(matrix_NM[None])[0], U @ S.diag() @ Vh, rtol=1e-9, atol=1e-9)


def test_the_last_two_steps_are_needed():
    matrices_BNM = random_matrices(4, 64, 64)
    rough, settled = (torch.linalg.svdvals(orthogonalize(matrices_BNM, steps)) for steps in (HYBRID[:8], HYBRID))
    assert (rough - 1).abs().max() > 0.1 > (settled - 1).abs().max()


def test_a_batch_is_its_matrices_one_by_one():
    matrices_BNM = random_matrices(5, 20, 33)
    alone = torch.cat([orthogonalize(matrix_NM[None]) for matrix_NM in matrices_BNM])
    torch.testing.assert_close(orthogonalize(matrices_BNM), alone, rtol=1e-4, atol=1e-5)


def test_transposing_and_negating_commute_with_it():
    matrices_BNM = random_matrices(2, 12, 30)
    X_BNM = orthogonalize(matrices_BNM)
    assert torch.equal(orthogonalize(matrices_BNM.mT), X_BNM.mT)
    assert torch.equal(orthogonalize(-matrices_BNM), -X_BNM)


def test_zero_stays_zero_beside_others():
    matrices_BNM = random_matrices(3, 8, 6)
    matrices_BNM[1] = 0
    X_BNM = orthogonalize(matrices_BNM)
    assert torch.equal(X_BNM[1], torch.zeros(8, 6)) and X_BNM.isfinite().all()
    assert torch.linalg.svdvals(X_BNM[[0, 2]]).min() > 0.9


def test_precision_is_float32_or_wider_and_the_input_is_left_alone():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        matrices_BNM = random_matrices(1, 4, 4).to(dtype)
        before = matrices_BNM.clone()
        assert orthogonalize(matrices_BNM).dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(matrices_BNM, before)


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 1), (24, 96), (96, 24), (65, 63), (256, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_by_group_it_is_the_definition(rows, columns, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_NUMBERS", 3 * rows * columns)  # groups of three, the last one short
    matrices_BNM = random_matrices(7, rows, columns, dtype)
    with using("cpu"):
        assert orthogonalize.choose(matrices_BNM)[0] == "cpu"
        found, again = orthogonalize(matrices_BNM), orthogonalize(matrices_BNM)
    expected = orthogonalize.definition(matrices_BNM)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found, again)


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 1), (24, 96), (96, 24), (65, 63), (256, 512), (50, 34), (16, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_tiles_it_is_the_definition_with_any_number_of_threads(rows, columns, dtype, monkeypatch):
    monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda: 3)
    monkeypatch.setattr("fathom.ops.native.orthogonalize._NUMBERS", 3 * rows * columns)
    matrices_BNM, before, found = random_matrices(35, rows, columns), torch.get_num_threads(), []
    if dtype is torch.bfloat16 and (rows % 2 or columns % 2):
        assert orthogonalize.choose(matrices_BNM, dtype=dtype)[0] == "cpu"
        return
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            assert orthogonalize.choose(matrices_BNM, dtype=dtype)[0] == "native"
            found.append(orthogonalize(matrices_BNM, dtype=dtype))
    finally:
        torch.set_num_threads(before)
    expected = orthogonalize.definition(matrices_BNM, dtype=dtype)
    assert found[0].dtype == torch.float32 and found[0].shape == expected.shape and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    if dtype is torch.float32:
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert (found[0] - orthogonalize.definition(matrices_BNM)).norm() < 0.03 * expected.norm()
    torch.testing.assert_close(orthogonalize(matrices_BNM[:4], dtype=dtype), found[0][:4], atol=1e-4, rtol=0)


def _spectrum(values, columns):
    """A matrix [len(values), columns] with these singular values."""
    U, V = (torch.linalg.qr(random_matrices(1, side, side, torch.float64)[0])[0] for side in (len(values), columns))
    return (U * values.double()) @ V[:len(values)]


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("rows, columns", [(256, 512), (64, 96), (32, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_made_together_bear_what_has_almost_no_rank(rows, columns, dtype, monkeypatch):
    """As near to float64's as the definition in the same dtype is: between gradients of few directions and noise, rounding grows most."""
    monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda: 3)
    few = torch.arange(rows) < 3
    M_BNM = torch.stack([_spectrum(values, columns) for values in (
        few * 1.0, torch.where(few, 1.0, 1e-3), torch.where(few, 1.0, 1e-5), torch.where(few, 1.0, 1e-9), torch.arange(1, rows + 1) ** -1.0,
        torch.arange(1, rows + 1) ** -4.0, *(torch.logspace(0, end, rows) for end in (-2, -4, -6, -8)))])
    M_BNM = torch.cat([M_BNM, torch.ones(1, rows, columns), torch.zeros(1, rows, columns)])
    assert orthogonalize.choose(M_BNM.float(), dtype=dtype)[0] == "native"
    exact, found, defined = orthogonalize.definition(M_BNM), orthogonalize(M_BNM.float(), dtype=dtype), orthogonalize.definition(M_BNM.float(), dtype=dtype)
    assert torch.linalg.svdvals(found).max() < 1.02 and not found[-1].any()
    own, theirs = ((each - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2)).clamp(min=1) for each in (found, defined))
    assert (own < 2 * theirs + (0.02 if dtype is torch.bfloat16 else 1e-3)).all(), (own, theirs)


@pytest.mark.parametrize("rows, columns", [(8, 8), (24, 96), (96, 24), (256, 512), (128, 640)])
def test_steps_in_bfloat16_settle_the_singular_values_too(rows, columns):
    X_BNM = orthogonalize(random_matrices(3, rows, columns), dtype=torch.bfloat16)
    assert X_BNM.dtype == torch.float32
    values = torch.linalg.svdvals(X_BNM)
    assert values.min() > 0.95 and values.max() < 1.05
    exact_BNM = orthogonalize(random_matrices(3, rows, columns))
    assert (X_BNM - exact_BNM).norm() < 0.03 * exact_BNM.norm()
