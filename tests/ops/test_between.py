"""What lies between products of many tokens, in C: each kernel against its definition in float64, and the operators that use them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fathom import ops
from fathom.ops.attention import Entries, Window, attended_entries, attention, column_gradients, column_probabilities, entry_mass, window_keys
from fathom.ops.cpu.attention import attention_cpu, entry_mass_cpu
from fathom.ops.cpu.experts import routed_experts_cpu
from fathom.ops.cpu.selected_attention import attention_gathered
from fathom.ops.experts import expert_hidden, expert_hidden_gradients, routed_experts, sum_rows
from fathom.ops.native.library import library
from tests.ops import test_experts
from tests.ops.test_attention import CASES, CLOSE, SELECTING, cast, every_case, values_and_gradients
from tests.ops.test_compress import whole_blocks
from tests.ops.test_native import DTYPES, ROUNDING, native, random
from tests.ops.test_streams import values_and_gradients as outputs_and_gradients

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def copies(arguments):
    """For operators that take what they are given for their result."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def several(found):
    return found if isinstance(found, tuple) else (found,)


def assert_as_defined(operator, *arguments, dtype=None):
    """Within a rounding of the definition in float64, and the same bits twice and with any number of threads."""
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    found, expected = several(native(operator, *copies(arguments))), several(operator.definition(*copies(exact)))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and (dtype is None or one.dtype == dtype)
        torch.testing.assert_close(one.double(), other.double(), atol=ROUNDING[one.dtype] * max(1.0, float(other.abs().max())), rtol=0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, found, several(native(operator, *copies(arguments)))))
    finally:
        torch.set_num_threads(before)
    return found


def columns(arguments, dtype, own=False):
    """Arguments of `column_probabilities` for all queries of a case; with `own` columns for each query's selected entries."""
    q, window, entries, sink = arguments
    far = 0 if entries is None else entries.selected_BSK.shape[2] if own else entries.kv_BMD.shape[1]
    if own:
        entries = Entries(None, None, None, entries.selected_BSK)
    B, S, H, _ = q.shape
    return random(B, S, H, window.kv_BTD.shape[1] + far + 5, dtype=dtype) * 4, window, entries, sink.to(torch.float32), 0.3


@each_dtype
@every_case
def test_probabilities_are_the_definition(arguments, dtype):
    inputs = columns(arguments, dtype)
    for made in {dtype, torch.float32}:
        found, = assert_as_defined(column_probabilities, *inputs, made, dtype=made)
    hidden = ~window_keys(inputs[1])
    if inputs[2] is not None:
        hidden = torch.cat([hidden, ~attended_entries(inputs[2])], 2)
    assert (found[..., :hidden.shape[2]].transpose(2, 3)[hidden] == 0).all() and (found[..., hidden.shape[2]:-1] == 0).all()


@each_dtype
@pytest.mark.parametrize("arguments", SELECTING.values(), ids=SELECTING.keys())
def test_probabilities_of_each_querys_own_entries_are_the_definition(arguments, dtype):
    assert_as_defined(column_probabilities, *columns(arguments, dtype, own=True), dtype, dtype=dtype)


def test_what_is_unseen_may_be_anything():
    score, *others = columns(CASES["packed, selected"], torch.float32)
    window, entries = others[:2]
    seen = torch.cat([window_keys(window), attended_entries(entries)], 2)
    hidden = torch.ones(*score.shape[:2], score.shape[3], dtype=torch.bool)
    hidden[..., :seen.shape[2]] = ~seen
    expected = native(column_probabilities, score.clone(), *others, torch.float32)
    for nonsense in (float("nan"), float("inf"), -float("inf"), 1e30):
        other = score.masked_fill(hidden[:, :, None], nonsense)
        assert torch.equal(native(column_probabilities, other, *others, torch.float32), expected)


