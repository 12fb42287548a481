"""Hyper-connections in C with gradients, against the definitions in float64."""

import pytest
import torch

from fathom import ops
from fathom.ops.native.library import library
from fathom.ops.native.tiles import in_tiles
from tests.ops.test_streams import EPS, ITERATIONS, NORM_EPS, SHAPES, coefficient_inputs, mixing_inputs, random, values_and_gradients
from tests.ops.test_streams import assert_as_defined as is_defined

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
CONSTANTS = ITERATIONS, EPS, NORM_EPS
AWKWARD = [*SHAPES, (2, 37, 4, 19), (3, 5, 3, 33), (1, 17, 8, 16), (1, 100, 4, 192), (2, 8, 4, 64), (2, 70, 3, 32)]


def collapse_inputs(*shape):
    """X and the weights of its streams."""
    X, _, post, _ = mixing_inputs(*shape)
    return [X, post]


OPERATORS = [(ops.open_streams, coefficient_inputs, CONSTANTS), (ops.streams_in, collapse_inputs, ()), (ops.streams_out, mixing_inputs, ())]
each_operator = pytest.mark.parametrize(("operator", "inputs", "constants"), OPERATORS, ids=["open", "in", "out"])


@each_operator
@pytest.mark.parametrize("shape", AWKWARD)
def test_values_and_gradients_are_the_definitions(shape, operator, inputs, constants):
    is_defined(operator, inputs(*shape), *constants, implementation="native")


@pytest.mark.parametrize("iterations", [1, 2, 3, 200])
def test_any_number_of_divisions_is_the_definition(iterations):
    is_defined(ops.open_streams, coefficient_inputs(2, 11, 4, 8), iterations, EPS, NORM_EPS, implementation="native")


def test_coefficients_that_saturate_keep_their_precision():
    for size in (3.0, 30.0):
        is_defined(ops.open_streams, coefficient_inputs(2, 20, 4, 16, size=size), *CONSTANTS, rounding=2e-4, implementation="native")


def test_vanishing_streams_are_the_definition_and_zeros_give_numbers():
    X, *parameters = coefficient_inputs(2, 3, 4, 8)
    is_defined(ops.open_streams, [X * 1e-3, *parameters], *CONSTANTS, rounding=1e-4, implementation="native")
    assert all(x.isfinite().all() for x in values_and_gradients(ops.open_streams, [X * 0, *parameters], *CONSTANTS, implementation="native"))


@each_operator
def test_the_same_bits_twice_and_with_any_number_of_threads(operator, inputs, constants):
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            found.append(values_and_gradients(operator, inputs(3, 70, 4, 96), *constants, implementation="native"))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    if operator is not ops.open_streams or in_tiles(torch.float32):  # elsewhere its products are oneDNN's
        assert all(map(torch.equal, found[0], found[2]))


def test_a_token_is_the_same_whatever_is_beside_it():
    X, *parameters = coefficient_inputs(1, 100, 4, 32)
    with torch.no_grad(), ops.using("native"):
        together = ops.open_streams(X, *parameters, *CONSTANTS)
        others = ops.open_streams(torch.cat([X[:, 20:], random(1, 60, 4, 32, seed=7) * 100], 1), *parameters, *CONSTANTS)
    for one, other in zip(together, others, strict=True):
        assert torch.equal(one[:, 20:], other[:, :80])


def test_with_and_without_gradients_the_numbers_are_the_same():
    inputs = coefficient_inputs(2, 50, 4, 32)
    with torch.no_grad():
        assert ops.open_streams.choose(*inputs, *CONSTANTS)[0] == "native"
        plain = ops.open_streams(*inputs, *CONSTANTS)
    traced = ops.open_streams(*[x.requires_grad_() for x in inputs], *CONSTANTS)
    assert all(map(torch.equal, plain, traced)) and not plain[0].requires_grad


@pytest.mark.parametrize("view", [
    lambda x: x[:, :, :1].expand(-1, -1, 4, -1), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.repeat_interleave(2, -1)[..., ::2],
], ids=["expanded", "transposed", "strided"])
def test_layouts_do_not_matter_of_streams_nor_of_gradients(view):
    for operator, inputs, constants in OPERATORS:
        gradients = []
        for implementation in ("definition", "native"):
            leaf, *rest = (x.requires_grad_() for x in inputs(2, 3, 4, 8))
            with ops.using(implementation):
                outputs = operator(view(leaf), *rest, *constants)
            total = sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))  # gradients that arrive expanded
            gradients.append(torch.autograd.grad(total, [leaf, *rest]))
        for expected, found in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_the_kernels_do_not_take_is_left_to_others():
    X, *parameters = coefficient_inputs(1, 100, 4, 8)
    assert ops.open_streams.choose(X, *parameters, *CONSTANTS)[0] == "native"
    assert ops.open_streams.choose(X, *parameters, ITERATIONS, 0.0, NORM_EPS)[0] != "native"
    assert ops.open_streams.choose(X, *parameters, 300, EPS, NORM_EPS)[0] != "native"  # what it keeps would not fit a thread's stack
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in (X, *parameters)]
        assert ops.open_streams.choose(*leaves, *CONSTANTS)[0] != "native"
        for operator, inputs in ((ops.streams_in, collapse_inputs), (ops.streams_out, mixing_inputs)):
            assert operator.choose(*[x.to(dtype).requires_grad_() for x in inputs(1, 5, 4, 8)])[0] != "native"
    assert ops.open_streams.choose(X[:, :0], *parameters, *CONSTANTS)[0] != "native"


@pytest.mark.parametrize(("rows", "tokens"), [(1, 65), (2, 128), (1, 257), (2, 350)])
def test_many_bfloat16_tokens_open_as_the_definition_says(rows, tokens):
    X, *parameters = coefficient_inputs(rows, tokens, 4, 48)
    X = X.bfloat16()
    with torch.no_grad(), ops.using("native"):
        assert ops.open_streams.choose(X, *parameters, *CONSTANTS)[0] == "native"
        out, *coefficients = ops.open_streams(X, *parameters, *CONSTANTS)
    with torch.no_grad(), ops.using("definition"):
        exact = ops.open_streams(X.double(), *(each.double() for each in parameters), *CONSTANTS)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), exact[0], rtol=2**-7, atol=1e-4)
    for found, expected in zip(coefficients, exact[1:], strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
