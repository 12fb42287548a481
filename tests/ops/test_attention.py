"""Attention: the definition against a softmax by hand, the CPU implementation against the definition in float64."""

import pytest
import torch

from fathom import ops
from fathom.ops.attention import Entries, Window, attended_entries, attention, entry_mass
from fathom.ops.cpu.attention import attention_cpu, entry_mass_cpu
from fathom.ops.cpu.selected_attention import attention_gathered

B, H, D, RATIO = 2, 3, 8, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SHAPES = [(window, S) for window in (20, 70) for S in (1, window - 1, window, window + 1, 3 * window + 5)]


@pytest.fixture(autouse=True)
def without_native_kernels(monkeypatch):
    """These tests are about the implementations in PyTorch, which do all the work where there is no C compiler."""
    monkeypatch.setattr("fathom.ops.native.library.library", lambda: None)
    monkeypatch.setattr("fathom.ops.native.tiles.kinds", lambda: 0)


def problem(window, position, M, selected=None, start=None):
    """Arguments for tokens at `position` [B, S] of their documents; rows that started earlier see a ring of keys.

    `M` entries: None for no entries, "blocks" for what the tokens complete. `selected` entries per query, or all.
    """
    generator = torch.Generator().manual_seed(position.shape[1])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    S = position.shape[1]
    place = torch.arange(S).expand(B, S) if start is None else position
    key_place = place
    if start is not None:
        last = start[:, None] - 1
        key_place = torch.cat([last - (last - torch.arange(window)) % window, place], 1)
    kv = Window(random(B, key_place.shape[1], D), key_place, place, position.clamp(max=window - 1))
    entries = None
    if M is not None:
        count = (position + 1) // RATIO
        done = ((position + 1) % RATIO == 0).cumsum(1) if start is None else count
        first, count = (done - count, count) if M else (0 * count, 0 * count)
        entries = Entries(random(B, int(done.max()) if M else 0, D), first, count, None)
        if selected is not None:
            index_keys = random(B, entries.kv_BMD.shape[1], D)
            chosen = ops.index_topk(random(B, S, 1, D), random(B, S, 1), index_keys, first, count, selected)
            entries = entries._replace(selected_BSK=chosen)
    return random(B, S, H, D), kv, entries, random(H)


def documents(S, lengths):
    """Positions [B, S] that restart wherever a document of the row is over; the second row starts with the last one."""
    rows = [torch.cat([torch.arange(n) for n in order * S])[:S] for order in (lengths, lengths[::-1])]
    return torch.stack(rows)