def test_nothing_is_left_beside_what_overwhelms_it():
    score, window, entries, sink, scale = columns(CASES["packed"], torch.float32)
    nothing = native(column_probabilities, score.clone(), window, entries, sink + 1e4, scale, torch.float32)
    assert (nothing[..., :-1] == 0).all() and (nothing[..., -1] == 1).all()
    everything = native(column_probabilities, score.clone(), window, entries, sink - 1e4, scale, torch.float32)
    assert (everything[..., -1] == 0).all()
    torch.testing.assert_close(everything.sum(-1), torch.ones(score.shape[:3]))
    large = native(column_probabilities, score * 1e4, window, entries, sink, scale, torch.float32)
    torch.testing.assert_close(large.sum(-1), torch.ones(score.shape[:3]))


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 16), (1, 70, 33), (3, 5, 192)])
def test_gradients_of_the_products_are_the_definition(shape, dtype):
    probability = (random(*shape, seed=1) * 3).softmax(-1)
    grad, sink = assert_as_defined(column_gradients, random(*shape, dtype=dtype), probability, 0.25)
    assert grad.dtype == dtype and sink.dtype == torch.float32


@every_case
def test_attention_and_its_gradients_are_the_definition(arguments):
    with torch.enable_grad():
        expected = values_and_gradients(attention.definition, cast(arguments, torch.float64))
        found = values_and_gradients(attention_cpu, cast(arguments, torch.float32))
        again = values_and_gradients(attention_cpu, cast(arguments, torch.float32))
        narrow = cast(arguments, torch.bfloat16)
        exact = values_and_gradients(attention.definition, cast(narrow, torch.float64))
        rounded = values_and_gradients(attention_cpu, narrow)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, **CLOSE)
    assert all(map(torch.equal, found, again))
    for x, y in zip(rounded[1:], exact[1:], strict=True):
        assert x.dtype == torch.bfloat16 and (x.double() - y).norm() <= 0.015 * y.norm() + 1e-6


@every_case
def test_inference_is_the_definition(arguments):
    narrow = cast(arguments, torch.bfloat16)
    torch.testing.assert_close(attention_cpu(*narrow), attention.definition(*narrow), atol=0.03, rtol=0.02)
    if arguments[2] is not None:
        torch.testing.assert_close(entry_mass_cpu(*cast(arguments, torch.float32)).double(), entry_mass.definition(*arguments), **CLOSE)


@pytest.mark.parametrize("arguments", SELECTING.values(), ids=SELECTING.keys())
def test_gathered_attention_is_the_definition(arguments):
    half, narrow = cast(arguments, torch.float32), cast(arguments, torch.bfloat16)
    torch.testing.assert_close(attention_gathered(*half).double(), attention.definition(*arguments), **CLOSE)
    torch.testing.assert_close(attention_gathered(*narrow), attention.definition(*narrow), atol=0.03, rtol=0.02)


def test_what_an_unseen_key_holds_changes_no_bit():
    q, window, entries, sink = cast(CASES["window 20, 65 tokens"], torch.float32)
    changed, more = window.kv_BTD.clone(), entries.kv_BMD.clone()
    changed[:, 40:], more[:, 10:] = 1e4, 1e4
    found = attention_cpu(q, window, entries, sink)
    other = attention_cpu(q, Window(changed, *window[1:]), entries._replace(kv_BMD=more), sink)
    assert torch.equal(found[:, :40], other[:, :40]) and not torch.equal(found, other)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (70, 33), (2, 5, 192), (700, 100)])
def test_an_experts_activation_is_the_definition(shape, dtype):
    gate, up, weight = random(*shape, dtype=dtype) * 4, random(*shape, seed=1, dtype=dtype) * 4, random(*shape[:-1], 1, seed=2).abs()
    for by in (None, weight):
        for made in {dtype, torch.float32}:
            assert_as_defined(expert_hidden, gate, up, by, 2.5, made, dtype=made)
    extreme = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, float("inf")]])
    torch.testing.assert_close(native(expert_hidden, extreme, extreme.flip(1), None, 10.0, torch.float32),
                               expert_hidden.definition(extreme, extreme.flip(1), None, 10.0, torch.float32))


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (70, 33), (300, 100)])
def test_an_activations_gradients_are_the_definition(shape, dtype):
    gate, up, grad = (random(*shape, seed=seed, dtype=dtype) * 4 for seed in range(3))
    weight = random(shape[0], 1, seed=3).abs()
    *found, weight_grad = assert_as_defined(expert_hidden_gradients, gate, up, weight, grad, 2.5)
    assert all(x.dtype == dtype for x in found) and weight_grad.dtype == torch.float32
    hidden = expert_hidden.definition(gate, up, weight, 2.5, dtype)
    torch.testing.assert_close(found[0], hidden, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


def test_the_definition_of_an_activations_gradients_is_what_autograd_finds():
    gate, up, grad = (random(9, 7, seed=seed).double() * 3 for seed in range(3))
    weight = random(9, 1, seed=3).double()
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in (gate, up, weight)]
        out = expert_hidden.definition(*leaves, 2.5, torch.float64)
        expected = torch.autograd.grad(out, leaves, grad)
    hidden, gate_grad, up_grad, weight_grad = expert_hidden_gradients.definition(gate, up, weight, grad, 2.5)
    for one, other in zip((hidden, gate_grad, up_grad, weight_grad[:, None]), (out, *expected), strict=True):
        torch.testing.assert_close(one, other)


