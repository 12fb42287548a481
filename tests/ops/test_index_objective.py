"""The indexer's objective: block by block it is the definition, in value and gradients, and the rest of attention gets none."""

import pytest
import torch

from fathom import ops
from fathom.ops.index_objective import block_divergence, index_objective
from fathom.ops.native.library import library
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


def block(B, C, A, H, M, near, nothing=()):
    """Arguments of `block_divergence` in float64: a query sees some entries, attention reads some of these; queries in `nothing` none."""
    generator = torch.Generator().manual_seed(B * 1000 + C * 10 + M)
    seen_BCM = torch.rand(B, C, M, generator=generator) < 0.7
    seen_BCM[..., 0] = True
    reads_BCM = seen_BCM & ((torch.rand(B, C, M, generator=generator) < 0.5) | (torch.arange(M) == 0))
    for query in nothing:
        seen_BCM[:, query] = reads_BCM[:, query] = False
    probability_BCAJ = torch.rand(B, C, A, near + M + 1, generator=generator, dtype=torch.float64)
    probability_BCAJ[..., near:near + M] *= reads_BCM[:, :, None]
    product_BCHM = torch.randn(B, C, H, M, generator=generator, dtype=torch.float64).relu_()
    return probability_BCAJ.flatten(1, 2), near, product_BCHM, torch.randn(B, C, H, generator=generator, dtype=torch.float64), seen_BCM


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 0), (2, 5, 3, 2, 15, 4), (1, 7, 8, 8, 16, 3), (3, 4, 2, 5, 33, 17), (1, 64, 8, 8, 130, 190)])
def test_a_block_in_one_pass_is_the_definition_with_any_number_of_threads(shape):
    arguments, before, found = block(*shape, nothing=[shape[1] - 1] if shape[1] > 1 else []), torch.get_num_threads(), []
    expected = block_divergence.definition(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments), True)
    narrow = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    try:
        with torch.no_grad():
            for threads in (2, 1):
                torch.set_num_threads(threads)
                own = [x.clone() if isinstance(x, torch.Tensor) else x for x in narrow]
                assert block_divergence.choose(*own, True)[0] == "native"
                found.append(block_divergence(*own, True))
            alone = block_divergence(*narrow, False)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found)) and len(alone) == 2 and all(map(torch.equal, alone, found[0]))
    for wanted, own in zip(expected, found[0], strict=True):
        torch.testing.assert_close(own.double(), wanted.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_a_block_in_one_pass_bears_scores_far_apart():
    *others, near, product_BCHM, weight_BCH, seen_BCM = block(1, 6, 2, 3, 40, 5)
    product_BCHM *= 1e4
    expected = block_divergence.definition(*others, near, product_BCHM.clone(), weight_BCH, seen_BCM, True)
    with torch.no_grad():
        found = block_divergence(others[0].float(), near, product_BCHM.float(), weight_BCH.float(), seen_BCM, True)
    for wanted, own in zip(expected, found, strict=True):
        torch.testing.assert_close(own.double(), wanted.double(), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("attention_arguments", REACHING.values(), ids=REACHING.keys())
def test_as_it_is_chosen_it_is_the_definition_too(attention_arguments):
    expected, found = arguments_of(attention_arguments, torch.float64), arguments_of(attention_arguments, torch.float32)
    results = [[loss.detach(), *torch.autograd.grad(3 * loss, arguments[:3], allow_unused=True)]
               for arguments, loss in ((expected, index_objective.definition(*expected)), (found, index_objective(*found)))]
    for wanted, own in zip(*results, strict=True):
        torch.testing.assert_close(own.double(), torch.zeros_like(own).double() if wanted is None else wanted, atol=1e-5, rtol=1e-4)
