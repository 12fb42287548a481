"""The indexer's objective: block by block it is the definition, in value and gradients, and the rest of attention gets none."""

import pytest
import torch

from fathom import ops
from fathom.ops.index_objective import index_objective
from tests.ops.test_attention import CASES, cast

REACHING = {name: arguments for name, arguments in CASES.items() if arguments[2] is not None}


def arguments_of(attention_arguments, dtype, heads=3, channels=6):
    """Queries, head weights and keys of an indexer (leaves) before the arguments of its layer's attention."""
    q, window, entries, sink = cast(attention_arguments, dtype)
    generator = torch.Generator().manual_seed(7)
    B, S, M = *q.shape[:2], entries.kv_BMD.shape[1]
    learned = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
               for shape in ((B, S, heads, channels), (B, S, heads), (B, M, channels))]
    return [*learned, q, window, entries, sink]


@pytest.mark.parametrize("attention_arguments", REACHING.values(), ids=REACHING.keys())
def test_block_by_block_it_is_the_definition_in_value_and_gradients(attention_arguments):
    results = []
    for implementation, dtype in (("definition", torch.float64), ("cpu", torch.float32)):
        arguments = arguments_of(attention_arguments, dtype)
        with ops.using(implementation):
            assert index_objective.choose(*arguments)[0] == implementation
            loss = index_objective(*arguments)
        results.append([loss.detach(), *torch.autograd.grad(3 * loss, arguments[:3], allow_unused=True)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), torch.zeros_like(found).double() if expected is None else expected,
                                   atol=1e-5, rtol=1e-4)


def test_attention_gets_no_gradient_and_two_runs_the_same_bits():
    runs = []
    for _ in range(2):
        arguments = arguments_of(CASES["packed, selected"], torch.float32)
        q, window, entries, sink = arguments[3:]
        loss = index_objective(*arguments)
        others = torch.autograd.grad(loss, [q, window.kv_BTD, entries.kv_BMD, sink], allow_unused=True, retain_graph=True)
        assert others == (None,) * 4
        runs.append([loss.detach(), *torch.autograd.grad(loss, arguments[:3])])
    assert all(map(torch.equal, *runs)) and runs[0][0] > 0
    with torch.no_grad():
        assert torch.equal(index_objective(*arguments), runs[0][0])


def test_the_definition_has_the_gradients_of_its_values():
    *learned, q, window, entries, sink = arguments_of(CASES["packed, selected"], torch.float64)
    small = [x[:, :8].detach().requires_grad_() if x.shape[1] == q.shape[1] else x for x in learned]
    window = window._replace(query_place_BS=window.query_place_BS[:, :8], reach_BS=window.reach_BS[:, :8])
    entries = entries._replace(first_BS=entries.first_BS[:, :8], count_BS=entries.count_BS[:, :8],
                               selected_BSK=entries.selected_BSK[:, :8])
    assert torch.autograd.gradcheck(
        lambda *learned: index_objective.definition(*learned, q[:, :8], window, entries, sink), small)