@each_dtype
@pytest.mark.parametrize("tokens, experts, chosen", [(70, 8, 3), (200, 4, 2)])
def test_many_tokens_experts_are_the_definition(tokens, experts, chosen, dtype):
    x, expert, weight, *matrices = test_experts.problem(tokens, experts, chosen, width=40, hidden=24)
    x, matrices = x.to(dtype), [(matrix / 6).to(dtype) for matrix in matrices]
    exact = routed_experts.definition(x.double(), expert, weight.double(), *(matrix.double() for matrix in matrices), 2.5)
    found = routed_experts_cpu(x, expert, weight, *matrices, 2.5)
    torch.testing.assert_close(found.double(), exact, atol=20 * ROUNDING[dtype], rtol=20 * ROUNDING[dtype])
    assert torch.equal(found, routed_experts_cpu(x, expert, weight, *matrices, 2.5))


@each_dtype
@pytest.mark.parametrize("rows, chosen, width", [(1, 1, 1), (9, 3, 17), (300, 4, 64)])
def test_sums_of_rows_are_the_definition(rows, chosen, width, dtype):
    place = torch.randperm(rows * chosen, generator=torch.Generator().manual_seed(0)).view(rows, chosen)
    assert_as_defined(sum_rows, random(rows * chosen, width, dtype=dtype), place, dtype=torch.float32)


@pytest.mark.parametrize(("ratio", "overlap", "D"), [(4, True, 6), (3, True, 33), (128, False, 16), (5, False, 40)])
def test_pooling_is_the_definition_wherever_values_and_scores_lie(ratio, overlap, D):
    tokens, C = 3 * ratio + 2, 2 * D if overlap else D
    raw = random(2, tokens, 2 * C) * 3
    indices = whole_blocks(2, tokens, ratio, overlap)
    found, = assert_as_defined(ops.pool_blocks, *raw.chunk(2, -1), *indices, dtype=torch.float32)
    assert torch.equal(found, native(ops.pool_blocks, *(x.contiguous() for x in raw.chunk(2, -1)), *indices))
    alone = [None if x is None else x[1:2] for x in indices]
    assert torch.equal(found[1:2], native(ops.pool_blocks, *raw.chunk(2, -1), *alone))


