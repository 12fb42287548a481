"""Sequences scattered over blocks and slots compute what whole passes compute."""

import pytest
import torch

from fathom import ops
from fathom.engine.paged_cache import PagedCache, Row
from fathom.model.cache import Moves
from tests.models import random_model, random_tokens, small_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return random_model(small_config([0, 4, 128]))


def paged(model, blocks=20, slots=4):
    cache = PagedCache(model.config, blocks, slots, torch.float32, CPU, mtp=1)
    for layer in cache._pages + cache._states:  # what an earlier sequence left behind must not matter
        for stream in (layer.entries, layer.keys):
            if stream is not None:
                stream.records_BMC.normal_()
    return cache


def whole(model, tokens):
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def test_ragged_rows_in_scattered_blocks_equal_whole_passes(model):
    cache = paged(model)
    lengths, blocks, slots = [300, 127, 5, 256], [[7, 2, 11], [3, 19], [12], [5, 9, 1]], [3, 0, 2, 1]
    texts = [random_tokens(model.config, length + 9, seed=seed) for seed, length in enumerate(lengths)]
    for text, length, mine, slot in zip(texts, lengths, blocks, slots, strict=True):
        for begin in range(0, length, 100):
            view = cache.view([Row(slot, mine, begin)], 4096)
            logits = model(text[None, begin:min(begin + 100, length)], cache=view).logits[0]
            torch.testing.assert_close(logits, whole(model, text)[begin:min(begin + 100, length)], atol=1e-4, rtol=0)
    done = [*lengths]
    for counts in ([1, 1, 1, 1], [3, 1, 2, 3], [2, 4, 1, 5]):
        rows = [Row(slot, mine, length) for slot, mine, length in zip(slots, blocks, done, strict=True)]
        longest = max(counts)
        batch = torch.stack([torch.nn.functional.pad(text[at:at + count], (0, longest - count))
                             for text, at, count in zip(texts, done, counts, strict=True)])
        logits = model(batch, cache=cache.view(rows, 4096), count_B=torch.tensor(counts)).logits
        for row, (text, at, count) in enumerate(zip(texts, done, counts, strict=True)):
            torch.testing.assert_close(logits[row, :count], whole(model, text)[at:at + count], atol=1e-4, rtol=0)
        done = [at + count for at, count in zip(done, counts, strict=True)]


@pytest.mark.parametrize("kept", [[0, 2], [1, 4], [3, 1]])
def test_forgetting_tokens_goes_back_to_where_they_were_not_seen(model, kept):
    """Rejected drafts, some of which complete blocks, leave no trace."""
    lengths, blocks, slots = [126, 254], [[4, 8], [2, 6, 1]], [2, 1]
    texts = [random_tokens(model.config, 300, seed=seed) for seed in (5, 6)]
    wrong = random_tokens(model.config, 2, 4, seed=9)

    def prefilled():
        cache = paged(model)
        for text, length, mine, slot in zip(texts, lengths, blocks, slots, strict=True):
            model(text[None, :length], cache=cache.view([Row(slot, mine, 0)], 4096))
        return cache

    cache = prefilled()
    view = cache.view([Row(slot, mine, at) for slot, mine, at in zip(slots, blocks, lengths, strict=True)], 4096, undo=True)
    batch = torch.stack([torch.cat([text[at:at + keep], junk[keep:]])
                         for text, at, keep, junk in zip(texts, lengths, kept, wrong, strict=True)])
    starts, counts = torch.tensor(lengths), torch.tensor([4, 4])
    model(batch, cache=view, count_B=counts)
    view.forget(torch.tensor(kept), Moves(starts, counts, 4))
    for text, at, keep, mine, slot in zip(texts, lengths, kept, blocks, slots, strict=True):
        logits = model(text[None, at + keep:at + 40], cache=cache.view([Row(slot, mine, at + keep)], 4096)).logits[0]
        torch.testing.assert_close(logits, whole(model, text)[at + keep:at + 40], atol=1e-4, rtol=0)


def test_a_state_and_its_blocks_move_to_other_places(model):
    cache, text = paged(model), random_tokens(model.config, 330)
    model(text[None, :300], cache=cache.view([Row(1, [4, 9, 2], 0)], 4096))
    cache.write_state(3, cache.read_state(1))
    for old, new in zip([4, 9, 2], [12, 13, 14], strict=True):
        cache.write_block(new, cache.read_block(old))
    cache.clear_state(1)
    logits = model(text[None, 300:], cache=cache.view([Row(3, [12, 13, 14], 300)], 4096)).logits[0]
    torch.testing.assert_close(logits, whole(model, text)[300:], atol=1e-4, rtol=0)


def test_reading_again_rebuilds_the_window_and_writes_no_entry(model):
    cache, text = paged(model), random_tokens(model.config, 700)
    blocks = [0, 1, 2, 3, 4, 5]
    model(text[None, :640], cache=cache.view([Row(0, blocks, 0)], 4096))
    before = [cache.read_block(block) for block in blocks[:5]]
    cache.clear_state(2)
    start = 640 - 3 * model.config.sliding_window
    view = cache.view([Row(2, blocks, start, frozen=640)], 4096)
    logits = model(text[None, start:], cache=view).logits[0]
    torch.testing.assert_close(logits[640 - start:], whole(model, text)[640:], atol=1e-4, rtol=0)
    for block, records in zip(blocks, before, strict=False):
        for name, page in cache.read_block(block).items():
            assert torch.equal(page, records[name])


@torch.no_grad()
def test_rows_that_decode_copy_the_entries_that_they_selected_and_no_others(model, monkeypatch):
    cache, texts, read = paged(model), random_tokens(model.config, 2, 301), []
    blocks = [[7, 2, 11], [3, 19, 1]]
    for slot, text in enumerate(texts):
        model(text[None, :300], cache=cache.view([Row(slot, blocks[slot], 0)], 4096))
    monkeypatch.setattr(ops, "unpack", lambda records, record: read.append(tuple(records.shape[:2])) or record.unpack(records))
    logits = model(texts[:, 300:], cache=cache.view([Row(0, blocks[0], 300), Row(1, blocks[1], 300)], 4096)).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, 0], whole(model, text)[300], atol=1e-4, rtol=0)
    assert (2, model.config.index_topk) in read
    assert read.count((2, 75)) == 1  # index keys


def test_sizes_are_those_of_the_tensors(model):
    cache = paged(model)
    assert cache.block_bytes() == sum(page.nbytes for page in cache.read_block(3).values())
    assert cache.state_bytes() == sum(state.nbytes for state in cache.read_state(2).values())
