"""The kernel of normalisation and rotary turns against the definitions in float64, under Triton's interpreter."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

import torch
from torch import nn

import fathom.ops.triton.norm_rotary as kernels
from fathom import ops

EPS = 1e-6


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(*shape, seed=1):
    """Turns [..., C], complex128."""
    return torch.polar(torch.ones(shape, dtype=torch.float64), 7 * random(*shape, seed=seed))


def values_and_gradients(operator, leaves, others, implementation):
    """The result, and gradients of its product with fixed numbers for the leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    with ops.using(implementation):
        assert operator.choose(leaves[0], *others, *leaves[1:])[0] == implementation
        out = operator(leaves[0], *others, *leaves[1:])
    return [out.detach(), *torch.autograd.grad((out * random(*out.shape, seed=9).to(out.dtype)).sum(), leaves)]


def assert_as_defined(operator, leaves, others, dtype=torch.float32, tolerance=1e-5):
    """The kernel in `dtype` against the definition in float64, of the same numbers."""
    leaves = [x.to(dtype) for x in leaves]
    exact = values_and_gradients(operator, [x.double() for x in leaves], others, "definition")
    narrow = [x.to(torch.complex64) if isinstance(x, torch.Tensor) else x for x in others]
    for expected, actual in zip(exact, values_and_gradients(operator, leaves, narrow, "triton"), strict=True):
        assert actual.shape == expected.shape and actual.dtype == dtype
        assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 2, 33), (2, 35, 64), (33, 300), (5, 1025)])
def test_normalisation_is_the_definition_with_and_without_a_weight(shape):
    x = random(*shape)
    assert_as_defined(ops.rms_normalise, [x], [EPS])
    assert_as_defined(ops.rms_normalise, [x, random(shape[-1], seed=2)], [EPS])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape, turn", [((1, 1, 2), (1, 1, 1)), ((2, 5, 16), (2, 5, 8)), ((2, 5, 16), (1, 5, 3)), ((2, 3, 4, 24), (2, 3, 1, 4)),
                                         ((9, 40), (9, 7)), ((2, 17, 6, 64), (1, 17, 1, 32))])
def test_turns_are_the_definition_for_some_channels_and_broadcast_turns(shape, turn, inverse, dtype, tolerance):
    assert_as_defined(ops.rotate, [random(*shape)], [angles(*turn), inverse], dtype, tolerance)


def test_a_turn_and_its_inverse_are_nothing_and_plain_channels_stay_to_the_bit():
    x, turn = random(2, 9, 3, 20).float(), angles(2, 9, 1, 4).to(torch.complex64)
    with ops.using("triton"):
        turned = ops.rotate(x, turn)
        assert torch.equal(turned[..., :12], x[..., :12]) and not torch.equal(turned, x)
        torch.testing.assert_close(ops.rotate(turned, turn, inverse=True), x)
        assert torch.equal(ops.rotate(x, turn.conj()), ops.rotate(x, turn, inverse=True))


def test_normalisation_in_bfloat16_rounds_once():
    x, weight = random(40, 96).bfloat16(), random(96, seed=2).bfloat16()
    exact = ops.rms_normalise.definition(x.double(), EPS, weight.double())
    with ops.using("triton"):
        found = ops.rms_normalise(x, EPS, weight)
    assert found.dtype == torch.bfloat16 and ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert_as_defined(ops.rms_normalise, [x, weight], [EPS], torch.bfloat16, 2**-7)


def test_layout_does_not_matter():
    x, turn = random(6, 8, 20).float(), angles(8, 6, 5).to(torch.complex64)
    with ops.using("triton"):
        assert torch.equal(ops.rms_normalise(x.mT, EPS), ops.rms_normalise(x.mT.contiguous(), EPS))
        assert torch.equal(ops.rotate(x, turn.transpose(0, 1)), ops.rotate(x, turn.transpose(0, 1).contiguous()))
        assert torch.equal(ops.rotate(x, turn[:, :1, ::2].transpose(0, 1)), ops.rotate(x, turn[:, :1, ::2].transpose(0, 1).contiguous()))


def test_rows_are_the_same_bits_alone_and_twice():
    x, weight, turn = random(70, 48), random(48, seed=2), angles(70, 9)
    first, second = (values_and_gradients(ops.rms_normalise, [x.float(), weight.float()], [EPS], "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    with ops.using("triton"):
        assert torch.equal(ops.rms_normalise(x[-1:].float(), EPS, weight.float()), first[0][-1:])
        narrow = turn.to(torch.complex64)
        assert torch.equal(ops.rotate(x[-1:].float(), narrow[-1:]), ops.rotate(x.float(), narrow)[-1:])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
def test_queries_in_one_pass_are_normalised_and_turned(dtype, tolerance):
    W, R, H, D, turn = 12, 6, 3, 20, angles(2, 5, 4)
    down, up, norm = random(R, W, seed=2), random(H * D, R, seed=3), nn.Identity()

    def queries(implementation, dtype, turn):
        x, a, b = (t.to(dtype).requires_grad_() for t in (random(2, 5, W), down, up))
        with ops.using(implementation):
            latent, q = ops.low_rank_queries(x, lambda y: y @ a.T, norm, lambda y: y @ b.T, H, turn, EPS)
        loss = (q * random(*q.shape, seed=9).to(dtype)).sum() + (latent * random(*latent.shape, seed=8).to(dtype)).sum()
        return [latent.detach(), q.detach(), *torch.autograd.grad(loss, (x, a, b))]

    exact = queries("definition", torch.float64, turn)
    for expected, actual in zip(exact, queries("triton", dtype, turn.to(torch.complex64)), strict=True):
        assert actual.dtype == dtype and (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def test_queries_in_one_pass_are_the_bits_of_two():
    q, turn = random(2, 5, 3, 20).bfloat16(), angles(2, 5, 4).to(torch.complex64)
    with ops.using("triton"):
        two = ops.rotate(ops.rms_normalise(q, EPS), turn[:, :, None])
        _, one = ops.low_rank_queries(q.flatten(2), nn.Identity(), nn.Identity(), nn.Identity(), 3, turn, EPS)
    assert torch.equal(one, two)


def test_what_the_kernel_does_not_take_is_left_to_the_definitions():
    x, turn = random(2, 3, 8).float(), angles(2, 3, 2).to(torch.complex64)
    with ops.using("triton"):
        assert ops.rotate.choose(x, turn)[0] == "triton"
        assert ops.rotate.choose(x.double(), turn)[0] == "definition"
        assert ops.rotate.choose(x, turn.to(torch.complex128))[0] == "definition"
        assert ops.rotate.choose(x[None, None], turn)[0] == "definition"
        assert ops.rotate.choose(x[:0], turn[:0])[0] == "definition"
        assert ops.rms_normalise.choose(x[:0], EPS)[0] == "definition"
        assert ops.rms_normalise.choose(x, EPS, torch.ones(8, dtype=torch.float64))[0] == "definition"
    assert kernels.NAME in ops.low_rank_queries.implementations