@pytest.mark.parametrize(("ratio", "overlap", "D"), [(4, True, 6), (3, True, 33), (128, False, 16), (5, False, 40)])
def test_pooling_has_the_definitions_gradients(ratio, overlap, D):
    tokens, C = 3 * ratio + 2, 2 * D if overlap else D
    raw, indices, grad = random(2, tokens, 2 * C) * 3, whole_blocks(2, tokens, ratio, overlap), random(6, D, seed=1)
    with torch.enable_grad():
        raw, exact = raw.requires_grad_(), raw.detach().double().requires_grad_()
        for value, score in (raw.chunk(2, -1), [x.contiguous() for x in raw.chunk(2, -1)], [raw[..., :C].contiguous(), raw[..., C:]]):
            with ops.using("native"):
                assert ops.pool_blocks.choose(value, score, *indices)[0] == "native"
                found = torch.autograd.grad(ops.pool_blocks(value, score, *indices), raw, grad)[0]
            expected = torch.autograd.grad(ops.pool_blocks.definition(*exact.chunk(2, -1), *indices), exact, grad.double())[0]
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def assert_gradients_as_defined(operator, leaves, *constants, exact_constants=None):
    """Values and gradients in float32 against the definition's in float64; the same bits twice and with any number of threads."""
    with torch.enable_grad():
        expected = outputs_and_gradients(operator, [x.double() for x in leaves], *(exact_constants or constants), implementation="definition")
        found = outputs_and_gradients(operator, leaves, *constants, implementation="native")
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, found, outputs_and_gradients(operator, leaves, *constants, implementation="native")))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 64), (2, 70, 33), (130, 4, 16)])
def test_norms_have_the_definitions_gradients(shape):
    assert_gradients_as_defined(ops.rms_normalise, [random(*shape) * 3], 1e-6)
    with torch.enable_grad():
        x, weight = random(*shape).requires_grad_(), random(shape[-1], seed=1).requires_grad_()
        grad = random(*shape, seed=2)
        with ops.using("native"):
            assert ops.rms_normalise.choose(x, 1e-6, weight)[0] == "native"
            found = torch.autograd.grad(ops.rms_normalise(x, 1e-6, weight), [x, weight], grad)
        wide = [each.detach().double().requires_grad_() for each in (x, weight)]
        expected = torch.autograd.grad(ops.rms_normalise.definition(wide[0], 1e-6, wide[1]), wide, grad.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape, turns", [((2, 3, 8), (2, 3, 2)), ((2, 3, 5, 10), (2, 3, 1, 4)), ((4, 16), (4, 8)), ((1, 1, 2, 4), (1, 1, 1, 1))])
def test_rotations_have_the_definitions_gradients(shape, turns, inverse):
    turn = torch.polar(torch.ones(turns), random(*turns))
    assert_gradients_as_defined(ops.rotate, [random(*shape)], turn, inverse, exact_constants=(turn.to(torch.complex128), inverse))


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 70, 33)])
def test_activations_without_weights_have_the_definitions_gradients(shape):
    gate, up = random(*shape, seed=4) * 3, random(*shape, seed=5) * 3
    with torch.enable_grad():
        leaves, exact = [gate.requires_grad_(), up.requires_grad_()], [x.detach().double().requires_grad_() for x in (gate, up)]
        grad = random(*shape, seed=6)
        with ops.using("native"):
            assert expert_hidden.choose(*leaves, None, 2.5, torch.float32)[0] == "native"
            out = expert_hidden(*leaves, None, 2.5, torch.float32)
        found = [out, *torch.autograd.grad(out, leaves, grad)]
        plain = expert_hidden.definition(*exact, None, 2.5, torch.float64)
        expected = [plain, *torch.autograd.grad(plain, exact, grad.double())]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wider", [False, True], ids=["MKL", "oneDNN"])
def test_many_tokens_experts_have_the_definitions_gradients_whoever_multiplies(wider, monkeypatch):
    monkeypatch.setattr("fathom.ops.cpu.products._WIDER_THAN_MKL", wider)
    x, expert, weight, *matrices = test_experts.problem(300, 5, 2, width=256, hidden=256)
    expert = expert % 4  # one expert is nobody's
    inputs, limit = [x, weight, *(matrix / 60 for matrix in matrices)], 2.5

    def values(operator, dtype):
        leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
        out = operator(leaves[0], expert, *leaves[1:], limit)
        return [out, *torch.autograd.grad(out, leaves, random(300, 256, seed=1).to(dtype))]

    with torch.enable_grad():
        found, expected = values(routed_experts_cpu, torch.float32), values(routed_experts.definition, torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 2e-5 * max(1.0, float(other.abs().max()))
    assert (found[3][4] == 0).all()


def test_gradients_are_the_same_where_a_block_is_computed_anew():
    """Which gives saved tensors only once."""
    turn = torch.polar(torch.ones(1, 8, 2), random(1, 8, 2))
    indices = whole_blocks(1, 8, 4, True)
    functions = [lambda x: ops.rms_normalise(x, 1e-6, x[0, 0]), lambda x: ops.rotate(x, turn), lambda x: ops.pool_blocks(x, x * 2, *indices),
                 lambda x: expert_hidden(x, x + 1, None, 2.0, torch.float32), lambda x: ops.streams_in(x.view(1, 4, 2, 6), x.view(-1)[:8].view(1, 4, 2))]
    for function in functions:
        with torch.enable_grad():
            x = random(1, 8, 6).requires_grad_()
            plain = torch.autograd.grad(function(x).square().sum(), x)[0]
            again = torch.autograd.grad(checkpoint(function, x, use_reentrant=False).square().sum(), x)[0]
        assert torch.equal(plain, again)