def arbitrary(seed, M=9):
    """Arguments that no model makes: keys anywhere and in no order, some queries that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    S, T = 50, 31

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kv = Window(random(B, T, D), integers(0, 80, B, T), integers(0, 80, B, S), integers(0, 6, B, S))
    first = integers(0, M + 1, B, S)
    count = (torch.rand(B, S, generator=generator) * (M + 1 - first)).long()
    selected = first[..., None] + integers(0, M, B, S, 5)
    selected = selected.where((selected < (first + count)[..., None]) & (integers(0, 3, B, S, 5) > 0), -1)
    return random(B, S, H, D), kv, Entries(random(B, M, D), first, count, selected if seed % 2 else None), random(H)


def whole(S):
    return torch.arange(S).expand(B, S)


def blind():
    """Arguments whose window keys all lie ahead of the queries, some of which have no entries either."""
    q, window, entries, sink = arbitrary(1)
    return q, window._replace(key_place_BT=window.key_place_BT + 100), entries, sink


CASES = {
    **{f"window {w}, {S} tokens": problem(w, whole(S), "blocks") for w, S in SHAPES},
    **{f"window {w}, {S} tokens, selected": problem(w, whole(S), "blocks", selected=5) for w, S in SHAPES},
    "no entries": problem(20, whole(65), None),
    "zero entries": problem(20, whole(65), 0),
    "one token of each document": problem(20, whole(65) * 0, "blocks"),
    "packed": problem(20, documents(100, [7, 41, 3, 30]), "blocks"),
    "packed, selected": problem(20, documents(100, [7, 41, 3, 30]), "blocks", selected=3),
    "packed in wide windows": problem(70, documents(171, [33, 90, 5]), "blocks", selected=4),
    "cached, one token": problem(20, torch.tensor([[30], [7]]), "blocks", start=torch.tensor([30, 7])),
    "cached, chunk": problem(20, torch.tensor([[30], [7]]) + whole(45), "blocks", start=torch.tensor([30, 7])),
    "cached, selected": problem(20, torch.tensor([[0], [90]]) + whole(45), "blocks", 5, torch.tensor([0, 90])),
    "nothing in the window": blind(),
    **{f"arbitrary {seed}": arbitrary(seed) for seed in range(6)},
}
every_case = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())


def cast(arguments, dtype):
    """The same arguments in another precision, on new leaves that want gradients."""
    def leaf(x):
        return x.detach().to(dtype).requires_grad_()

    q, window, entries, sink = arguments
    entries = None if entries is None else entries._replace(kv_BMD=leaf(entries.kv_BMD))
    return leaf(q), window._replace(kv_BTD=leaf(window.kv_BTD)), entries, leaf(sink)


def leaves(arguments):
    q, window, entries, sink = arguments
    return [q, window.kv_BTD, sink] + ([] if entries is None else [entries.kv_BMD])


def values_and_gradients(function, arguments):
    out = function(*arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves(arguments), weight)]


def test_definition_is_a_softmax_over_what_each_query_sees_and_the_sink():
    q, window, entries, sink = CASES["packed, selected"]
    out, mass = attention(q, window, entries, sink), entry_mass(q, window, entries, sink)
    for b, s in ((0, 0), (0, 6), (0, 7), (1, 29), (1, 65), (0, 99)):
        place, reach = int(window.query_place_BS[b, s]), int(window.reach_BS[b, s])
        chosen = [m for m in entries.selected_BSK[b, s].tolist() if m >= 0]
        keys = torch.cat([window.kv_BTD[b, place - reach:place + 1], entries.kv_BMD[b, chosen]])
        expected_mass = torch.zeros(entries.kv_BMD.shape[1], dtype=torch.float64)
        for h in range(H):
            probability = torch.cat([keys @ q[b, s, h] * D**-0.5, sink[h:h + 1]]).softmax(0)[:-1]
            torch.testing.assert_close(out[b, s, h], probability @ keys)
            expected_mass[chosen] += probability[reach + 1:]
        torch.testing.assert_close(mass[b, s], expected_mass)


@pytest.mark.parametrize("selected", [None, 2])
def test_definition_has_the_gradients_of_its_values(selected):
    arguments = cast(problem(4, documents(9, [5, 4]), "blocks", selected), torch.float64)

    def run(q, kv, sink, entries_kv):
        return attention.definition(q, arguments[1]._replace(kv_BTD=kv), arguments[2]._replace(kv_BMD=entries_kv), sink)

    assert torch.autograd.gradcheck(run, leaves(arguments))


@every_case
def test_cpu_attention_equals_the_definition_in_values_and_gradients(arguments):
    expected = values_and_gradients(attention.definition, cast(arguments, torch.float64))
    found = values_and_gradients(attention_cpu, cast(arguments, torch.float32))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, **CLOSE)


@every_case
def test_cpu_entry_mass_equals_the_definition(arguments):
    if arguments[2] is None:
        arguments = CASES["zero entries"]
    with torch.no_grad():
        found = entry_mass_cpu(*cast(arguments, torch.float32))
    torch.testing.assert_close(found.double(), entry_mass.definition(*arguments), **CLOSE)
    assert (found[~attended_entries(arguments[2])] == 0).all()


def test_cases_reach_what_they_are_meant_to_reach():
    kv, entries = CASES["packed, selected"][1:3]
    assert (entries.count_BS == 0).any() and (entries.first_BS > 0).any() and (entries.selected_BSK == -1).any()
    assert CASES["zero entries"][2].kv_BMD.shape[1] == 0 and kv.reach_BS.unique().numel() == 20
    distance = CASES["arbitrary 0"][1].query_place_BS[..., None] - CASES["arbitrary 0"][1].key_place_BT[:, None]
    seen = (distance >= 0) & (distance <= CASES["arbitrary 0"][1].reach_BS[..., None])
    assert (seen.sum(-1) == 0).any() and (seen.sum(-1) > 1).any()


def test_memory_order_and_absent_gradients_change_no_value():
    q, window, entries, sink = cast(CASES["packed"], torch.float32)
    out = attention_cpu(q, window, entries, sink)
    strided = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(attention_cpu(strided, window, entries, sink), out, atol=0, rtol=0)
    torch.testing.assert_close(entry_mass_cpu(strided, window, entries, sink.detach()),
                               entry_mass_cpu(q.detach(), window, entries, sink.detach()), atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(attention_cpu(q, window, entries, sink), out, atol=0, rtol=0)
    every = torch.autograd.grad(out.sum(), leaves((q, window, entries, sink)))  # the gradient is a stride-0 tensor
    only_sink = attention_cpu(q.detach(), window._replace(kv_BTD=window.kv_BTD.detach()),
                              entries._replace(kv_BMD=entries.kv_BMD.detach()), sink)
    torch.testing.assert_close(torch.autograd.grad(only_sink.sum(), sink)[0], every[2], atol=0, rtol=0)


def test_the_same_bits_twice():
    for name in ("packed, selected", "cached, chunk", "window 70, 215 tokens"):
        runs = [values_and_gradients(attention_cpu, cast(CASES[name], torch.float32)) for _ in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_what_an_unseen_key_holds_is_not_read():
    q, window, entries, sink = cast(problem(20, whole(80), "blocks"), torch.float32)
    out = attention_cpu(q, window, entries, sink)
    changed = window.kv_BTD.detach().clone()
    changed[:, 64:] = 1e4
    changed_entries = entries.kv_BMD.detach().clone()
    changed_entries[:, 16:] = 1e4
    other = attention_cpu(q, window._replace(kv_BTD=changed), entries._replace(kv_BMD=changed_entries), sink)
    torch.testing.assert_close(other[:, :64], out[:, :64], atol=0, rtol=0)
    assert (other[:, 64:] - out[:, 64:]).abs().max() > 1


def test_an_overwhelming_sink_leaves_nothing_to_the_keys_and_a_weak_one_everything():
    q, window, entries, sink = cast(CASES["packed"], torch.float32)
    assert attention_cpu(q, window, entries, sink.detach() + 1e4).abs().max() == 0
    ones = window._replace(kv_BTD=torch.ones_like(window.kv_BTD))
    out = attention_cpu(q, ones, entries._replace(kv_BMD=torch.ones_like(entries.kv_BMD)), sink.detach() - 1e4)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_cpu_is_chosen_for_enough_queries_and_masses_without_gradients():
    arguments = cast(CASES["packed"], torch.float32)
    assert attention.choose(*arguments)[0] == "cpu"
    assert entry_mass.choose(*arguments)[0] == "definition"
    with torch.no_grad():
        assert attention.choose(*arguments)[0] == entry_mass.choose(*arguments)[0] == "cpu"
        assert attention.choose(*cast(CASES["no entries"], torch.float32))[0] == "cpu"
        assert attention.choose(*cast(CASES["cached, one token"], torch.float32))[0] == "definition"
        assert attention.choose(*cast(CASES["packed"], torch.bfloat16))[0] == "cpu"
        for op in (attention, entry_mass):
            assert op.choose(*cast(CASES["packed"], torch.float64))[0] == "definition"
    assert attention.choose(*cast(CASES["packed"], torch.bfloat16))[0] == "cpu"


@every_case
@torch.no_grad()
def test_bfloat16_attention_equals_the_definition_to_its_roundings(arguments):
    arguments = cast(arguments, torch.bfloat16)
    expected, found = attention.definition(*arguments), attention_cpu(*arguments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.02)
    assert (found.float() - expected.float()).abs().mean() < 2e-3
    assert torch.equal(found, attention_cpu(*arguments))


@every_case
def test_bfloat16_gradients_are_near_those_of_the_same_numbers_in_float64(arguments):
    narrow = cast(arguments, torch.bfloat16)
    expected = values_and_gradients(attention, cast(narrow, torch.float64))
    for found, exact in zip(values_and_gradients(attention_cpu, narrow), expected, strict=True):
        assert found.dtype == torch.bfloat16 and (found.double() - exact).norm() <= 0.015 * exact.norm() + 1e-6


def without_repetition(arguments):
    """The same with each entry selected at most once by a query, as any selection is."""
    q, window, entries, sink = arguments
    slot, order = entries.selected_BSK.sort(-1)
    again = torch.zeros_like(slot, dtype=torch.bool)
    again[..., 1:] = slot[..., 1:] == slot[..., :-1]
    return q, window, entries._replace(selected_BSK=slot.masked_fill(again, -1)), sink


SELECTING = {name: without_repetition(arguments) for name, arguments in CASES.items()
             if arguments[2] is not None and arguments[2].selected_BSK is not None and arguments[2].kv_BMD.shape[1]}


@pytest.mark.parametrize("arguments", SELECTING.values(), ids=SELECTING.keys())
@torch.no_grad()
def test_gathered_attention_equals_the_definition(arguments):
    expected, half = attention.definition(*arguments), cast(arguments, torch.float32)
    out = attention_gathered(*half)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    assert torch.equal(out, attention_gathered(*half))
    narrow = cast(arguments, torch.bfloat16)
    torch.testing.assert_close(attention_gathered(*narrow), attention.definition(*narrow), atol=0.03, rtol=0.02)


@torch.no_grad()
def test_gathering_takes_over_where_few_of_many_entries_are_selected():
    few = cast(problem(20, whole(300), "blocks", selected=5), torch.float32)
    many = cast(problem(20, whole(100), "blocks", selected=5), torch.float32)
    one = cast(problem(20, torch.tensor([[300], [170]]), "blocks", 5, torch.tensor([300, 170])), torch.float32)
    assert [attention.choose(*arguments)[0] for arguments in (few, many, one)] == ["gathered", "cpu", "gathered"]
    with torch.enable_grad():
        assert attention.choose(*few)[0] == "cpu"
