"""The cache in the released formats: its bytes, and that it changes no number of a model that rounds like the release.

Float32 sums differ by 1e-7 with the shape of a call, which now and then moves a number to the next FP8 or FP4 value, and the
layers behind carry that on. Splits and batches are therefore compared in float64, where a rounding is never moved and a wrong
token is told from a rounding; of float32 what can be asked is that hardly a record and hardly a logit differs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fathom
from fathom import ops
from fathom.accounting import released_cache_bytes
from fathom.checkpoint.layouts import use_rounding
from fathom.checkpoint.released import save_model
from fathom.errors import InputError
from fathom.model.cache import Stream
from fathom.ops.rounding import ReleasedRounding
from fathom.quant.records import EntryRecord, KeyRecord
from tests.models import random_model, random_tokens, small_config

ODD = small_config([0, 4, 128, 3, 17], sliding_window=20, num_hash_layers=2, hidden_size=72, head_dim=100, qk_rope_head_dim=16,
                   index_head_dim=40, moe_intermediate_size=34, max_position_embeddings=1 << 20)
RELEASED = small_config([0, 4, 128], sliding_window=16, head_dim=512, qk_rope_head_dim=64, index_head_dim=128, index_n_heads=8,
                        max_position_embeddings=1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "model"
    save_model(random_model(ODD), path, layout="official-fp4")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return fathom.load_model(folder, dtype=torch.float64, simulate_quantization=True)


def rounding_model(config, dtype=torch.float32):
    model = random_model(config).to(dtype)
    use_rounding(model, ReleasedRounding(config.qk_rope_head_dim), set())
    return model


def in_chunks(model, tokens, sizes, quantized=True):
    """Logits of all chunks, and the cache behind them."""
    cache = model.new_cache(tokens.shape[0], tokens.shape[1], quantized)
    return torch.cat([model(chunk, cache=cache).logits for chunk in tokens.split(sizes, 1)], 1), cache


def records(cache):
    """The records of each layer's window, entries and index keys, with what they unpack to."""
    found = {}
    for layer, state in enumerate(cache.layers):
        found[layer, "window"] = state.window.items_BRC, state.window.record
        found |= {(layer, part): (stream.records_BMC, stream.record)
                  for part, stream in (("entries", state.entries), ("keys", state.keys)) if stream is not None}
    return {place: (tensor, record.unpack(tensor)) for place, (tensor, record) in found.items()}


# ---- bytes

@torch.no_grad()
def test_an_entry_is_584_bytes_and_an_index_key_68():
    model = rounding_model(RELEASED, torch.bfloat16)
    cache = model.new_cache(2, 640, quantized=True)
    model(random_tokens(RELEASED, 2, 640), cache=cache)
    stored = records(cache)
    items = {(0, "window"): 16, (1, "window"): 16, (2, "window"): 16, (1, "entries"): 160, (1, "keys"): 160, (2, "entries"): 5}
    assert {place: tensor.nbytes for place, (tensor, _) in stored.items()} == {
        (layer, part): 2 * count * (68 if part == "keys" else 584) for (layer, part), count in items.items()}
    for (_, part), (_, unpacked) in stored.items():  # all of them are in use
        assert unpacked.shape[-1] == (128 if part == "keys" else 512) and unpacked.any(-1).all()


@pytest.mark.parametrize("config", [RELEASED, ODD], ids=["released", "odd"])
def test_a_further_token_costs_what_the_accounting_says(config):
    model, block = rounding_model(config, torch.bfloat16), 4 * 128 * 3 * 17  # a multiple of every ratio
    accounted, sizes = released_cache_bytes(config), []
    for tokens in (block, 2 * block, 4 * block):
        cache = model.new_cache(1, tokens, quantized=True)
        tails = sum(stream.tail.items_BRC.nbytes for layer in cache.layers for stream in (layer.entries, layer.keys) if stream)
        assert cache.nbytes - tails == accounted.at(tokens)
        sizes.append(cache.nbytes)
    assert sizes[1] - sizes[0] == accounted.per_token * block and sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])
    plain = [model.new_cache(1, tokens).nbytes for tokens in (block, 2 * block)]
    assert plain[1] - plain[0] > 1.5 * (sizes[1] - sizes[0])


# ---- numbers

@pytest.mark.parametrize("sizes", [[150], [1] * 30, [1, 60, 1, 1, 80, 7], [129] + [1] * 21])
@torch.no_grad()
def test_in_bfloat16_the_quantized_cache_changes_no_bit(folder, sizes):
    model = fathom.load_model(folder, dtype=torch.bfloat16, simulate_quantization=True)
    tokens = random_tokens(ODD, 2, sum(sizes))
    (quantized, packed), (plain, unpacked) = (in_chunks(model, tokens, sizes, kind) for kind in (True, False))
    assert torch.equal(quantized, plain) and plain.std() > 0.3
    for place, (tensor, numbers) in records(packed).items():
        assert tensor.dtype == torch.uint8 and numbers.dtype == torch.bfloat16
        assert torch.equal(numbers, records(unpacked)[place][0]), place


