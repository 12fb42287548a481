"""Hyper-connections: the definitions' gradients and properties, and the CPU implementations against them."""

import pytest
import torch

import fathom.ops.cpu.streams  # noqa: F401  (registers the implementations)
from fathom import ops
from fathom.ops.cpu import streams as cpu

ITERATIONS, EPS, NORM_EPS = 20, 1e-6, 1e-6
SHAPES = [(1, 1, 1, 5), (1, 1, 4, 8), (2, 3, 2, 7), (3, 5, 4, 16), (1, 9, 8, 3), (2, 700, 4, 8)]  # B, S, N, W


@pytest.fixture(autouse=True)
def without_native_kernels(monkeypatch):
    """These tests are about the implementations in PyTorch, which do all the work where there is no C compiler."""
    monkeypatch.setattr("fathom.ops.native.library.library", lambda: None)
    monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda: 0)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coefficient_inputs(B, S, N, W, dtype=torch.float32, size=1.0):
    """X, fn, base, scale with coefficients far from saturation for size 1."""
    rows = (2 + N) * N
    return [random(B, S, N, W, seed=1, dtype=dtype), random(rows, N * W, seed=2, dtype=dtype) * (N * W) ** -0.5 * size,
            random(rows, seed=3, dtype=dtype) * 0.7 * size, 1 + 0.3 * random(3, seed=4, dtype=dtype)]


def mixing_inputs(B, S, N, W, dtype=torch.float32):
    """X, y, post, res."""
    return [random(*shape, seed=seed, dtype=dtype)
            for seed, shape in enumerate([(B, S, N, W), (B, S, W), (B, S, N), (B, S, N, N)])]


def values_and_gradients(operator, inputs, *constants, implementation):
    """Outputs, and the gradients of a fixed random combination of them, with weights exact in bfloat16, with respect to every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with ops.using(implementation):
        assert operator.choose(*leaves, *constants)[0] == implementation
        outputs = operator(*leaves, *constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [random(*x.shape, seed=9 + i).bfloat16().to(x.dtype) for i, x in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_as_defined(operator, inputs, *constants, rounding=2e-5, implementation="cpu"):
    """An implementation in float32 against the definition in float64, relative to each tensor's largest entry."""
    exact = values_and_gradients(operator, [x.double() for x in inputs], *constants, implementation="definition")
    fast = values_and_gradients(operator, inputs, *constants, implementation=implementation)
    for expected, actual in zip(exact, fast, strict=True):
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        assert (actual - expected).abs().max() <= rounding * max(1.0, expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_sinkhorn_on_cpu_is_the_definition(shape):
    B, S, N, _ = shape
    assert_as_defined(ops.sinkhorn, [random(B, S, N, N, seed=0)], ITERATIONS, EPS)
    assert_as_defined(ops.sinkhorn, [random(B, S, N, N, seed=0)], 1, EPS)


def test_sinkhorn_on_cpu_keeps_its_precision_for_extreme_logits():
    logits = (random(4, 50, 4, 4, seed=0) > 0) * 16.0 - 8
    assert_as_defined(ops.sinkhorn, [logits], ITERATIONS, EPS)
    assert_as_defined(ops.sinkhorn, [logits * 10], ITERATIONS, EPS, rounding=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_on_cpu_are_the_definition(shape):
    assert_as_defined(ops.stream_coefficients, coefficient_inputs(*shape), ITERATIONS, EPS, NORM_EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_mixing_out_on_cpu_is_the_definition(shape):
    assert_as_defined(ops.streams_out, mixing_inputs(*shape))


def test_coefficients_of_vanishing_streams_are_the_definition():
    X, *parameters = coefficient_inputs(2, 3, 4, 8)
    assert_as_defined(ops.stream_coefficients, [X * 1e-3, *parameters], ITERATIONS, EPS, NORM_EPS, rounding=1e-4)
    zero = values_and_gradients(
        ops.stream_coefficients, [X * 0, *parameters], ITERATIONS, EPS, NORM_EPS, implementation="cpu")
    assert all(x.isfinite().all() for x in zero)


@pytest.mark.parametrize("view", [
    lambda x: x[:, :, :1].expand(-1, -1, 4, -1),  # the embedding, copied to the streams
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
], ids=["expanded", "transposed", "strided"])
def test_layout_of_the_streams_does_not_matter(view):
    X, *parameters = coefficient_inputs(2, 3, 4, 8)
    _, y, post, res = mixing_inputs(2, 3, 4, 8)
    for operator, rest in ((ops.stream_coefficients, [*parameters, ITERATIONS, EPS, NORM_EPS]),
                           (ops.streams_out, [y, post, res])):
        gradients, outputs = [], []
        for implementation in ("definition", "cpu"):
            leaf = X.clone().requires_grad_()
            with ops.using(implementation):
                out = operator(view(leaf), *rest)
            outputs.append(torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))]))
            gradients.append(torch.autograd.grad((outputs[-1] * random(len(outputs[-1]), seed=5)).sum(), leaf)[0])
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


