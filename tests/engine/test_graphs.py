"""Recorded decoding: what a recording holds suffices for every later step, and the steps are those that are not recorded, bit for bit.

There is no CUDA graph on a CPU; a tape of the definitions stands for it.
"""

import pytest
import torch

import fathom
import fathom.engine.engine as engine_module
from fathom import ops
from fathom.checkpoint.layouts import use_rounding
from fathom.checkpoint.released import save_model
from fathom.engine.engine import Engine
from fathom.engine.graphs import Graphs, Steps, TapeRecorder
from fathom.engine.paged_cache import PagedCache, Row
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError
from fathom.ops.native.library import library
from fathom.ops.rounding import ReleasedRounding
from fathom.ops.tape import Unrecordable
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, random_tokens, small_config

RATIOS = [0, 4, 6, 4]  # blocks of 12 tokens
kernels = pytest.mark.skipif(library() is None, reason="there is no C compiler")


class StandIn(TapeRecorder):
    """Records as CUDA graphs are recorded: one for all steps, whatever blocks they complete."""

    apart = False


def experts_without_sizes(x_NW, expert_NK, weight_NK, gate_EFW, up_EFW, down_EWF, limit, rounding=ops.EXACT):
    """The definition asks how many tokens an expert has; here every expert gets all tokens, and those that did not choose it count nothing."""
    total_NW = torch.zeros_like(x_NW)
    for expert in range(len(gate_EFW)):
        weight_N1 = (weight_NK * (expert_NK == expert)).sum(1, keepdim=True)
        hidden_NF = ops.clamped_swiglu(x_NW @ gate_EFW[expert].T, x_NW @ up_EFW[expert].T, limit) * weight_N1
        total_NW = total_NW + hidden_NF @ down_EWF[expert].T
    return total_NW


@pytest.fixture(params=["definitions, as a graph", pytest.param("kernels", marks=kernels)])
def record(request, monkeypatch):
    """A recorder of the definitions, or of the kernels, for engines too."""
    recorder = TapeRecorder() if request.param == "kernels" else StandIn()
    monkeypatch.setattr(engine_module, "_recorder", lambda model, settings: recorder if settings.graphs else None)
    if request.param == "kernels":
        yield recorder
        return
    monkeypatch.setattr(ops.routed_experts, "definition", experts_without_sizes)
    with ops.using("definition"):
        yield recorder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a small page of text"] * 3, 300)


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(RATIOS, vocab_size=320, sliding_window=8, index_topk=3))


def written(engine, requests):
    numbers, found = [engine.add(request) for request in requests], {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request, output.choice), []).extend(output.tokens)
    return [found[key] for key in sorted(found) if key[0] in numbers]


def requests_for(model):
    shared = random_tokens(model.config, 30, seed=9).tolist()
    return [Request((*shared, *random_tokens(model.config, 1 + 7 * index, seed=index).tolist()),
                    Sampling(temperature=0.8 * (index % 2), seed=index, max_tokens=25, logprobs=0, ignore_eos=True), choices=1 + (index == 3))
            for index in range(5)]


def test_an_engine_with_graphs_writes_what_it_writes_without(record, model, tokenizer):
    plain, recorded = (Engine(model, tokenizer, settings=EngineSettings(cache_bytes=1 << 20, running=3, graphs=graphs)) for graphs in (False, True))
    expected, got = written(plain, requests_for(model)), written(recorded, requests_for(model))
    assert [[one.token for one in row] for row in got] == [[one.token for one in row] for row in expected]
    for row, other in zip(got, expected, strict=True):
        bound = {"rtol": 0, "atol": 0} if record.apart else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close([one.logprob for one in row], [one.logprob for one in other], **bound)
    assert len(recorded._runner.graphs.recordings) >= 4  # of several numbers of rows and of blocks, each used for several steps


