"""The kernels in C against the definitions in float64; a token's bits whatever is beside it; and what happens where nothing can be compiled."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import ops
from fathom.ops.native.library import library
from fathom.ops.rounding import EXACT, ReleasedRounding
from fathom.quant.formats import E8M0, Packed, dequantise
from tests.models import random_model, random_tokens, small_config
from tests.ops import test_attention, test_index_topk, test_linear, test_streams

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # relative to the largest number of a tensor


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def native(operator, *arguments):
    with ops.using("native"):
        assert operator.choose(*arguments)[0] == "native"
        return operator(*arguments)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_as_defined(operator, *arguments, rounding=None):
    """Within some roundings of the definition in float64, the same twice, and the same with two threads."""
    found, expected = native(operator, *arguments), operator.definition(*(wide(x) for x in arguments))
    for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True):
        assert one.shape == other.shape
        bound = (rounding or ROUNDING[one.dtype]) * max(1.0, float(other.abs().max()))
        assert (one.double() - other).abs().max() <= bound
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = native(operator, *arguments)
            assert all(torch.equal(one, other) for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, again)), strict=True))
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("matrix_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("O, I", [(300, 77), (64, 64), (1, 4096), (5000, 1), (17, 513), (512, 256)])
def test_a_product_of_few_rows_is_the_definition_and_a_row_is_the_same_alone(O, I, dtype, matrix_dtype):
    matrix = random(O, I, dtype=matrix_dtype)
    for rows in (1, 3, 4):
        assert_as_defined(ops.linear, random(rows, I, seed=rows, dtype=dtype), matrix, rounding=None if dtype == torch.bfloat16 else 4e-6)
    if matrix_dtype == torch.float32:
        x = random(8, I, dtype=dtype)
        together = native(ops.linear, x, matrix)
        assert torch.equal(together, torch.stack([native(ops.linear, row, matrix) for row in x]))
        assert torch.equal(together, native(ops.linear, x.view(2, 4, I), matrix).view(8, O))


@pytest.mark.parametrize("rows", [9, 40, 64])
def test_a_small_matrix_is_multiplied_with_more_rows_and_each_is_the_same_alone(rows):
    matrix, x = random(96, 200), random(rows, 200)
    together = assert_as_defined(ops.linear, x, matrix, rounding=4e-6)
    assert torch.equal(together, torch.stack([native(ops.linear, row, matrix) for row in x]))
    assert ops.linear.choose(random(9, 1024), random(1024, 1024))[0] != "native"


@pytest.mark.parametrize("kind, scale_dtype", [("fp8", E8M0), ("fp8", torch.float32), ("fp4", E8M0), ("fp4", torch.float32)])
@pytest.mark.parametrize("O, I", [(130, 34), (160, 96), (300, 512), (33, 4100), (128, 128)])
def test_packed_products_are_the_definition_and_a_row_is_the_same_alone(O, I, kind, scale_dtype):
    matrix = test_linear.packed(kind, scale_dtype, (O, I))
    together = native(ops.linear, random(6, I), matrix)
    test_linear.assert_is_product(together, random(6, I), dequantise(matrix).double())
    assert torch.equal(together, torch.stack([native(ops.linear, row, matrix) for row in random(6, I)]))
    rows = O // 32 * 32
    part = Packed(matrix.codes[:rows], matrix.scale[:rows if kind == "fp4" else -(-rows // 128)])
    x = random(3, 1, 2, I)
    torch.testing.assert_close(native(ops.grouped_linear, x, part), ops.grouped_linear.definition(x, part), rtol=1e-4, atol=1e-5 * float(together.abs().max()))


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_every_code_means_what_the_definition_says(kind):
    """A matrix of all codes under every scale that float32 holds, times one row of the identity after the other."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    bytes_ = bytes_[(bytes_ & 127) != 127].repeat(2)[:384] if kind == "fp8" else bytes_.repeat(2)
    for exponent in (0, 1, 60, 127, 200, 240):
        if kind == "fp8":
            matrix = Packed(bytes_.view(torch.float8_e4m3fn)[None, :].repeat(16, 1), torch.full((1, 3), exponent, dtype=torch.uint8).view(E8M0))
        else:
            matrix = Packed(bytes_.view(torch.int8)[None, :].repeat(16, 1), torch.full((16, 32), exponent, dtype=torch.uint8).view(E8M0))
        expected = dequantise(matrix)[0]
        for column in range(0, len(expected), 7):
            x = torch.zeros(1, len(expected))
            x[0, column] = 1
            assert native(ops.linear, x, matrix)[0, 0] == expected[column]


