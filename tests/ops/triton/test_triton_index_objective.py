"""The indexer's objective with Triton's kernels, some queries at a time: the definition's value and gradients."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.index_objective import index_objective
from fathom.ops.triton import index_objective as module
from fathom.ops.triton.index_objective import index_objective_triton
from tests.ops.test_attention import CASES
from tests.ops.test_index_objective import REACHING, arguments_of


def values_and_gradients(name, dtype, attention_arguments):
    arguments = arguments_of(attention_arguments, dtype)
    with ops.using(name):
        assert index_objective.choose(*arguments)[0] == name
        loss = index_objective(*arguments)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return [loss.detach(), *torch.autograd.grad(3 * loss, arguments[:3], allow_unused=True)]


@pytest.mark.parametrize("scores", [200, 1 << 26])  # some queries at a time, all
@pytest.mark.parametrize("attention_arguments", REACHING.values(), ids=REACHING.keys())
def test_it_is_the_definition_in_value_and_gradients(attention_arguments, scores, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_SCORES", scores)
    expected = values_and_gradients("definition", torch.float64, attention_arguments)
    found = values_and_gradients("triton", torch.float32, attention_arguments)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.double(), torch.zeros_like(other).double() if one is None else one, atol=1e-5, rtol=1e-4)


def test_attention_gets_no_gradient_and_two_runs_the_same_bits(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_SCORES", 300)
    runs = []
    for _ in range(2):
        arguments = arguments_of(CASES["packed, selected"], torch.float32)
        q, window, entries, sink = arguments[3:]
        with ops.using("triton"):
            loss = index_objective(*arguments)
            others = torch.autograd.grad(loss, [q, window.kv_BTD, entries.kv_BMD, sink], allow_unused=True, retain_graph=True)
            assert others == (None,) * 4
            runs.append([loss.detach(), *torch.autograd.grad(loss, arguments[:3])])
            with torch.no_grad():
                assert torch.equal(index_objective(*arguments), loss)
    assert all(map(torch.equal, *runs)) and runs[0][0] > 0


def test_in_bfloat16_gradients_are_summed_in_float32(monkeypatch):
    attention_arguments = CASES["packed, selected"]
    whole = values_and_gradients("triton", torch.bfloat16, attention_arguments)
    monkeypatch.setattr(module, "_CHUNK_SCORES", 1)
    for one, other in zip(whole, values_and_gradients("triton", torch.bfloat16, attention_arguments), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other.float(), one.float(), atol=0.01 * float(one.abs().max()), rtol=0.02)


def test_float64_is_the_definitions():
    with ops.using("triton"):
        assert index_objective.choose(*arguments_of(CASES["packed, selected"], torch.float64))[1] is not index_objective_triton
