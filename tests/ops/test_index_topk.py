"""The indexer's scores and choice: nothing invisible, all where few are visible, a fixed order of equals."""

import pytest
import torch

from fathom import ops
from fathom.ops.cpu import index_topk as cpu

IMPLEMENTATIONS = ["definition", "cpu"]


def problem(B=2, S=9, H=3, D=4, M=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, weight, keys = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((B, S, H, D), (B, S, H), (B, M, D)))
    count = torch.randint(0, M + 1, (B, S), generator=generator)
    first = (torch.rand(B, S, generator=generator) * (M + 1 - count)).long()
    return q, weight, keys, first, count


def test_scores_are_the_weighted_rectified_products():
    q, weight, keys, *_ = problem()
    scores = ops.index_scores(q, weight, keys)
    for b, s, m in ((0, 0, 0), (1, 8, 5), (0, 4, 2)):
        expected = sum(weight[b, s, h] * max(float(q[b, s, h] @ keys[b, m]), 0) for h in range(3)) / (4 * 3) ** 0.5
        torch.testing.assert_close(scores[b, s, m], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_visible_entries_are_chosen_the_best_and_all_where_they_are_few(implementation):
    q, weight, keys, first, count = problem()
    scores = ops.index_scores(q, weight, keys)
    for k in (1, 2, 6, 10):
        with ops.using(implementation):
            selected = ops.index_topk(q, weight, keys, first, count, k)
        assert selected.shape == (2, 9, min(k, 6))
        for b in range(2):
            for s in range(9):
                begin, n = int(first[b, s]), int(count[b, s])
                visible = sorted(range(begin, begin + n), key=lambda m: -float(scores[b, s, m]))
                assert selected[b, s].tolist() == sorted(visible[:k]) + [-1] * (min(k, 6) - min(n, k))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_scores_take_the_earlier_entry_however_many_follow(implementation):
    q, weight = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)
    for entries in (5, 8, 300):
        keys = torch.ones(1, entries, 2)
        keys[0, 3] = 2.0
        with ops.using(implementation):
            selected = ops.index_topk(q, weight, keys, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[5]]), 3)
        assert selected.tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize("many", [17, 1000])
@pytest.mark.parametrize("B, S, M, k, heads", [(1, 1, 1, 1, 1), (1, 1, 900, 12, 4), (2, 300, 75, 12, 2), (3, 40, 10, 64, 8),
                                               (1, 700, 175, 20, 1), (2, 5, 3000, 100, 4), (1, 3, 7, 7, 2)])
def test_the_fast_path_chooses_what_the_definition_chooses_ties_included(B, S, M, k, heads, many, monkeypatch):
    """Small integers: sums are exact in any order and many scores are equal, 0 above all."""
    for name, value in (("_BLOCK_SCORES", 5000), ("_MIN_BLOCK", 3), ("_ROUND", 32), ("_TILE_PRODUCTS", 5000), ("_MANY", many)):
        monkeypatch.setattr(cpu, name, value)  # several blocks of queries, several tiles of keys, one step and two
    generator = torch.Generator().manual_seed(B * S + M)
    q, weight, keys = (torch.randint(-2, 3, shape, generator=generator).float()
                       for shape in ((B, S, heads, 4), (B, S, heads), (B, M, 4)))
    count = torch.randint(0, M + 1, (B, S), generator=generator)
    first = (torch.rand(B, S, generator=generator) * (M + 1 - count)).long()
    expected = ops.index_topk.definition(q, weight, keys, first, count, k)
    assert ops.index_topk.choose(q, weight, keys, first, count, k)[0] == "cpu"
    assert torch.equal(ops.index_topk(q, weight, keys, first, count, k), expected)
    causal = torch.arange(1, S + 1).expand(B, S).clamp(max=M)
    zeros = torch.zeros_like(causal)
    assert torch.equal(ops.index_topk(q, weight, keys, zeros, causal, k),
                       ops.index_topk.definition(q, weight, keys, zeros, causal, k))


def test_the_fast_path_takes_bfloat16_and_gives_the_same_slots_twice():
    q, weight, keys, first, count = problem(B=2, S=50, H=4, D=16, M=40)
    half = [tensor.bfloat16() for tensor in (q, weight, keys)]
    one, two = (ops.index_topk(*half, first, count, 5) for _ in range(2))
    assert torch.equal(one, two) and (one == ops.index_topk.definition(*half, first, count, 5)).float().mean() > 0.97


def test_score_gradients():
    q, weight, keys, *_ = problem(B=1, S=3, M=4, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (q, weight, keys)]
    assert torch.autograd.gradcheck(ops.index_scores.definition, inputs)
