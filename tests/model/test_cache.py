"""One program for whole sequences, chunks and single tokens: any split, any raggedness, the same logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.engine.paged_cache import PagedCache, Row
from fathom.errors import InputError
from fathom.model.cache import Moves, Ring
from fathom.model.transformer import Transformer
from fathom.quant.records import PlainRecord
from tests.models import random_model, random_tokens, small_config

MIXED = small_config([0, 4, 128, 3, 17], sliding_window=20, num_hash_layers=2)


@pytest.fixture(scope="module")
def model():
    return random_model(MIXED).double()  # exact enough to tell a wrong token from a rounding


def in_chunks(model, tokens, sizes, max_tokens=None):
    cache = model.new_cache(tokens.shape[0], max_tokens or tokens.shape[1])
    out, begin = [], 0
    for size in sizes:
        out.append(model(tokens[:, begin:begin + size], cache=cache).logits)
        begin += size
    return torch.cat(out, 1)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 140), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_any_split_of_the_prefill_gives_the_same_logits(model, sizes, seed):
    tokens = random_tokens(MIXED, 1, sum(sizes), seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(model, tokens, sizes), model(tokens).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("prefill", [1, 20, 127, 128, 129])
@torch.no_grad()
def test_prefill_then_decoding_token_by_token_equals_one_pass(model, prefill):
    tokens = random_tokens(MIXED, 2, prefill + 30)
    sizes = [prefill] + [1] * 30
    torch.testing.assert_close(in_chunks(model, tokens, sizes), model(tokens).logits, atol=1e-10, rtol=0)


@torch.no_grad()
def test_float32_chunks_and_decoding_equal_one_pass_to_1e_5():
    config = small_config([0, 4, 128, 4])
    model = Transformer(config).initialise(0).eval()
    model.head.weight.data *= 20
    tokens = random_tokens(config, 2, 420)
    whole = model(tokens).logits
    assert whole.std() > 0.5
    torch.testing.assert_close(in_chunks(model, tokens, [1, 255, 130] + [1] * 34), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_ragged_batch_equal_the_same_rows_alone(model):
    lengths = torch.tensor([[5, 1, 130, 1, 1], [131, 1, 7, 0, 1], [1, 1, 1, 1, 0], [64, 64, 64, 1, 1]])
    rows = [random_tokens(MIXED, int(total), seed=b) for b, total in enumerate(lengths.sum(1))]
    cache = model.new_cache(4, 260)
    got, done = [[] for _ in rows], [0] * 4
    for counts in lengths.T:
        chunk = torch.zeros(4, int(counts.max()), dtype=torch.int64)
        for b, count in enumerate(counts.tolist()):
            chunk[b, :count] = rows[b][done[b]:done[b] + count]
        logits = model(chunk, cache=cache, count_B=counts).logits
        for b, count in enumerate(counts.tolist()):
            got[b].append(logits[b, :count])
            done[b] += count
    for b, row in enumerate(rows):
        torch.testing.assert_close(torch.cat(got[b]), model(row[None]).logits[0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_last_only_gives_each_rows_last_new_token(model):
    tokens, counts = random_tokens(MIXED, 2, 30), torch.tensor([30, 11])
    whole = model(tokens, cache=model.new_cache(2, 30), count_B=counts).logits
    last = model(tokens, cache=model.new_cache(2, 30), count_B=counts, last_only=True).logits
    torch.testing.assert_close(last[:, 0], whole[[0, 1], [29, 10]], atol=1e-10, rtol=0)


def test_memory_grows_only_through_compressed_entries(model):
    sizes = [model.new_cache(1, tokens).nbytes for tokens in (204, 408, 612)]
    entry = 8 * (MIXED.head_dim / 4 + MIXED.head_dim / 128 + MIXED.head_dim / 3 + MIXED.head_dim / 17
                 + MIXED.index_head_dim * (1 / 4 + 1 / 3))
    assert abs((sizes[1] - sizes[0]) - 204 * entry) < 4 * 8 * MIXED.head_dim  # up to one entry a layer
    assert abs((sizes[2] - sizes[1]) - 204 * entry) < 4 * 8 * MIXED.head_dim
    window_only = random_model(small_config([0, 0]))
    assert window_only.new_cache(1, 10).nbytes == window_only.new_cache(1, 4000).nbytes


def test_a_cached_forward_keeps_no_gradients(model):
    logits = model(random_tokens(MIXED, 1, 4), cache=model.new_cache(1, 8)).logits
    assert not logits.requires_grad


def test_too_many_tokens_for_the_cache_or_the_model_is_one_clear_line(model):
    cache = model.new_cache(1, 10)
    model(random_tokens(MIXED, 1, 8), cache=cache)
    with pytest.raises(InputError, match="11 tokens is longer than the cache holds, 10"):
        model(random_tokens(MIXED, 1, 3), cache=cache)
    with pytest.raises(InputError, match="max_position_embeddings of 4096"):
        model.new_cache(1, 5000)
    with pytest.raises(InputError, match="4097 tokens is longer than the model"):
        model(torch.zeros(1, 4097, dtype=torch.int64))
    with pytest.raises(InputError, match="1 rows"):
        model(random_tokens(MIXED, 2, 1), cache=cache)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), size=st.integers(1, 6))
def test_ring_holds_the_last_items_of_each_row(counts, size):
    ring = Ring(2, size, PlainRecord(1, torch.float32), torch.device("cpu"))
    seen = [0, 0]
    for pair in counts:
        new = torch.full((2, max(max(pair), 1), 1), -1.0)
        for row in (0, 1):
            new[row, :pair[row], 0] = torch.arange(seen[row], seen[row] + pair[row]) + 1.0
        ring.extend(new, Moves(torch.tensor(seen), torch.tensor(pair), new.shape[1]))
        seen = [seen[0] + pair[0], seen[1] + pair[1]]
        for row in (0, 1):
            for position in range(max(seen[row] - size, 0), seen[row]):
                assert ring.items_BRC[row, position % size, 0] == position + 1


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=3, max_size=3), count=st.integers(1, 9), paged=st.booleans(),
       rows=st.sets(st.integers(0, 2)))
def test_what_a_call_joins_can_be_limited_to_rows_and_filled_slots(lengths, count, paged, rows):
    size, form = 8, small_config([128], sliding_window=8)
    torch.manual_seed(count)
    if paged:
        cache = PagedCache(form, 4, 5, torch.float32, torch.device("cpu"))
        places = [Row(slot, [slot - 1], length) for slot, length in zip((2, 4, 1), lengths, strict=True)]
        rings = [cache.view(places, 64).layers[0].window for _ in range(2)]
        held = rings[0].pool_SRC
    else:
        rings = [Ring(3, size, PlainRecord(form.head_dim, torch.float32), torch.device("cpu"))] * 2
        held = rings[0].items_BRC
    held.copy_(torch.randn_like(held))
    before, new = held.clone(), torch.randn(3, count, form.head_dim)
    moves, rows_R = Moves(torch.tensor(lengths), torch.full((3,), count), count), torch.tensor(sorted(rows), dtype=torch.int64)
    whole, after = rings[0].extend(new, moves), held.clone()
    held.copy_(before)
    slots = min(size, moves.longest + (count == 1))
    part = rings[1].extend(new, moves, rows_R, slots)
    assert torch.equal(held, after)
    if count == 1:  # in its slot already
        assert torch.equal(part, rings[1].items(rows_R, slots))
    else:
        assert len(part) == len(rows) and torch.equal(part, torch.cat([whole[:, :slots], whole[:, size:]], 1)[rows_R][:, :part.shape[1]])
