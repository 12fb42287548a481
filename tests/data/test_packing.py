"""Packing: every token a target once, pieces whole, positions restarting, batches pure functions of their number."""

from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.packing import PackedData, best_fit
from fathom.errors import DataError
from fathom.ops import IGNORE

PAD = 0
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)


def stream(lengths):
    """Documents whose every token is its own place in the stream, counted from 1, so that nothing can be confused."""
    return SimpleNamespace(tokens=np.arange(1, sum(lengths) + 1), lengths=np.array(lengths, dtype=np.int64))


def epoch_of(data, epoch=0):
    rows = data.rows_in_epoch(epoch)
    return data.rows(epoch * rows, rows)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(astuple(one), astuple(other), strict=True))


@given(LENGTHS, st.integers(1, 24), st.integers(0, 3))
def test_every_token_but_a_documents_first_is_a_target_exactly_once_an_epoch(lengths, S, epoch):
    batch = epoch_of(PackedData(stream(lengths), S, 0, PAD), epoch)
    ends = np.cumsum(lengths)
    firsts = {end - length + 1 for end, length in zip(ends, lengths, strict=True) if length}
    targets = batch.targets_BS[batch.targets_BS != IGNORE].tolist()
    assert sorted(targets) == [token for token in range(1, ends[-1] + 1) if token not in firsts]


@given(LENGTHS, st.integers(1, 24))
def test_target_follows_its_token_and_positions_count_up_within_a_piece(lengths, S):
    batch = epoch_of(PackedData(stream(lengths), S, 1, PAD))
    tokens, targets, positions = (t.numpy() for t in (batch.tokens_BS, batch.targets_BS, batch.positions_BS))
    assert tokens.shape == targets.shape == positions.shape == (len(tokens), S)
    real = targets != IGNORE
    assert (targets[real] == tokens[real] + 1).all()
    assert (tokens[~real] == PAD).all() and (positions[~real] == 0).all()
    for row in range(len(tokens)):
        for at in range(S):
            if positions[row, at]:
                assert positions[row, at] == positions[row, at - 1] + 1 and tokens[row, at] == tokens[row, at - 1] + 1


@given(LENGTHS, st.integers(1, 24))
def test_pieces_are_as_few_as_can_be_and_long_ones_start_where_the_last_ended(lengths, S):
    batch = epoch_of(PackedData(stream(lengths), S, 2, PAD))
    starts = batch.tokens_BS[(batch.positions_BS == 0) & (batch.targets_BS != IGNORE)].tolist()
    begin, expected = 1, []
    for length in lengths:
        expected += range(begin, begin + length - 1, S)
        begin += length
    assert sorted(starts) == expected


@given(LENGTHS, st.integers(1, 24), st.integers(1, 5), st.lists(st.integers(0, 40), max_size=8))
def test_batch_depends_on_nothing_asked_before(lengths, S, batch_size, asked):
    used = PackedData(stream(lengths), S, 3, PAD)
    for step in asked:
        used.batch(step, batch_size)
    for step in (0, 7, *asked):
        assert same(used.batch(step, batch_size), PackedData(stream(lengths), S, 3, PAD).batch(step, batch_size))


