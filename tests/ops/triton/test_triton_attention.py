"""Attention's kernels against the definition in float64: values, gradients, masses; their bits do not depend on the batch."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.attention import attended_entries, attention, entry_mass
from fathom.ops.index_objective import index_objective
from fathom.ops.triton import attention_backward
from fathom.ops.triton.attention import attention_triton
from fathom.ops.triton.attention_tiles import reads
from fathom.ops.triton.entry_mass import entry_mass_triton
from tests.ops.test_attention import CASES as SMALL
from tests.ops.test_attention import CLOSE, arbitrary, cast, documents, leaves, problem, values_and_gradients, whole, without_repetition


def wide(arguments):
    """The same with 16 channels, the least that a kernel takes, in place of 8."""
    def widen(x):
        return torch.cat([x, x.flip(-1) * 0.5], -1)

    q, window, entries, sink = arguments
    entries = None if entries is None else entries._replace(kv_BMD=widen(entries.kv_BMD))
    return widen(q), window._replace(kv_BTD=widen(window.kv_BTD)), entries, sink


def part(arguments, rows, queries, keys=None, slots=None):
    """Some of the rows, queries, window keys and entries."""
    q, window, entries, sink = arguments
    window = window._replace(kv_BTD=window.kv_BTD[rows, keys or slice(None)], key_place_BT=window.key_place_BT[rows, keys or slice(None)],
                             query_place_BS=window.query_place_BS[rows, queries], reach_BS=window.reach_BS[rows, queries])
    if entries is not None:
        selected = None if entries.selected_BSK is None else entries.selected_BSK[rows, queries]
        entries = entries._replace(kv_BMD=entries.kv_BMD[rows, slots or slice(None)], first_BS=entries.first_BS[rows, queries],
                                   count_BS=entries.count_BS[rows, queries], selected_BSK=selected)
    return q[rows, queries], window, entries, sink


def many_heads(arguments, H):
    q, window, entries, sink = arguments
    scale = torch.linspace(-1, 1, H, dtype=q.dtype)
    return q.mean(2, keepdim=True) * scale[:, None], window, entries, sink.mean() + scale


def decoding(S, selected=None):
    """S new tokens each of rows that have seen 560 and 90: entries fill two parts and more, and less than one."""
    start = torch.tensor([560, 90])
    return problem(20, start[:, None] + whole(S), "blocks", selected, start)


BOTH = slice(0, 2)
CASES = {name: wide(arguments) for name, arguments in {
    "one token": SMALL["window 20, 1 tokens"],
    "one more than a window": SMALL["window 20, 21 tokens"],
    "no entries": part(SMALL["no entries"], BOTH, slice(0, 33)),
    "zero entries": part(SMALL["zero entries"], BOTH, slice(0, 9)),
    "zero entries, selected": problem(20, documents(9, [5]), "blocks", selected=0),
    "packed": problem(20, documents(60, [7, 31, 3, 19]), "blocks"),
    "packed, selected": problem(20, documents(15, [9, 6]), "blocks", selected=1),
    "cached, chunk": part(SMALL["cached, chunk"], BOTH, slice(0, 33), slice(0, 53)),
    "cached, selected": part(SMALL["cached, selected"], BOTH, slice(0, 7)),
    "one token of each document": part(SMALL["one token of each document"], BOTH, slice(0, 9)),
    "nothing in the window": without_repetition(part(SMALL["nothing in the window"], BOTH, slice(0, 7))),
    "arbitrary": part(arbitrary(0), BOTH, slice(0, 26)),
    "arbitrary, many entries": part(arbitrary(2, M=70), BOTH, slice(0, 18)),
    "arbitrary, selected": without_repetition(part(arbitrary(3), BOTH, slice(0, 7))),
    "more heads than rows": many_heads(problem(20, documents(7, [5, 2]), "blocks"), 40),
    "more heads than rows, selected": many_heads(problem(20, documents(6, [6]), "blocks", selected=1), 40),
}.items()}
every_case = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
NEW_TOKENS = {f"{S} new, {selected or 'all'} entries": wide(decoding(S, selected)) for S in (1, 3) for selected in (None, 130)}


def run(op, arguments):
    with ops.using("triton"):
        assert op.choose(*arguments)[0] == "triton"
        return op(*arguments)


def with_gradients(arguments):
    return values_and_gradients(lambda *them: run(attention, them), arguments)


def assert_close(found, expected, **tolerance):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y.double(), **tolerance)


@every_case
def test_it_equals_the_definition_in_values_and_gradients(arguments):
    expected = values_and_gradients(attention.definition, cast(arguments, torch.float64))
    assert_close(with_gradients(cast(arguments, torch.float32)), expected, **CLOSE)


@pytest.mark.parametrize("name", ["packed", "packed, selected", "arbitrary"])
def test_bfloat16_equals_the_definition_to_its_roundings(name):
    arguments = cast(CASES[name], torch.bfloat16)
    exact = values_and_gradients(attention.definition, cast(arguments, torch.float64))
    rounded = values_and_gradients(attention.definition, arguments)
    for x, y, z in zip(with_gradients(arguments), exact, rounded, strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), y, atol=0.01 * float(y.abs().max()), rtol=0.02)
        if x.numel() > len(arguments[3]):  # the sink's gradient is a few numbers, each the rest of a long sum
            assert (x.double() - y).abs().mean() < 1.2 * (z.double() - y).abs().mean()



@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2] is not None])
@torch.no_grad()
def test_entry_mass_equals_the_definition(name):
    arguments = CASES[name]
    found = run(entry_mass, cast(arguments, torch.float32))
    torch.testing.assert_close(found.double(), entry_mass.definition(*arguments), **CLOSE)
    assert (found[~attended_entries(arguments[2])] == 0).all()


@pytest.mark.parametrize("arguments", NEW_TOKENS.values(), ids=NEW_TOKENS.keys())
@torch.no_grad()
def test_few_queries_read_their_entries_in_parts(arguments):
    exact = cast(arguments, torch.float32)
    out = run(attention, exact)
    torch.testing.assert_close(out.double(), attention.definition(*arguments), **CLOSE)
    assert torch.equal(out, run(attention, exact))
    narrow = cast(arguments, torch.bfloat16)
    torch.testing.assert_close(run(attention, narrow).double(), attention.definition(*cast(narrow, torch.float64)), atol=0.01, rtol=0.02)


@torch.no_grad()
def test_decoded_tokens_have_the_same_bits_in_any_batch():
    for selected in (None, 130):
        arguments = cast(wide(decoding(3, selected)), torch.float32)
        out = run(attention, arguments)
        for row, entries in ((0, 141), (1, 23)):  # the second row's entries fill one part in place of two
            for S in (1, 2):
                few = part(arguments, slice(row, row + 1), slice(0, S), slice(0, 20 + S), slice(0, entries))
                assert torch.equal(run(attention, few), out[row:row + 1, :S])


@torch.no_grad()
def test_a_prompts_tokens_have_the_same_bits_in_any_batch():
    for name, most in (("cached, chunk", 30), ("cached, selected", 6)):
        arguments = cast(CASES[name], torch.float32)
        for op in (attention, entry_mass):
            out = run(op, arguments)
            for row in range(2):
                one = part(arguments, slice(row, row + 1), slice(0, most), slice(0, 20 + most))
                assert torch.equal(run(op, one), out[row:row + 1, :most])


@torch.no_grad()
def test_keys_have_no_order_but_their_places():
    q, window, entries, sink = cast(CASES["cached, chunk"], torch.float32)
    order = torch.randperm(window.kv_BTD.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = window._replace(kv_BTD=window.kv_BTD[:, order], key_place_BT=window.key_place_BT[:, order])
    assert torch.equal(run(attention, (q, shuffled, entries, sink)), run(attention, (q, window, entries, sink)))


def test_the_same_bits_twice_and_however_much_memory_is_set_aside(monkeypatch):
    selected, packed = (cast(CASES[name], torch.float32) for name in ("arbitrary, selected", "arbitrary"))
    once = [with_gradients(arguments) for arguments in (selected, packed)]
    assert all(map(torch.equal, with_gradients(packed), once[1]))
    monkeypatch.setattr(attention_backward, "_PAIR_NUMBERS", 5 * 16 * 6)  # the pairs of six queries, of the 14 that there are
    monkeypatch.setattr(attention_backward, "_PROGRAMS", 1)
    for arguments, expected in zip((selected, packed), once, strict=True):
        found = with_gradients(arguments)
        assert torch.equal(found[0], expected[0])
        assert_close(found, expected, **CLOSE)


def test_memory_order_and_absent_gradients_change_no_value():
    q, window, entries, sink = arguments = cast(CASES["one more than a window"], torch.float32)
    out = run(attention, arguments)
    strided = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    pool = torch.full((2, 9, 32), torch.nan)  # a cache's records, of which the entries are a part
    pool[:, :entries.kv_BMD.shape[1], :16] = entries.kv_BMD.detach()
    in_a_pool = entries._replace(kv_BMD=pool[:, :entries.kv_BMD.shape[1], :16])
    last_first = window._replace(kv_BTD=window.kv_BTD.detach().mT.contiguous().mT)
    with torch.no_grad():
        assert torch.equal(run(attention, (strided, last_first, in_a_pool, sink)), out)
        assert torch.equal(run(entry_mass, (strided, last_first, in_a_pool, sink)), run(entry_mass, arguments))
    every = torch.autograd.grad(out.sum(), leaves(arguments))  # the gradient is a stride-0 tensor
    only_sink = run(attention, (strided, last_first, in_a_pool, sink))
    assert torch.equal(torch.autograd.grad(only_sink.sum(), sink)[0], every[2])


def test_what_an_unseen_key_holds_is_not_read():
    q, window, entries, sink = cast(CASES["packed"], torch.float32)
    out = run(attention, (q, window, entries, sink))
    changed, changed_entries = window.kv_BTD.detach().clone(), entries.kv_BMD.detach().clone()
    changed[:, 41:], changed_entries[:, 9:] = 1e4, 1e4
    other = run(attention, (q, window._replace(kv_BTD=changed), entries._replace(kv_BMD=changed_entries), sink))
    assert torch.equal(other[:, :41], out[:, :41]) and (other[:, 41:] - out[:, 41:]).abs().max() > 1


def test_an_overwhelming_sink_leaves_nothing_to_the_keys_and_a_weak_one_everything():
    q, window, entries, sink = cast(CASES["one more than a window"], torch.float32)
    ones = window._replace(kv_BTD=torch.ones_like(window.kv_BTD)), entries._replace(kv_BMD=torch.ones_like(entries.kv_BMD))
    for queries in (slice(0, 21), slice(17, 21)):  # in one pass, and in parts
        q_few, *both, _ = part((q.detach(), *ones, sink), BOTH, queries)
        assert run(attention, (q_few, *both, sink.detach() + 1e4)).abs().max() == 0
        torch.testing.assert_close(run(attention, (q_few, *both, sink.detach() - 1e4)), torch.ones_like(q_few))


@pytest.mark.parametrize("name", ["packed", "arbitrary", "cached, chunk"])
def test_bounds_of_a_tiles_readers_hold_them_all_and_in_rows_of_documents_no_others(name):
    _, window, entries, _ = CASES[name]
    read = reads(window, entries)
    for begin, end, keys in ((read.begin_BS, read.end_BS, window.kv_BTD.shape[1]), (read.first_BS, read.last_BS, entries.kv_BMD.shape[1])):
        first, last = attention_backward.readers(begin, end, keys, 4)
        for tile in range(first.shape[1]):
            reading = (begin < end) & (begin < min(4 * tile + 4, keys)) & (end > 4 * tile)
            for b in range(2):
                found = reading[b].nonzero()[:, 0].tolist()
                if found:
                    assert first[b, tile] <= found[0] and found[-1] < last[b, tile]
                if found and name != "arbitrary":
                    assert (first[b, tile], last[b, tile]) == (found[0], found[-1] + 1)


@torch.no_grad()
def test_the_indexers_objective_uses_it():
    q, window, entries, sink = cast(CASES["packed, selected"], torch.float32)
    learned = q[:, :, :2], q[:, :, 0, :2], entries.kv_BMD
    with ops.using("triton"):
        found = index_objective(*learned, q, window, entries, sink)
    with ops.using("definition"):
        torch.testing.assert_close(found, index_objective(*learned, q, window, entries, sink), **CLOSE)


def test_what_the_kernels_take():
    exact, narrow = (cast(CASES["packed"], dtype) for dtype in (torch.float32, torch.bfloat16))
    mixed = narrow[0], exact[1], exact[2], exact[3]
    assert attention.choose(*exact)[1] is not attention_triton  # on a CPU only where it is asked for
    with ops.using("triton"):
        assert attention.choose(*exact)[1] is attention.choose(*narrow[:3], exact[3])[1] is attention_triton
        assert entry_mass.choose(*exact)[0] == "definition"  # it would have gradients
        assert attention.choose(*mixed)[0] == attention.choose(*cast(SMALL["packed"], torch.float32))[0] == "definition"
        assert attention.choose(*cast(CASES["packed"], torch.float64))[0] == "definition"
        with torch.no_grad():
            assert entry_mass.choose(*exact)[1] is entry_mass_triton
            nothing = part(exact, BOTH, slice(0, 0))
            assert attention.choose(*nothing)[0] == entry_mass.choose(*nothing)[0] == "definition"
