"""Operators of many tokens in tiles, on any processor, against their definitions in float64; a row's bits whatever is beside it."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import ops
from fathom.ops.attention import attention_gradients, visible_entries
from fathom.ops.cpu.products import times, times_into, times_relu
from fathom.ops.index_topk import ascending
from fathom.ops.linear import Projection
from fathom.ops.native.library import library
from fathom.ops.native.tiles import grouped_outer, grouped_product, suits_groups, suits_tiles, tiled_product
from tests.ops import test_attention, test_experts, test_index_topk
from tests.ops.test_native import DTYPES, assert_as_defined, native, random

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def in_tiles(monkeypatch):
    """Tiles of both dtypes, also where the processor would be faster without."""
    monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda: 3)
    with torch.no_grad():
        yield


def with_threads(count, function):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return function()
    finally:
        torch.set_num_threads(before)


def assert_is_product(found, x, matrix):
    exact, size = x.double() @ matrix.double().T, x.double().abs() @ matrix.double().abs().T
    bound = 2 * torch.finfo(torch.float32).eps * size + torch.finfo(found.dtype).eps * exact.abs()
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


def factor(rows, columns, dtype, turned, seed):
    return random(columns, rows, seed=seed, dtype=dtype).T if turned else random(rows, columns, seed=seed, dtype=dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(N=st.integers(1, 140), O=st.integers(1, 120), I=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 600])), dtype=st.sampled_from(DTYPES),
       turned=st.tuples(st.booleans(), st.booleans()), relu=st.booleans(), kept=st.booleans(), threads=st.integers(1, 4))
def test_products_of_any_shape(N, O, I, dtype, turned, relu, kept, threads):  # noqa: E741
    x, matrix = factor(N, I, dtype, turned[0], 0), factor(O, I, dtype, turned[1], 1)

    def product(x):
        return tiled_product(x, matrix, torch.float32 if kept else None, relu)

    found = product(x)
    assert found.dtype == (torch.float32 if kept else dtype)
    plain = tiled_product(x, matrix, torch.float32 if kept else None)
    assert_is_product(plain, x, matrix)
    assert torch.equal(found, plain.relu() if relu else plain)
    assert torch.equal(with_threads(threads, lambda: product(x)), found)
    assert torch.equal(product(x[N // 2:]), found[N // 2:])


@each_dtype
def test_products_go_to_where_they_are_wanted_and_nowhere_else(dtype):
    x, matrix, out = random(70, 2, 64, dtype=dtype), random(50, 64, seed=1, dtype=dtype), torch.full((72, 60), 7.0, dtype=dtype)
    tiled_product(x[:, 1], matrix, out_NO=out[1:71, 3:53])
    assert torch.equal(out[1:71, 3:53], tiled_product(x[:, 1].contiguous(), matrix))
    out[1:71, 3:53] = 7
    assert (out == 7).all()
    larger = random(200, 64, seed=1, dtype=dtype)
    assert suits_tiles(x[:, 1], larger)
    assert torch.equal(times(x[:, 1], larger), tiled_product(x[:, 1], larger)) and torch.equal(times_relu(x, larger), tiled_product(x, larger, relu=True))
    times_into(x[:, 0], larger, wanted := torch.empty(70, 200, dtype=dtype))
    assert torch.equal(wanted, tiled_product(x[:, 0], larger))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=7), O=st.integers(1, 100), half=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
       turned=st.booleans(), threads=st.integers(1, 4))
def test_each_group_of_rows_has_its_own_matrix(sizes, O, half, dtype, turned, threads):  # noqa: E741
    P, I, ends = sum(sizes), 2 * half, torch.tensor(sizes).cumsum(0)  # noqa: E741
    x, y, matrix = random(P, I, dtype=dtype), random(P, O, seed=1, dtype=dtype), random(len(sizes), O, I, seed=2, dtype=dtype)
    matrix = matrix.mT.contiguous().mT if turned else matrix
    product, outer = with_threads(threads, lambda: (grouped_product(x, matrix, ends), grouped_outer(y, x, ends)))
    assert suits_groups(x, matrix) and product.dtype == outer.dtype == dtype and outer.shape == matrix.shape
    for group, (rows, its, own) in enumerate(zip(x.split(sizes), y.split(sizes), product.split(sizes), strict=True)):
        assert_is_product(own, rows, matrix[group])
        assert_is_product(outer[group], its.T, rows.T)
    assert all(map(torch.equal, with_threads(1, lambda: (grouped_product(x, matrix, ends), grouped_outer(y, x, ends))), (product, outer)))


@each_dtype
def test_a_large_matrix_is_packed_in_parts(dtype, monkeypatch):
    x, matrix = random(30, 64, dtype=dtype), random(500, 64, seed=1, dtype=dtype)
    whole = tiled_product(x, matrix)
    monkeypatch.setattr("fathom.ops.native.tiles._PACKED", 100 * 64)
    assert torch.equal(tiled_product(x, matrix), whole)


def test_what_tiles_do_not_take_goes_elsewhere():
    x, matrix = random(64, 256), random(128, 256)
    assert suits_tiles(x, matrix)
    others = [(x[:2], matrix), (x, matrix.bfloat16()), (x.double(), matrix.double()), (x.half(), matrix.half()), (x, random(128, 512)[:, ::2]), (x[:, :8], matrix)]
    others += [(x, matrix.as_subclass(type('Other', (torch.Tensor,), {}))), (x.as_subclass(type('Other', (torch.Tensor,), {})), matrix)]
    assert not any(suits_tiles(*both) for both in others)
    with ops.using("cpu"):
        assert not suits_tiles(x, matrix)


def test_fewer_threads_than_were_asked_for_leave_nothing_out():
    """OMP_THREAD_LIMIT is read when a process starts."""
    program = """if True:
        import torch
        import fathom.ops.native.tiles as tiles
        torch.set_num_threads(4)
        x, matrix = torch.randn(100, 64), torch.randn(300, 64)
        for one, other in ((x, matrix), (matrix.repeat(9, 1), x), (x.T.contiguous().T, matrix)):
            torch.testing.assert_close(tiles.tiled_product(one, other), (one.double() @ other.double().T).float(), atol=1e-4, rtol=1e-4)
        """
    for limit in ("1", "3"):
        subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_THREAD_LIMIT": limit})


@each_dtype
def test_linear_of_many_rows_is_the_definition(dtype):
    x, matrix = random(3, 50, 4, 96, dtype=dtype), random(160, 96, seed=1, dtype=dtype) / 10
    assert_as_defined(ops.linear, x[:, :, 1], matrix)
    assert_as_defined(ops.grouped_linear, x, matrix)
    found = native(ops.linear, x[:, :, 1], matrix)
    assert torch.equal(native(ops.linear, x[1:, :, 1], matrix), found[1:])


@each_dtype
def test_compressor_inputs_of_many_tokens_are_the_definition(dtype):
    """In float32, whatever the dtype of what is multiplied."""
    class Layer(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x.float(), self.weight.float())

        @property
        def plain(self):
            return Projection(self.weight, in_float32=True)

    value, gate = (Layer(96, 72, bias=False).to(dtype) for _ in range(2))
    x, bias, position = random(3, 60, 96, dtype=dtype), random(4, 72, seed=3), torch.arange(180).view(3, 60) + 5
    found = native(ops.compressor_inputs, x, value, gate, bias, position)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ops.compressor_inputs.definition(x, value, gate, bias, position), atol=1e-5, rtol=1e-5)
    assert torch.equal(native(ops.compressor_inputs, x[1:], value, gate, bias, position[1:]), found[1:])


@each_dtype
@pytest.mark.parametrize(("tokens", "experts", "chosen", "width", "hidden"), [(257, 4, 4, 16, 16), (300, 6, 2, 304, 272), (200, 17, 3, 64, 48)])
def test_experts_of_many_tokens_are_the_definition(dtype, tokens, experts, chosen, width, hidden):
    x, expert, weight, *matrices = test_experts.problem(tokens, experts, chosen, width, hidden)
    if experts > 6:
        expert = expert.where(expert > 2, 5)  # some experts have nothing to do, one much
    arguments = [x.to(dtype), expert, weight.float(), *((matrix * width**-0.5).to(dtype) for matrix in matrices)]
    # What lies between products of bfloat16 is rounded to it, as in the definition of bfloat16.
    assert_as_defined(ops.routed_experts, *arguments, 1.5, rounding=2e-6 if dtype is torch.float32 else 1e-2)
    found = native(ops.routed_experts, *arguments, 1.5)
    part = native(ops.routed_experts, *(each[tokens // 8:] for each in arguments[:3]), *arguments[3:], 1.5)
    assert torch.equal(part, found[tokens // 8:])
    with pytest.raises(IndexError, match="an expert is none of"):
        native(ops.routed_experts, arguments[0], expert + 1 + experts - int(expert.max()), *arguments[2:], 1.5)


@pytest.mark.parametrize("B, S, M, k, heads", [(2, 300, 75, 12, 2), (3, 90, 10, 64, 8), (1, 700, 175, 20, 1), (2, 66, 3000, 100, 9), (1, 130, 1, 1, 17)])
def test_selection_of_many_queries_is_the_definition_ties_included(B, S, M, k, heads):
    """Small integers: sums are exact in any order and many scores are equal, 0 above all."""
    generator = torch.Generator().manual_seed(B * S + M)
    q, weight, keys = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((B, S, heads, 4), (B, S, heads), (B, M, 4)))
    count = torch.randint(0, M + 1, (B, S), generator=generator)
    first = (torch.rand(B, S, generator=generator) * (M + 1 - count)).long()
    score = (weight[:, :, None] * torch.einsum("bshd,bmd->bsmh", q, keys).relu()).sum(-1)  # the definition's, not scaled: exact
    hidden = score.masked_fill(~visible_entries(first, count, M), float("-inf"))
    best = hidden.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    expected = ascending(best.masked_fill(torch.arange(best.shape[2]) >= count[..., None], -1))
    for dtype in DTYPES:
        inputs = [x.to(dtype) for x in (q, weight, keys)]
        for threads in (1, 3):
            assert torch.equal(with_threads(threads, lambda inputs=inputs: native(ops.index_topk, *inputs, first, count, k)), expected)
        strided = torch.zeros(B, M + 3, 4, dtype=dtype)[:, :M]
        strided.copy_(keys)
        assert torch.equal(native(ops.index_topk, *inputs[:2], strided, first, count, k), expected)


@pytest.mark.parametrize("M", [500, 4097])
def test_selection_of_many_queries_among_numbers(M):
    """Scores apart by more than their rounding; with one query for each row a kernel of its own looks for the best of as many."""
    generator = torch.Generator().manual_seed(M)
    q, weight, keys = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 140, 8, 64), (2, 140, 8), (2, M, 64)))
    first, count = torch.zeros(2, 140, dtype=torch.int64), torch.full((2, 140), M)
    expected = ops.index_topk.definition(q, weight, keys, first, count, 40)
    single = [x.float() for x in (q, weight, keys)]
    found = native(ops.index_topk, *single, first, count, 40)
    assert (found == expected).float().mean() > 0.999
    assert torch.equal(native(ops.index_topk, single[0][:, 9:], single[1][:, 9:], single[2], first[:, 9:], count[:, 9:], 40), found[:, 9:])
    alone = native(ops.index_topk, single[0][:, :1], single[1][:, :1], single[2], first[:, :1], count[:, :1], 40)
    assert (alone == expected[:, :1]).float().mean() > 0.99


def widened(arguments):
    """The cases of test_attention with 16 channels, so many queries of each row that they are attended in tiles."""
    q, window, entries, sink = arguments
    q, kv = (torch.cat([x, x.flip(-1)], -1) for x in (q, window.kv_BTD))
    if entries is not None:
        entries = entries._replace(kv_BMD=torch.cat([entries.kv_BMD, entries.kv_BMD.flip(-1)], -1))
    return q, window._replace(kv_BTD=kv), entries, sink


MANY = {name: widened(arguments) for name, arguments in {**test_attention.CASES, **test_attention.SELECTING}.items()
        if arguments[0].shape[1] > 15 and (name in test_attention.SELECTING or arguments[2] is None or arguments[2].selected_BSK is None)}
many_queries = pytest.mark.parametrize("arguments", MANY.values(), ids=MANY.keys())


@each_dtype
@many_queries
def test_attention_of_many_queries_is_the_definition(arguments, dtype):
    arguments = test_attention.cast(arguments, dtype)
    q, window, entries, sink = arguments
    exact = ops.attention.definition(q.double(), window._replace(kv_BTD=window.kv_BTD.double()),
                                     None if entries is None else entries._replace(kv_BMD=entries.kv_BMD.double()), sink.double())
    found = native(ops.attention, *arguments)
    assert found.dtype == dtype
    # Weights are rounded to bfloat16 before they multiply bfloat16.
    torch.testing.assert_close(found.double(), exact, atol=2e-6 if dtype is torch.float32 else 2e-2, rtol=2e-6 if dtype is torch.float32 else 2e-2)
    for threads in (1, 3):
        assert torch.equal(with_threads(threads, lambda: native(ops.attention, *arguments)), found)
    row = [type(x)(*(None if part is None else part[1:] for part in x)) if isinstance(x, tuple) else x for x in (window, entries)]
    assert torch.equal(native(ops.attention, q[1:], *row, sink), found[1:])


@each_dtype
@many_queries
def test_gradients_of_attention_are_the_definitions(arguments, dtype):
    q, window, entries, sink = test_attention.cast(arguments, dtype)
    grad = random(*q.shape, seed=5, dtype=dtype)
    exact = attention_gradients.definition(q.double(), grad.double(), window._replace(kv_BTD=window.kv_BTD.double()),
                                           None if entries is None else entries._replace(kv_BMD=entries.kv_BMD.double()), sink.double())
    found = native(attention_gradients, q, grad, window, entries, sink)
    assert (found[2] is None) == (entries is None) and found[0].dtype == dtype and {x.dtype for x in found[1:] if x is not None} == {torch.float32}
    for one, other in zip(found, exact, strict=True):
        if one is not None and one.numel():
            bound = (2e-6 if dtype is torch.float32 else 8e-3) * max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one.double(), other, atol=bound, rtol=0)
    for threads in (1, 3):
        again = with_threads(threads, lambda: native(attention_gradients, q, grad, window, entries, sink))
        assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, again, strict=True))


@torch.enable_grad()
def test_attention_in_training_goes_through_tiles(monkeypatch):
    """Both ways: with the kernels' calls counted."""
    called, real = [], library()

    class Counting:
        def __getattr__(self, name):
            called.append(name)
            return getattr(real, name)

    monkeypatch.setattr("fathom.ops.native.attention.library", lambda: Counting())
    arguments = test_attention.cast(MANY["packed, selected"], torch.float32)
    found = test_attention.values_and_gradients(ops.attention, arguments)
    assert called == ["fathom_attention_of_many", "fathom_attention_backward"]
    expected = test_attention.values_and_gradients(ops.attention.definition, test_attention.cast(MANY["packed, selected"], torch.float64))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_gradients_of_experts_in_groups_are_those_of_experts_one_by_one(dtype, monkeypatch):
    x, expert, weight, *matrices = test_experts.problem(300, 6, 2, 64, 48)
    expert = expert.where(expert != 3, 2)  # one has nothing to do
    results = []
    for grouped in (3, 0):
        monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda grouped=grouped: grouped)
        leaves = [tensor.to(dtype if place != 1 else torch.float32).requires_grad_() for place, tensor in enumerate([x, weight, *(m / 8 for m in matrices)])]
        with torch.enable_grad():
            out = ops.routed_experts(leaves[0], expert, *leaves[1:], 1.5)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=4).to(out.dtype))])
    for one, other in zip(*results, strict=True):
        bound = (1e-5 if dtype is torch.float32 else 2e-2) * float(other.abs().max())
        torch.testing.assert_close(one, other, atol=bound, rtol=0)