def test_batches_run_on_across_epochs_and_equal_the_rows_they_name():
    data = PackedData(stream([9, 4, 17, 30, 2, 8]), 8, 5, PAD)
    rows = data.rows_in_epoch(0)
    assert rows % 3
    joined = [torch.cat(parts) for parts in zip(*(astuple(data.batch(step, 3)) for step in range(rows)), strict=True)]
    apart = [torch.cat(parts) for parts in zip(*(astuple(epoch_of(data, epoch)) for epoch in range(3)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined, apart, strict=True))
    assert same(data.batch(0, 4 * rows), data.rows(0, 4 * rows))


def test_order_changes_with_epoch_and_seed_but_the_rows_do_not():
    data, other = (PackedData(stream([9] * 40), 8, seed, PAD) for seed in (0, 1))
    orders = [epoch_of(data, 0), epoch_of(data, 1), epoch_of(other, 0)]
    for first, second in ((0, 1), (0, 2)):
        assert not same(orders[first], orders[second])
    assert len({tuple(sorted(order.tokens_BS[:, 0].tolist())) for order in orders}) == 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_fills_no_row_over_its_capacity_and_loses_no_piece(lengths):
    pieces, ends = best_fit(np.array(lengths), 20)
    assert sorted(pieces.tolist()) == list(range(len(lengths)))
    fills = [sum(lengths[piece] for piece in row) for row in np.split(pieces, ends[:-1])]
    assert max(fills) <= 20
    assert all(a + b > 20 for at, a in enumerate(fills) for b in fills[at + 1:]), "two rows could have been one"


def test_best_fit_chooses_the_fullest_row_that_still_takes_the_piece():
    pieces, ends = best_fit(np.array([6, 3, 7]), 10)
    assert [row.tolist() for row in np.split(pieces, ends[:-1])] == [[2, 1], [0]]


def test_short_documents_pack_with_little_padding():
    lengths = np.random.default_rng(0).integers(2, 200, 2000)
    data = PackedData(stream(lengths.tolist()), 512, 0, PAD)
    assert data.efficiency > 0.99
    batch = epoch_of(data)
    assert data.efficiency == pytest.approx((batch.targets_BS != IGNORE).double().mean().item())


def realistic(rng, kind):
    """Lengths in tokens as corpora have them: log-normal, with novels, or with many tiny files."""
    if kind == "web":
        return rng.lognormal(6.3, 1.1, 6000).astype(int) + 2
    if kind == "novels and code":
        return np.concatenate([rng.integers(60_000, 400_000, 20), rng.lognormal(7.2, 1.2, 3000).astype(int) + 2])
    return np.concatenate([rng.integers(3, 40, 8000), rng.lognormal(8, 1, 300).astype(int) + 2])


@pytest.mark.parametrize("S", [1024, 4096])
@pytest.mark.parametrize("kind", ["web", "novels and code", "tiny files and papers"])
def test_realistic_lengths_fill_more_than_97_percent_and_documents_that_fit_stay_whole(kind, S):
    lengths = realistic(np.random.default_rng(1), kind)
    data = PackedData(stream(lengths.tolist()), S, 0, PAD)
    assert data.efficiency > 0.97
    pieces = sum(-(-(length - 1) // S) for length in lengths.tolist())
    starts = sum(((batch := data.rows(first, 64)).positions_BS.eq(0) & batch.targets_BS.ne(IGNORE)).sum().item()
                 for first in range(0, data.rows_in_epoch(0) // 64 * 64, 64))
    rest = data.rows(data.rows_in_epoch(0) // 64 * 64, data.rows_in_epoch(0) % 64)
    assert starts + (rest.positions_BS.eq(0) & rest.targets_BS.ne(IGNORE)).sum().item() == pieces  # no more cuts than S asks for


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 24), st.integers(1, 4), st.integers(1, 4), st.integers(0, 12))
def test_ranks_and_a_resumed_run_read_the_rows_of_one_process(lengths, S, ranks, rows_a_rank, steps):
    """A rank reads its part of each global batch; whatever the number of ranks, and wherever a run begins again, it is the same."""
    alone = PackedData(stream(lengths), S, 7, PAD)
    whole = alone.batch(steps, ranks * rows_a_rank)
    resumed = PackedData(stream(lengths), S, 7, PAD)
    parts = [resumed.rows((steps * ranks + rank) * rows_a_rank, rows_a_rank) for rank in reversed(range(ranks))][::-1]
    assert all(torch.equal(torch.cat(pieces), joined)
               for pieces, joined in zip(zip(*map(astuple, parts), strict=True), astuple(whole), strict=True))


def test_batch_is_int64_and_reads_small_integers_without_overflow():
    tokens = SimpleNamespace(tokens=np.array([65535, 65534, 65533], dtype=np.uint16), lengths=np.array([3]))
    batch = PackedData(tokens, 4, 0, PAD).batch(0, 1)
    assert {tensor.dtype for tensor in astuple(batch)} == {torch.int64}
    assert batch.targets_BS.tolist() == [[65534, 65533, IGNORE, IGNORE]]


@pytest.mark.parametrize("lengths, S", [([1, 0], 4), ([], 4), ([5], 0)])
def test_nothing_to_predict_is_an_error(lengths, S):
    with pytest.raises(DataError):
        PackedData(stream(lengths), S, 0, PAD)