@pytest.mark.parametrize("rounding", [EXACT, ReleasedRounding(16)], ids=["exact", "as released"])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_packed_experts_are_the_definition(kind, rounding):
    E, F, W, N, K = 5, 96, 160, 7, 3
    matrices = [test_linear.packed(kind, E8M0, (E, *shape), seed, low=118, high=122) for seed, shape in enumerate([(F, W), (F, W), (W, F)])]
    generator = torch.Generator().manual_seed(0)
    expert = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(N)])
    arguments = random(N, W), expert, torch.rand(N, K, generator=generator), *matrices, 10.0, rounding
    found, expected = native(ops.routed_experts, *arguments), ops.routed_experts.definition(*arguments)
    size = float(expected.abs().max())
    close = (found - expected).abs() <= 1e-5 * size
    assert close.float().mean() > (0.99 if rounding is EXACT else 0.9) and (found - expected).abs().max() <= 0.05 * size  # a last bit may round to the next FP8 number
    alone = torch.cat([native(ops.routed_experts, arguments[0][n:n + 1], expert[n:n + 1], arguments[2][n:n + 1], *arguments[3:]) for n in range(N)])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("G, R, I, rows", [(2, 16, 200, 1), (3, 32, 100, 4), (1, 48, 128, 2)])
def test_grouped_products_are_the_definition(G, R, I, rows):
    assert_as_defined(ops.grouped_linear, random(rows, 1, G, I), random(G * R, I, seed=1))
    assert ops.grouped_linear.choose(random(1, 1, 2, 400), random(36, 400))[0] == "definition"  # groups of 18 rows would share a block of 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, experts, chosen, width, hidden", [
    (1, 1, 1, 5, 4), (1, 8, 3, 64, 32), (2, 8, 8, 33, 17), (9, 4, 2, 48, 100), (7, 64, 1, 16, 16), (60, 16, 4, 40, 24)])