def test_gradients_that_arrive_expanded_are_read_correctly():
    gradients = []
    for implementation in ("definition", "cpu"):
        leaves = [x.requires_grad_() for x in mixing_inputs(2, 3, 4, 8)]
        with ops.using(implementation):
            gradients.append(torch.autograd.grad(ops.streams_out(*leaves).sum(), leaves))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("operator", "inputs", "constants"), [
    (ops.sinkhorn, lambda: [random(3, 70, 4, 4, seed=0)], (ITERATIONS, EPS)),
    (ops.stream_coefficients, lambda: coefficient_inputs(3, 70, 4, 16), (ITERATIONS, EPS, NORM_EPS)),
    (ops.streams_out, lambda: mixing_inputs(3, 70, 4, 16), ()),
], ids=["sinkhorn", "stream_coefficients", "streams_out"])
def test_two_runs_give_the_same_bits(operator, inputs, constants):
    first, second = (values_and_gradients(operator, inputs(), *constants, implementation="cpu") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_coefficients_without_gradients_are_the_same_numbers():
    inputs = coefficient_inputs(2, 5, 4, 8)
    with torch.no_grad():
        plain = ops.stream_coefficients(*inputs, ITERATIONS, EPS, NORM_EPS)
    traced = ops.stream_coefficients(*[x.requires_grad_() for x in inputs], ITERATIONS, EPS, NORM_EPS)
    assert all(map(torch.equal, plain, traced)) and not plain[0].requires_grad


def test_float64_and_gradients_in_bfloat16_use_the_definition():
    X, *parameters = coefficient_inputs(1, 2, 4, 8)
    narrow = [X.bfloat16(), *[x.bfloat16().requires_grad_() for x in parameters]]
    for inputs in ([X.double(), *parameters], narrow):
        assert ops.stream_coefficients.choose(*inputs, ITERATIONS, EPS, NORM_EPS)[0] == "definition"
    assert ops.streams_out.choose(*[x.double() for x in mixing_inputs(1, 2, 4, 8)])[0] == "definition"
    assert ops.streams_out.choose(*[x.bfloat16().requires_grad_() for x in mixing_inputs(1, 2, 4, 8)])[0] == "definition"
    for dtype in (torch.float64, torch.bfloat16):
        assert ops.sinkhorn.choose(random(1, 2, 4, 4, seed=0).to(dtype), ITERATIONS, EPS)[0] == "definition"


@pytest.mark.parametrize("shape", [*SHAPES, (1, 700, 4, 128)])
@torch.no_grad()
def test_bfloat16_streams_on_cpu_are_the_definition_before_the_last_rounding(shape, monkeypatch):
    monkeypatch.setattr(cpu, "_GROUP", 1 << 12)  # several groups of tokens
    X, y, *rest = (x.bfloat16() for x in (*mixing_inputs(*shape)[:2], *coefficient_inputs(*shape)[1:]))
    inputs = X, *rest, ITERATIONS, EPS, NORM_EPS
    assert ops.stream_coefficients.choose(*inputs)[0] == "cpu"
    coefficients = ops.stream_coefficients(*inputs)
    for found, expected in zip(coefficients, ops.stream_coefficients.definition(*inputs), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pre, post, res = coefficients
    for operator, arguments in ((ops.streams_in, (X, pre)), (ops.streams_out, (X, y, post, res))):
        assert operator.choose(*arguments)[0] == "cpu"
        found, expected = operator(*arguments), operator.definition(*arguments)
        assert found.dtype == torch.bfloat16 and torch.equal(found, operator(*arguments))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=2**-7)  # neighbours in bfloat16 at most


def test_zero_eps_uses_the_definition():
    logits = torch.tensor([[[[200.0, 0.0], [0.0, 200.0]]]], requires_grad=True)
    assert ops.sinkhorn.choose(logits, ITERATIONS, 0.0)[0] == "definition"
    assert torch.autograd.grad(ops.sinkhorn(logits, ITERATIONS, 0.0)[0, 0, 0, 0], logits)[0].isfinite().all()


def gradcheck(operator, inputs, *constants):
    leaves = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.gradcheck(lambda *x: operator.definition(*x, *constants), leaves)


def test_definitions_have_the_gradients_of_their_values():
    shape = (1, 2, 3, 4)
    X, fn, base, scale = coefficient_inputs(*shape)
    _, y, post, res = mixing_inputs(*shape)
    assert gradcheck(ops.sinkhorn, [res], 4, EPS)
    assert gradcheck(ops.stream_coefficients, [X, fn, base, scale], 4, EPS, NORM_EPS)
    assert gradcheck(ops.collapse_coefficients, [X, fn[:3], base[:3], scale[:1]], EPS, NORM_EPS)
    assert gradcheck(ops.streams_in, [X, post])
    assert gradcheck(ops.streams_out, [X, y, post, res])


def test_coefficients_follow_the_report_token_by_token():
    B, S, N, W = 2, 3, 4, 8
    X, fn, base, scale = coefficient_inputs(B, S, N, W, dtype=torch.float64)
    pre, post, res = ops.stream_coefficients(X, fn, base, scale, ITERATIONS, EPS, NORM_EPS)
    x = X[1, 2].flatten()
    mix = fn @ (x / (x.square().mean() + NORM_EPS).sqrt())
    torch.testing.assert_close(pre[1, 2], torch.sigmoid(mix[:N] * scale[0] + base[:N]) + EPS)
    torch.testing.assert_close(post[1, 2], 2 * torch.sigmoid(mix[N:2 * N] * scale[1] + base[N:2 * N]))
    matrix = (mix[2 * N:] * scale[2] + base[2 * N:]).view(N, N).softmax(1) + EPS
    matrix = matrix / (matrix.sum(0) + EPS)
    for _ in range(ITERATIONS - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + EPS)
        matrix = matrix / (matrix.sum(0) + EPS)
    torch.testing.assert_close(res[1, 2], matrix)
    y = random(W, seed=6, dtype=torch.float64)
    out = ops.streams_out(X, y.expand(B, S, W), post, res)[1, 2]
    for k in range(N):
        torch.testing.assert_close(out[k], post[1, 2, k] * y + sum(res[1, 2, j, k] * X[1, 2, j] for j in range(N)))


@pytest.mark.parametrize("implementation", ["definition", "cpu"])
@pytest.mark.parametrize("N", [1, 2, 4, 8])
def test_sinkhorn_of_moderate_logits_is_doubly_stochastic_and_never_expands(N, implementation):
    with ops.using(implementation):
        matrix = ops.sinkhorn(0.5 * random(2, 500, N, N, seed=N), ITERATIONS, EPS)
    assert (matrix > 0).all()
    assert (matrix.sum(-1) - 1).abs().max() < 1e-4 and (matrix.sum(-2) - 1).abs().max() < 1e-4
    assert torch.linalg.matrix_norm(matrix, 2).max() <= 1 + 1e-4


@pytest.mark.parametrize("implementation", ["definition", "cpu"])
@pytest.mark.parametrize("N", [2, 4, 8])
def test_sinkhorn_of_extreme_logits_keeps_its_columns_and_approaches_its_rows(N, implementation):
    logits = 16 * torch.rand(1, 100, N, N, generator=torch.Generator().manual_seed(N)) - 8
    with ops.using(implementation):
        released, long = (ops.sinkhorn(logits, iterations, EPS) for iterations in (ITERATIONS, 2000))
    for matrix in (released, long):
        assert matrix.isfinite().all() and (matrix.sum(-2) - 1).abs().max() < 1e-4
    # 20 iterations leave rows up to 15% off, hence a norm up to sqrt(1.15): convergence slows near permutations.
    assert (released.sum(-1) - 1).abs().max() < 0.15 and torch.linalg.matrix_norm(released, 2).max() < 1.15 ** 0.5
    assert (long.sum(-1) - 1).abs().max() < 1e-3 and torch.linalg.matrix_norm(long, 2).max() <= 1 + 1e-4
