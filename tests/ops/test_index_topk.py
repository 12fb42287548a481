"""The indexer's scores and choice: nothing invisible, all where few are visible, a fixed order of equals."""

import torch

from fathom import ops


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


def test_only_visible_entries_are_chosen_the_best_first_and_all_where_they_are_few():
    q, weight, keys, first, count = problem()
    scores = ops.index_scores(q, weight, keys)
    for k in (1, 2, 6, 10):
        selected = ops.index_topk(q, weight, keys, first, count, k)
        assert selected.shape == (2, 9, min(k, 6))
        for b in range(2):
            for s in range(9):
                begin, n = int(first[b, s]), int(count[b, s])
                visible = sorted(range(begin, begin + n), key=lambda m: -float(scores[b, s, m]))
                assert selected[b, s].tolist() == (visible + [-1] * 10)[:n][:k] + [-1] * (min(k, 6) - min(n, k))


def test_equal_scores_take_the_earlier_entry_however_many_follow():
    q, weight = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)
    for entries in (5, 8, 300):
        keys = torch.ones(1, entries, 2)
        keys[0, 3] = 2.0
        selected = ops.index_topk(q, weight, keys, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[5]]), 3)
        assert selected.tolist() == [[[3, 0, 1]]]


def test_score_gradients():
    q, weight, keys, *_ = problem(B=1, S=3, M=4, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (q, weight, keys)]
    assert torch.autograd.gradcheck(ops.index_scores.definition, inputs)