def test_a_cache_in_the_released_formats_can_be_recorded_too(record):
    model = random_model(small_config(RATIOS, sliding_window=8, index_topk=3, head_dim=80, qk_rope_head_dim=16, index_head_dim=32))
    use_rounding(model, ReleasedRounding(model.config.qk_rope_head_dim), set())
    tokens, dense = random_tokens(model.config, 2, 30), model.new_cache(2, 36, quantized=True)
    graphs = Graphs(model, PagedCache(model.config, 7, 3, torch.float32, torch.device("cpu"), quantized=True), Row(2, [6], 0), record)
    for step in range(30):
        got_BV = graphs.step([Row(0, [4, 1, 0], step), Row(1, [2, 5, 3], step)], tokens[:, step].tolist())
        torch.testing.assert_close(got_BV, model(tokens[:, step:step + 1], cache=dense).logits[:, 0], rtol=1e-4, atol=1e-4)


def test_one_recording_serves_all_rows_and_lengths_and_leaves_other_memory_alone(record, model):
    cache = PagedCache(model.config, 9, 5, torch.float32, torch.device("cpu"))
    graphs = Graphs(model, cache, Row(4, [8], 0), record)
    tokens = random_tokens(model.config, 3, 40)
    rows = [(2, [5, 0, 3, 1]), (0, [2, 7, 4, 6])]
    for first in (0, 13):  # the second time from the middle of a block on, and after a prefill
        for slot in range(4):
            cache.clear_state(slot)
        if first:
            with torch.inference_mode():
                model(tokens[:2, :first], cache=cache.view([Row(slot, blocks, 0) for slot, blocks in rows], 48))
        alone = {slot: cache.read_state(slot) for slot in (1, 3)}
        for step in range(first, 40):
            got_BV = graphs.step([Row(slot, blocks, step) for slot, blocks in rows], tokens[:2, step].tolist())
            with torch.no_grad():
                torch.testing.assert_close(got_BV, model(tokens[:2, :step + 1]).logits[:, -1], rtol=1e-4, atol=1e-4)
        assert len(graphs.recordings) == (4 if record.apart else 1)  # none, or blocks of 4, 6 or 12 tokens complete
        for slot, state in alone.items():
            assert all(torch.equal(part, state[name]) for name, part in cache.read_state(slot).items())


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_of_a_plain_cache_are_the_models_bit_for_bit_to_its_last_place(rows, dtype):
    model = random_model(small_config(RATIOS, sliding_window=8, index_topk=3)).to(dtype)
    tokens, counts = random_tokens(model.config, rows, 60), torch.tensor([17, 3, 9][:rows])
    recorded, plain = (model.new_cache(rows, 58) for _ in range(2))
    for cache in (recorded, plain):
        model(tokens[:, :17], cache=cache, count_B=counts)
    steps = Steps(model, recorded)
    for step in range(17, 58):
        expected = model(tokens[:, step:step + 1], cache=plain).logits[:, 0]
        assert torch.equal(steps.step(tokens[:, step].tolist()), expected)
        assert torch.equal(recorded.length_B, plain.length_B)
    assert 3 <= len(steps._recordings) <= 4
    for one, other in zip(recorded.layers, plain.layers, strict=True):
        assert torch.equal(one.window.items_BRC, other.window.items_BRC)
        if one.entries is not None:
            assert torch.equal(one.entries.records_BMC[:, :57 // 6], other.entries.records_BMC[:, :57 // 6])
    with pytest.raises(InputError, match="longer than the cache holds, 58"):
        steps.step([0] * rows)
    with pytest.raises(InputError, match="token id 300 is outside the vocabulary"):
        Steps(model, model.new_cache(1, 58)).step([300])


def test_steps_of_another_attention_are_the_models():
    model = random_model(small_config([0, 0], attention="gqa", num_hash_layers=0))
    tokens, caches = random_tokens(model.config, 2, 9), [model.new_cache(2, 9) for _ in range(2)]
    steps = Steps(model, caches[0])
    assert steps._recordings is None
    for step in range(9):
        assert torch.equal(steps.step(tokens[:, step].tolist()), model(tokens[:, step:step + 1], cache=caches[1]).logits[:, 0])


@kernels
def test_packed_weights_and_weights_that_are_moved_afterwards_are_read_anew(tmp_path):
    save_model(random_model(small_config(RATIOS)), tmp_path / "model", layout="official-fp4")
    model = fathom.load_model(tmp_path / "model", torch.bfloat16, packed=True, simulate_quantization=True)
    tokens, caches = random_tokens(model.config, 2, 50), [model.new_cache(2, 50, quantized=True) for _ in range(2)]
    steps = Steps(model, caches[0])
    for step in range(30):
        if step == 20:
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.is_floating_point() and weight.dtype is torch.bfloat16:
                        weight.mul_(0.75)
        if step == 25:
            for weight in model.parameters():  # to another place, with other numbers in it
                weight.data = weight.data * 2 if weight.dtype is torch.bfloat16 else weight.data.clone()
        assert torch.equal(steps.step(tokens[:, step].tolist()), model(tokens[:, step:step + 1], cache=caches[1]).logits[:, 0])
    assert all(steps._recordings._made.values()) and len(steps._recordings) > 4


def test_where_a_step_cannot_be_recorded_it_is_made_as_ever(model, tokenizer, monkeypatch):
    """The definition of experts asks how many tokens each has; and some steps make more than a tape may keep."""
    settings = [EngineSettings(cache_bytes=1 << 20, running=3, graphs=graphs) for graphs in (False, None)]
    with ops.using("definition"):
        expected, got = (written(engine, requests_for(model)) for engine in (Engine(model, tokenizer, settings=each) for each in settings))
    assert got == expected
    monkeypatch.setattr("fathom.engine.graphs._TAPE_BYTES", 1 << 14)
    with pytest.raises(Unrecordable):
        TapeRecorder()(lambda: torch.ones(1 << 13) + 1)
    plain, recorded = (Engine(model, tokenizer, settings=each) for each in settings)
    assert written(recorded, requests_for(model)) == written(plain, requests_for(model))
    graphs = recorded._runner.graphs
    assert graphs._refused and len(graphs.recordings) == len(graphs._refused) <= 2  # what is larger is not even tried


@kernels
def test_of_many_recordings_those_used_last_are_kept(model, monkeypatch):
    monkeypatch.setattr("fathom.engine.graphs._MOST", 3)
    cache = PagedCache(model.config, 40, 9, torch.float32, torch.device("cpu"))
    graphs, tokens = Graphs(model, cache, Row(8, [39], 0), TapeRecorder()), random_tokens(model.config, 1, 30)
    for step in range(30):  # what other rows are there changes
        many = 1 + step % 6
        got_BV = graphs.step([Row(slot, [3 * slot, 3 * slot + 1, 3 * slot + 2], step if slot == 0 else step % 5) for slot in range(many)], [int(tokens[0, step])] * many)
        with torch.no_grad():
            torch.testing.assert_close(got_BV[0], model(tokens[:, :step + 1]).logits[0, -1], rtol=1e-4, atol=1e-4)
        assert len(graphs.recordings) <= 3


def test_graphs_are_of_v4s_attention_and_one_token_a_step(model, tokenizer):
    with pytest.raises(InputError, match="attention 'gqa' reads as many keys as there are tokens"):
        Engine(random_model(small_config([0, 0], vocab_size=320, attention="gqa", num_hash_layers=0)), tokenizer, settings=EngineSettings(graphs=True))
    with pytest.raises(InputError, match="graphs are of one token a step, but drafts is 2"):
        EngineSettings(graphs=True, drafts=2)
    assert Engine(model, tokenizer)._runner.graphs is not None and Engine(model, tokenizer, settings=EngineSettings(graphs=False))._runner.graphs is None