def test_there_are_attention_cases_of_every_kind():
    kinds = {("none" if e is None else "all" if e.selected_BSK is None else "selected") for _, _, e, _ in MANY.values()}
    assert kinds == {"none", "all", "selected"} and len(MANY) > 20


@each_dtype
def test_what_an_unseen_key_holds_is_not_read_by_any_query(dtype):
    q, window, entries, sink = test_attention.cast(widened(test_attention.problem(20, test_attention.whole(80), "blocks")), dtype)
    out = native(ops.attention, q, window, entries, sink)
    kv, far = window.kv_BTD.clone(), entries.kv_BMD.clone()
    kv[:, 64:], far[:, 16:] = float("nan"), float("nan")
    other = native(ops.attention, q, window._replace(kv_BTD=kv), entries._replace(kv_BMD=far), sink)
    assert torch.equal(other[:, :64], out[:, :64]) and other[:, 64:].isnan().all()


@each_dtype
def test_rows_of_a_larger_cache_are_read_where_they_lie(dtype):
    q, window, entries, sink = test_attention.cast(MANY["packed, selected"], dtype)
    larger = torch.zeros(2, entries.kv_BMD.shape[1] + 7, 16, dtype=dtype)[:, :-7]
    larger.copy_(entries.kv_BMD)
    assert torch.equal(native(ops.attention, q, window, entries._replace(kv_BMD=larger), sink), native(ops.attention, q, window, entries, sink))


def test_streams_of_any_number_of_tokens_are_opened_alike():
    """A token's bits are those that it has among other tokens."""
    for dtype in DTYPES:
        for N, W in ((4, 24), (2, 33), (1, 16), (3, 50)):
            x, R = random(1, 131, N, W, dtype=dtype), (2 + N) * N
            fn, base, scale = random(R, N * W, seed=1) / 10, random(R, seed=2), random(3, seed=3)
            assert_as_defined(ops.open_streams, x, fn, base, scale, 6, 1e-6, 1e-6)
            whole, part = (native(ops.open_streams, each, fn, base, scale, 6, 1e-6, 1e-6) for each in (x, x[:, 60:]))
            assert all(torch.equal(one[:, 60:], other) for one, other in zip(whole, part, strict=True))
