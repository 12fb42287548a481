"""Recorded decoding: what a recording holds suffices for every later step, and what it does may be recorded.

There is no CUDA graph on a CPU; a tape stands for it.
"""

import pytest
import torch

import fathom.engine.engine as engine_module
from fathom import ops
from fathom.checkpoint.layouts import use_rounding
from fathom.engine.engine import Engine
from fathom.engine.graphs import Graphs
from fathom.engine.paged_cache import PagedCache, Row
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError
from fathom.ops.rounding import ReleasedRounding
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, random_tokens, small_config
from tests.tapes import Tape

RATIOS = [0, 4, 6, 4]  # blocks of 12 tokens


def record(step):
    step()  # as before a graph: what is made once and kept is made
    tape = Tape()
    with tape:
        out = step()
    return out, tape.replay


def experts_without_sizes(x_NW, expert_NK, weight_NK, gate_EFW, up_EFW, down_EWF, limit, rounding=ops.EXACT):
    """The definition asks how many tokens an expert has; here every expert gets all tokens, and those that did not choose it count nothing."""
    total_NW = torch.zeros_like(x_NW)
    for expert in range(len(gate_EFW)):
        weight_N1 = (weight_NK * (expert_NK == expert)).sum(1, keepdim=True)
        hidden_NF = ops.clamped_swiglu(x_NW @ gate_EFW[expert].T, x_NW @ up_EFW[expert].T, limit) * weight_N1
        total_NW = total_NW + hidden_NF @ down_EWF[expert].T
    return total_NW


@pytest.fixture
def taped(monkeypatch):
    """Engines may have graphs, which are tapes of the definitions."""
    monkeypatch.setattr(engine_module, "_recorder", lambda model: record)
    monkeypatch.setattr(ops.routed_experts, "definition", experts_without_sizes)
    with ops.using("definition"):
        yield


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


def test_an_engine_with_graphs_writes_what_it_writes_without(taped, model, tokenizer):
    shared = random_tokens(model.config, 30, seed=9).tolist()
    requests = [Request((*shared, *random_tokens(model.config, 1 + 7 * index, seed=index).tolist()),
                        Sampling(temperature=0.8 * (index % 2), seed=index, max_tokens=25, logprobs=0, ignore_eos=True), choices=1 + (index == 3))
                for index in range(5)]
    plain, recorded = (Engine(model, tokenizer, settings=EngineSettings(cache_bytes=1 << 20, running=3, graphs=graphs)) for graphs in (False, True))
    expected, got = written(plain, requests), written(recorded, requests)
    assert [[one.token for one in row] for row in got] == [[one.token for one in row] for row in expected]
    for row, other in zip(got, expected, strict=True):
        torch.testing.assert_close([one.logprob for one in row], [one.logprob for one in other], rtol=1e-4, atol=1e-4)
    assert len(recorded._runner.graphs._recordings) >= 4  # of several numbers of rows and of blocks, each used for several steps


def test_a_cache_in_the_released_formats_can_be_recorded_too(taped):
    model = random_model(small_config(RATIOS, sliding_window=8, index_topk=3, head_dim=80, qk_rope_head_dim=16, index_head_dim=32))
    use_rounding(model, ReleasedRounding(model.config.qk_rope_head_dim), set())
    tokens, dense = random_tokens(model.config, 2, 30), model.new_cache(2, 36, quantized=True)
    graphs = Graphs(model, PagedCache(model.config, 7, 3, torch.float32, torch.device("cpu"), quantized=True), Row(2, [6], 0), record)
    for step in range(30):
        got_BV = graphs.step([Row(0, [4, 1, 0], step), Row(1, [2, 5, 3], step)], tokens[:, step].tolist())
        torch.testing.assert_close(got_BV, model(tokens[:, step:step + 1], cache=dense).logits[:, 0], rtol=1e-4, atol=1e-4)


def test_one_recording_serves_all_rows_and_lengths_and_leaves_other_memory_alone(taped, model):
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
        assert len(graphs._recordings) == 1
        for slot, state in alone.items():
            assert all(torch.equal(part, state[name]) for name, part in cache.read_state(slot).items())


def test_graphs_need_a_gpu_and_one_token_a_step(model, tokenizer):
    with pytest.raises(InputError, match="graphs are CUDA's, but the model is on cpu"):
        Engine(model, tokenizer, settings=EngineSettings(graphs=True))
    with pytest.raises(InputError, match="attention 'gqa' reads as many keys as there are tokens"):
        Engine(random_model(small_config([0, 0], vocab_size=320, attention="gqa", num_hash_layers=0)), tokenizer, settings=EngineSettings(graphs=True))
    with pytest.raises(InputError, match="graphs are of one token a step, but drafts is 2"):
        EngineSettings(graphs=True, drafts=2)