def test_experts_are_the_definition_and_a_token_is_the_same_alone(tokens, experts, chosen, width, hidden, dtype):
    generator = torch.Generator().manual_seed(tokens)
    expert = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)])
    matrices = [random(experts, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(hidden, width), (hidden, width), (width, hidden)])]
    x, weight = random(tokens, width, seed=5, dtype=dtype), torch.rand(tokens, chosen, generator=generator)
    rounding = 4e-6 if dtype == torch.float32 else 8e-3  # of bfloat16, gate and up are rounded
    together = assert_as_defined(ops.routed_experts, x, expert, weight, *matrices, 2.0, rounding=rounding)  # clamps act on a part of these
    alone = torch.cat([native(ops.routed_experts, x[n:n + 1], expert[n:n + 1], weight[n:n + 1], *matrices, 2.0) for n in range(tokens)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("wrong", [-1, 4, 1 << 40])
def test_an_expert_that_does_not_exist_is_an_error_and_no_crash(wrong):
    matrices = [random(4, *shape) for shape in ((8, 16), (8, 16), (16, 8))]
    with pytest.raises(IndexError, match=f"none of the 4: .*{wrong}"):
        native(ops.routed_experts, random(1, 16), torch.tensor([[0, wrong]]), torch.ones(1, 2), *matrices, 2.0)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("shape", [shape for shape in test_streams.SHAPES if shape[0] * shape[1] <= 16])
def test_streams_are_opened_as_defined(shape, size):
    inputs = test_streams.coefficient_inputs(*shape, size=size)
    opened = assert_as_defined(ops.open_streams, *inputs, 20, 1e-6, 1e-6, rounding=1e-5)
    one = native(ops.open_streams, inputs[0][-1:, -1:], *inputs[1:], 20, 1e-6, 1e-6)
    assert all(torch.equal(together[-1, -1], alone[0, 0]) for together, alone in zip(opened, one, strict=True))
    assert_as_defined(ops.open_streams, inputs[0].bfloat16(), *inputs[1:], 1, 1e-6, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in test_streams.SHAPES if shape[0] * shape[1] <= 16])
def test_streams_are_mixed_as_defined(shape, dtype):
    X, y, post, res = test_streams.mixing_inputs(*shape)
    assert_as_defined(ops.streams_in, X.to(dtype), post)
    assert_as_defined(ops.streams_out, X.to(dtype), y.to(dtype), post, res)


def few(arguments, queries=7):
    """Arguments of attention for the first queries of each row."""
    q, window, entries, sink = arguments
    window = window._replace(query_place_BS=window.query_place_BS[:, :queries], reach_BS=window.reach_BS[:, :queries])
    if entries is not None:
        selected = None if entries.selected_BSK is None else entries.selected_BSK[:, :queries]
        entries = entries._replace(first_BS=entries.first_BS[:, :queries], count_BS=entries.count_BS[:, :queries], selected_BSK=selected)
    return q[:, :queries], window, entries, sink


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", test_attention.CASES)
def test_attention_is_the_definition(name, dtype):
    arguments = few(test_attention.SELECTING.get(name, test_attention.CASES[name]))
    narrow = test_attention.cast(arguments, dtype)
    found, expected = native(ops.attention, *narrow), ops.attention.definition(*arguments)
    torch.testing.assert_close(found.double(), expected, **(test_attention.CLOSE if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}))
    assert torch.equal(found, native(ops.attention, *narrow))
    q, window, entries, sink = narrow
    for query in (0, -1):  # a query is the same without the others
        pick = [slice(query, None) if query else slice(0, 1)] * 3
        alone = native(ops.attention, q[:, pick[0]], window._replace(query_place_BS=window.query_place_BS[:, pick[0]], reach_BS=window.reach_BS[:, pick[0]]),
                       None if entries is None else entries._replace(first_BS=entries.first_BS[:, pick[0]], count_BS=entries.count_BS[:, pick[0]], selected_BSK=(
                           None if entries.selected_BSK is None else entries.selected_BSK[:, pick[0]])), sink)
        assert torch.equal(alone[:, 0], found[:, query])


@pytest.mark.parametrize("name", test_attention.CASES)
def test_many_rows_of_one_query_are_the_few_ones_over_again(name):
    q, window, entries, sink = test_attention.cast(few(test_attention.CASES[name], 1), torch.float32)

    def repeated(parts):
        return [None if x is None else x.repeat(100, *[1] * (x.dim() - 1)) for x in parts]

    many = repeated([q])[0], type(window)(*repeated(window)), None if entries is None else type(entries)(*repeated(entries)), sink
    assert ops.attention.choose(*many)[0] == "native"
    assert torch.equal(native(ops.attention, *many), native(ops.attention, q, window, entries, sink).repeat(100, 1, 1, 1))


def test_attention_reads_rows_of_a_larger_stream():
    q, window, entries, sink = test_attention.cast(few(test_attention.CASES["packed, selected"]), torch.float32)
    larger = torch.full((len(q), entries.kv_BMD.shape[1] + 9, q.shape[3]), float("nan"))
    larger[:, :entries.kv_BMD.shape[1]] = entries.kv_BMD
    part = entries._replace(kv_BMD=larger[:, :entries.kv_BMD.shape[1]])
    assert torch.equal(native(ops.attention, q, window, part, sink), native(ops.attention, q, window, entries, sink))


