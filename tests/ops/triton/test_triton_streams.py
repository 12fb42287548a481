"""Hyper-connections' kernels against the definitions in float64, under Triton's interpreter."""

from functools import partial

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

import torch

from fathom import ops
from fathom.ops.triton import streams as kernels
from tests.ops.test_streams import EPS, ITERATIONS, NORM_EPS, coefficient_inputs, mixing_inputs, random, values_and_gradients
from tests.ops.test_streams import assert_as_defined as as_defined

SHAPES = [(1, 1, 1, 5), (2, 3, 2, 7), (3, 11, 4, 16), (1, 9, 8, 9), (1, 2, 3, 21)]  # B, S, N, W; tiles are 32 tokens and 64 channels of N W


def collapse_inputs(B, S, N, W):
    """X, fn, base, scale."""
    X, fn, base, scale = coefficient_inputs(B, S, N, W)
    return [X, fn[:N].clone(), base[:N].clone(), scale[:1].clone()]


def problem(name, *shape):
    """An operator, its tensors and its constants."""
    X, y, post, res = mixing_inputs(*shape)
    return {
        "sinkhorn": (ops.sinkhorn, [res], (ITERATIONS, EPS)),
        "stream_coefficients": (ops.stream_coefficients, coefficient_inputs(*shape), (ITERATIONS, EPS, NORM_EPS)),
        "collapse_coefficients": (ops.collapse_coefficients, collapse_inputs(*shape), (EPS, NORM_EPS)),
        "streams_in": (ops.streams_in, [X, post], ()),
        "streams_out": (ops.streams_out, [X, y, post, res], ()),
    }[name]


NAMES = ["sinkhorn", "stream_coefficients", "collapse_coefficients", "streams_in", "streams_out"]
assert_as_defined = partial(as_defined, implementation="triton")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_the_definition(name, shape):
    operator, inputs, constants = problem(name, *shape)
    assert_as_defined(operator, inputs, *constants)


@pytest.mark.parametrize("name", ["stream_coefficients", "collapse_coefficients"])
def test_several_chunks_of_tokens_and_channels_are_added_up(name, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_T", 32)
    monkeypatch.setattr(kernels, "_CHUNK_I", 64)
    for S, W in ((65, 48), (64, 32), (33, 33)):
        operator, inputs, constants = problem(name, 1, S, 4, W)
        assert_as_defined(operator, inputs, *constants)


@pytest.mark.parametrize("name", ["streams_in", "streams_out"])
def test_several_tiles_of_channels_are_mixed(name, monkeypatch):
    monkeypatch.setattr(kernels, "_TILE_NW", 32)
    for W in (8, 9, 24):
        operator, inputs, constants = problem(name, 2, 2, 4, W)
        assert_as_defined(operator, inputs, *constants)


def test_sinkhorn_of_one_iteration_and_of_extreme_logits_is_the_definition():
    assert_as_defined(ops.sinkhorn, [random(2, 17, 3, 3, seed=0)], 1, EPS)
    logits = (random(1, 33, 4, 4, seed=0) > 0) * 16.0 - 8
    assert_as_defined(ops.sinkhorn, [logits], ITERATIONS, EPS)
    assert_as_defined(ops.sinkhorn, [logits * 10], ITERATIONS, EPS, rounding=1e-4)


def test_coefficients_of_vanishing_streams_are_the_definition():
    X, *parameters = coefficient_inputs(2, 3, 4, 8)
    assert_as_defined(ops.stream_coefficients, [X * 1e-3, *parameters], ITERATIONS, EPS, NORM_EPS, rounding=1e-4)
    zero = values_and_gradients(ops.stream_coefficients, [X * 0, *parameters], ITERATIONS, EPS, NORM_EPS, implementation="triton")
    assert all(x.isfinite().all() for x in zero)


@pytest.mark.parametrize("name", NAMES[1:])
def test_bfloat16_streams_are_computed_with_exactly_and_rounded_once(name):
    operator, inputs, constants = problem(name, 2, 3, 4, 8)
    streams = 2 if name == "streams_out" else 1  # X and y; coefficients and parameters stay float32
    inputs = [x.bfloat16() if i < streams else x for i, x in enumerate(inputs)]
    exact = values_and_gradients(operator, [x.double() for x in inputs], *constants, implementation="definition")
    fast = values_and_gradients(operator, inputs, *constants, implementation="triton")
    assert [x.dtype for x in fast[-len(inputs):]] == [x.dtype for x in inputs]
    assert name.endswith("coefficients") or fast[0].dtype == torch.bfloat16
    for expected, actual in zip(exact, fast, strict=True):
        cut = 2**-7 if actual.dtype == torch.bfloat16 else 0  # the interpreter cuts off what a GPU rounds
        assert ((actual - expected).abs() <= cut * expected.abs() + 2e-5 * max(1.0, expected.abs().max())).all()


@pytest.mark.parametrize("view", [
    lambda x: x[:, :, :1].expand(-1, -1, 4, -1),  # the embedding, copied to the streams
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
], ids=["expanded", "transposed", "strided"])
@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_first_tensor_does_not_matter(name, view):
    operator, (first, *rest), constants = problem(name, 2, 3, 4, 8)
    expected, actual = (values_and_gradients(operator, [x, *rest], *constants, implementation="triton")
                        for x in (view(first).contiguous(), view(first)))
    assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_arrive_expanded_are_read_correctly(name):
    operator, inputs, constants = problem(name, 2, 3, 4, 8)
    gradients = []
    for implementation in ("definition", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with ops.using(implementation):
            outputs = operator(*leaves, *constants)
        gradients.append(torch.autograd.grad(sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,))), leaves))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name):
    operator, inputs, constants = problem(name, 1, 35, 4, 16)
    first, second = (values_and_gradients(operator, inputs, *constants, implementation="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", NAMES)
def test_a_token_alone_gives_the_same_bits(name):
    operator, inputs, constants = problem(name, 1, 34, 4, 16)
    with ops.using("triton"), torch.no_grad():
        together = operator(*inputs, *constants)
        alone = operator(*(x[:, 33:] if x.dim() > 2 else x for x in inputs), *constants)
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (together, alone)), strict=True):
        assert torch.equal(x[:, 33:], y)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_nothing(name):
    operator, inputs, constants = problem(name, 2, 0, 4, 8)
    for leaf_or_value in values_and_gradients(operator, inputs, *constants, implementation="triton"):
        assert leaf_or_value.count_nonzero() == 0


def test_what_kernels_do_not_take_is_left_to_the_definition():
    X, *parameters = coefficient_inputs(1, 2, 4, 8)
    assert ops.stream_coefficients.choose(X, *parameters, ITERATIONS, EPS, NORM_EPS)[0] == "cpu"  # nobody asked for the interpreter
    with ops.using("triton"):
        assert ops.stream_coefficients.choose(X.double(), *parameters, ITERATIONS, EPS, NORM_EPS)[0] == "definition"
        assert ops.stream_coefficients.choose(X, *parameters, ITERATIONS, 0.0, NORM_EPS)[0] == "definition"
        assert ops.sinkhorn.choose(random(1, 2, 4, 4, seed=0).bfloat16(), ITERATIONS, EPS)[0] == "definition"
        assert ops.streams_out.choose(*mixing_inputs(1, 2, 9, 8))[0] == "definition"