@torch.no_grad()
def test_in_bfloat16_the_released_sizes_change_no_bit():
    model, tokens = rounding_model(RELEASED, torch.bfloat16), random_tokens(RELEASED, 1, 150)
    sizes = [131, 1, 1, 17]
    assert torch.equal(in_chunks(model, tokens, sizes)[0], in_chunks(model, tokens, sizes, quantized=False)[0])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 140), min_size=1, max_size=5), decoded=st.integers(0, 12), seed=st.integers(0, 5))
def test_any_split_of_the_prefill_and_decoding_give_the_same_logits_and_records(model, sizes, decoded, seed):
    sizes = sizes + [1] * decoded
    tokens = random_tokens(ODD, 1, sum(sizes), seed=seed)
    with torch.no_grad():
        (split, some), (whole, one) = in_chunks(model, tokens, sizes), in_chunks(model, tokens, [sum(sizes)])
    torch.testing.assert_close(split, whole, atol=1e-9, rtol=0)
    for place, (tensor, _) in records(some).items():
        assert torch.equal(tensor, records(one)[place][0]), place


@torch.no_grad()
def test_rows_of_a_ragged_batch_equal_the_same_rows_alone(model):
    lengths = torch.tensor([[5, 1, 130, 1, 1], [131, 1, 7, 0, 1], [1, 1, 1, 1, 0], [64, 64, 64, 1, 1]])
    rows = [random_tokens(ODD, int(total), seed=b) for b, total in enumerate(lengths.sum(1))]
    cache = model.new_cache(4, 200, quantized=True)
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
        alone, own = in_chunks(model, row[None], [len(row)])
        torch.testing.assert_close(torch.cat(got[b]), alone[0], atol=1e-9, rtol=0)
        for place, (tensor, _) in records(own).items():
            assert torch.equal(records(cache)[place][0][b, :tensor.shape[1]], tensor[0]), place


@torch.no_grad()
def test_a_decoded_token_unpacks_the_entries_that_it_selected_and_no_others(model, monkeypatch):
    tokens, read = random_tokens(ODD, 2, 401), []

    def unpack(found, record):
        read.append((type(record), found.shape[1]))
        return record.unpack(found)

    def decoded():
        cache = model.new_cache(2, 401, quantized=True)
        model(tokens[:, :400], cache=cache)
        read.clear()
        monkeypatch.setattr(ops, "unpack", unpack)
        return model(tokens[:, 400:], cache=cache).logits

    logits = decoded()
    assert [count for kind, count in read if kind is EntryRecord and count > ODD.sliding_window] == [400 // 17]  # HCA's, of which none is selected
    assert read.count((EntryRecord, ODD.index_topk)) == 2  # of both CSA layers
    assert not [count for kind, count in read if kind is KeyRecord]  # index keys go to their one reader as they lie
    monkeypatch.setattr(Stream, "lies_ready", True)  # as if all of them were there anyway
    torch.testing.assert_close(logits, decoded(), atol=1e-12, rtol=0)
    assert (EntryRecord, 400 // 4) in read


@torch.no_grad()
def test_the_quantized_cache_is_felt_in_float64_only_through_bfloat16_rotary_channels(model):
    """FP8 and FP4 hold what the model rounded already; the rotary channels lose bits that a bfloat16 model does not have."""
    tokens = random_tokens(ODD, 1, 150)
    _, cache = in_chunks(model, tokens, [150])
    _, plain = in_chunks(model, tokens, [150], quantized=False)
    unpacked, kept = records(cache)[0, "window"][1], records(plain)[0, "window"][0]
    rotary = ODD.qk_rope_head_dim
    assert torch.equal(unpacked[..., :-rotary], kept[..., :-rotary])
    assert torch.equal(unpacked[..., -rotary:], kept[..., -rotary:].bfloat16().double())
    assert not torch.equal(unpacked[..., -rotary:], kept[..., -rotary:])


@torch.no_grad()
def test_in_float32_a_split_moves_hardly_a_record_or_a_logit(folder):
    """Where one number is moved to the next value of its format, all that follows it may be: so of most prompts and parts."""
    model, shares = fathom.load_model(folder, simulate_quantization=True), []
    for seed in range(4):
        tokens = random_tokens(ODD, 2, 200, seed=seed)
        (split, some), (whole, one) = (in_chunks(model, tokens, sizes) for sizes in ([1, 61, 100] + [1] * 38, [200]))
        expected = records(one)
        shares += [float((tensor == expected[place][0]).float().mean()) for place, (tensor, _) in records(some).items()]
        assert (split - whole).abs().median() < 1e-6 and whole.std() > 0.3
    assert torch.tensor(shares).median() > 0.999 and min(shares) > 0.3


def test_only_a_model_that_rounds_gets_a_quantized_cache(folder):
    exact = fathom.load_model(folder)
    with pytest.raises(InputError, match="simulate_quantization=True") as error:
        exact.new_cache(1, 10, quantized=True)
    assert "\n" not in str(error.value)
    assert exact.new_cache(1, 10).nbytes > 0