@pytest.mark.parametrize("B, S, M, k, heads, channels", [(1, 1, 1, 1, 1, 4), (1, 1, 900, 12, 4, 1), (2, 4, 75, 12, 2, 8),
                                                         (1, 8, 10, 64, 1, 9), (2, 1, 3000, 100, 32, 2), (200, 1, 75, 12, 2, 8)])
def test_selection_is_the_definition_ties_included(B, S, M, k, heads, channels):
    """Small integers: sums are exact in any order, the definition's factor too, and many scores are equal, 0 above all."""
    q, weight, keys, first, count = test_index_topk.problem(B, S, heads, channels, M)
    whole = [(x * 2).round() for x in (q, weight, keys)]
    for numbers in (whole, [x.bfloat16() for x in whole]):
        assert torch.equal(native(ops.index_topk, *numbers, first, count, k), ops.index_topk.definition(*(x.double() for x in numbers), first, count, k))
    larger = torch.cat([whole[2], torch.full_like(whole[2], 1e9)], 1)[:, :M]
    assert torch.equal(native(ops.index_topk, *whole[:2], larger, first, count, k), ops.index_topk.definition(*whole, first, count, k))


@pytest.mark.parametrize("heads, channels", [(5, 3), (16, 64), (37, 10)])
def test_selection_is_the_definition_for_any_number_of_heads(heads, channels):
    q, weight, keys, first, count = test_index_topk.problem(2, 4, heads, channels, 500, torch.float64)
    assert torch.equal(native(ops.index_topk, q.float(), weight.float(), keys.float(), first, count, 40), ops.index_topk.definition(q, weight, keys, first, count, 40))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores=st.lists(st.floats(-2.0**100, 2.0**100, width=32), min_size=1, max_size=60), k=st.integers(1, 20))
def test_the_best_are_found_among_any_numbers(scores, k):
    keys = torch.tensor(scores)[None, :, None]  # a score is its key, or 0 where that is negative
    arguments = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), keys, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[len(scores)]])
    with torch.no_grad():
        assert torch.equal(native(ops.index_topk, *arguments, k), ops.index_topk.definition(*arguments, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 64), (2, 1, 4, 33), (1, 512)])
def test_norms_are_the_definition(shape, dtype):
    x = random(*shape, dtype=dtype)
    assert_as_defined(ops.rms_normalise, x, 1e-6)
    assert_as_defined(ops.rms_normalise, x, 1e-6, random(shape[-1], seed=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape, turns", [((2, 3, 8), (2, 3, 2)), ((2, 3, 5, 10), (2, 3, 1, 4)), ((4, 16), (4, 8)), ((1, 1, 2, 4), (1, 1, 1, 1))])
def test_rotation_is_the_definition(shape, turns, inverse, dtype):
    turn = torch.polar(torch.ones(turns), random(*turns))
    x = random(*shape, dtype=dtype)
    found, expected = native(ops.rotate, x, turn, inverse), ops.rotate.definition(x.double(), turn.to(torch.complex128), inverse)
    assert found.dtype == dtype and (found.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    assert ops.rotate.choose(random(2, 3, 8), torch.polar(torch.ones(1, 3, 2), random(1, 3, 2)))[0] == "definition"  # shared by an axis ahead


@pytest.mark.parametrize("changes", [{}, {"num_hash_layers": 0, "index_n_heads": 5, "qk_rope_head_dim": 8}, {"head_dim": 20, "hidden_size": 48, "moe_intermediate_size": 19}])
def test_decoding_is_the_definition_and_asks_for_kernels_everywhere(changes):
    model = random_model(small_config([0, 4, 128, 4], **changes))
    token_BS = random_tokens(model.config, 3, 150)
    with ops.using("definition"):
        expected = model(token_BS).logits
    cache = model.new_cache(3, 200)
    model(token_BS[:, :130], cache=cache)
    for at in range(130, 150):
        logits = model(token_BS[:, at:at + 1], cache=cache).logits[:, 0]
        torch.testing.assert_close(logits, expected[:, at], atol=2e-3, rtol=2e-3)
    x = random(3, 1, 4, model.config.hidden_size)
    block = model.blocks[0].attention_streams
    assert ops.open_streams.choose(x, block.fn, block.base, block.scale, 20, 1e-6, 1e-6)[0] == "native"


def test_kernels_leave_alone_what_they_cannot_do():
    x, matrix = random(1, 64), random(64, 64)
    assert ops.linear.choose(x, matrix)[0] == "native"
    with torch.enable_grad():
        assert ops.linear.choose(x, matrix)[0] != "native"
    for other in (matrix.double(), matrix.half(), matrix.T.contiguous().T, matrix.as_subclass(type("Other", (torch.Tensor,), {}))):
        assert ops.linear.choose(x.to(other.dtype), other)[0] != "native"
        assert ops.linear.choose(random(65, 64).to(other.dtype), other[:, ::2].T if other.dtype is torch.float32 else other)[0] != "native"


def test_shapes_that_do_not_fit_are_torchs_to_refuse():
    """A kernel would read what lies behind the numbers."""
    matrices = [random(4, *shape) for shape in ((64, 128), (64, 128), (128, 64))]
    calls = [(ops.linear, random(1, 128), random(64, 64)), (ops.linear, random(2, 32), random(64, 64)), (ops.rms_normalise, random(2, 8), 1e-6, random(4)),
             (ops.routed_experts, random(1, 256), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), *matrices, 2.0),
             (ops.routed_experts, random(1, 128), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), *matrices[:2], random(4, 128, 32), 2.0),
             (ops.open_streams, random(1, 1, 4, 8), random(24, 16), random(24), random(3), 20, 1e-6, 1e-6),
             (ops.rotate, random(1, 4), torch.polar(torch.ones(1, 4), random(1, 4)))]
    for operator, *arguments in calls:
        assert operator.choose(*arguments)[0] != "native"
        with pytest.raises((RuntimeError, ValueError)):
            operator(*arguments)


PROGRAM = """
import torch
from fathom import ops
from fathom.ops.native.library import library
from fathom.quant.formats import E8M0, Packed, dequantise
from fathom.ops.rounding import EXACT, ReleasedRounding
with torch.no_grad():
    print(library() is not None, ops.linear(torch.ones(1, 64), torch.ones(64, 64)).sum().item())
"""


def outcome(**environment):
    return subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout.split()


def test_without_a_compiler_or_by_wish_everything_works_without_kernels(tmp_path):
    assert outcome(FATHOM_NATIVE="0") == ["False", "4096.0"]
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert outcome(CC=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache")) == ["False", "4096.0"]


def test_a_damaged_file_in_the_cache_is_made_anew(tmp_path):
    assert outcome(XDG_CACHE_HOME=str(tmp_path)) == ["True", "4096.0"]
    (made,) = (tmp_path / "fathom").iterdir()
    whole = made.read_bytes()
    for damaged in (b"", whole[:5000], b"no library"):
        made.write_bytes(damaged)
        assert outcome(XDG_CACHE_HOME=str(tmp_path)) == ["True", "4096.0"]
    assert len(made.read_bytes()) == len(whole)


def test_many_processes_may_compile_at_once_and_an_unwritable_cache_does_not_matter(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda _: outcome(XDG_CACHE_HOME=str(tmp_path)), range(3))]
    assert found == [["True", "4096.0"]] * 3
    assert [path.suffix for path in (tmp_path / "fathom").iterdir()] == [".so"]
    shutil.rmtree(tmp_path / "fathom")
    (tmp_path / "fathom").write_text("a file where the folder should be")
    assert outcome(XDG_CACHE_HOME=str(tmp_path)) == ["True", "4096.0"]
