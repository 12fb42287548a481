"""The indexer in Triton: scores and gradients of the definition in float64, its selection slot for slot, ties included."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.triton import index_topk as module
from fathom.quant.records import KeyRecord


def problem(B, S, H, D, M, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B + S + H + D + M)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, S, H, D), (B, S, H), (B, M, D))]


def whole_problem(B, S, H, D, M):
    """Small integers: sums are exact in any order and many scores are equal, 0 above all."""
    generator = torch.Generator().manual_seed(B * S + M)
    return [torch.randint(-2, 3, shape, generator=generator).float() for shape in ((B, S, H, D), (B, S, H), (B, M, D))]


def ranges(B, S, M):
    generator = torch.Generator().manual_seed(M)
    count = torch.randint(0, M + 1, (B, S), generator=generator)
    return (torch.rand(B, S, generator=generator) * (M + 1 - count)).long(), count


def run_scores(implementation, dtype, *tensors):
    leaves = [each.to(dtype or each.dtype).requires_grad_() for each in tensors]
    with ops.using(implementation):
        assert ops.index_scores.choose(*leaves)[0] == implementation
        out = ops.index_scores(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def select(implementation, *arguments):
    with ops.using(implementation):
        assert ops.index_topk.choose(*arguments)[0] == implementation
        return ops.index_topk(*arguments)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("B, S, H, D, M", [(1, 1, 1, 1, 1), (2, 17, 3, 20, 65), (1, 33, 20, 8, 5), (1, 2, 5, 33, 130)])
def test_scores_and_gradients_are_the_definitions(B, S, H, D, M, dtype, tolerance):
    tensors = problem(B, S, H, D, M, dtype)
    results, again = run_scores("triton", None, *tensors), run_scores("triton", None, *tensors)
    assert results[0].dtype == torch.float32 and all(torch.equal(*pair) for pair in zip(results, again, strict=True))
    for expected, found in zip(run_scores("definition", torch.float64, *tensors), results, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


def test_no_queries_and_no_entries_have_no_scores_and_no_gradients():
    for S, M in ((0, 4), (3, 0)):
        out, *grads = run_scores("triton", None, *problem(2, S, 3, 4, M))
        assert out.shape == (2, S, M) and not any(each.any() for each in grads)
        none = torch.zeros(2, S, dtype=torch.int64)
        assert select("triton", *problem(2, S, 3, 4, M), none, none, 5).shape == (2, S, min(5, M))


def test_a_querys_scores_have_the_same_bits_in_any_batch():
    q, weight, keys = problem(3, 20, 3, 20, 70)
    with ops.using("triton"):
        together = ops.index_scores(q, weight, keys)
        for b, rows in ((0, slice(0, 1)), (2, slice(5, 20)), (1, slice(16, 17))):
            assert torch.equal(ops.index_scores(q[b:b + 1, rows], weight[b:b + 1, rows], keys[b:b + 1]), together[b:b + 1, rows])


@pytest.mark.parametrize("B, S, H, D, M, k", [(1, 1, 1, 4, 1, 1), (1, 1, 4, 4, 300, 12), (2, 18, 2, 4, 75, 12), (2, 9, 8, 4, 10, 64),
                                              (1, 3, 4, 4, 1500, 100), (1, 3, 2, 4, 7, 7), (2, 2, 3, 4, 260, 1)])
@pytest.mark.parametrize("part, chunk", [(8192, 1 << 26), (40, 1500)])
def test_the_definitions_slots_are_chosen_ties_included(B, S, H, D, M, k, part, chunk, monkeypatch):
    """Whole rows and in parts, all queries at once and a few at a time."""
    monkeypatch.setattr(module, "_PART", part)
    monkeypatch.setattr(module, "_CHUNK_SCORES", chunk)
    monkeypatch.setattr(module, "_TILE_SCORES", 128)
    tensors = whole_problem(B, S, H, D, M)
    causal = torch.arange(1, S + 1).mul(M).div(S, rounding_mode="floor").expand(B, S)
    for first, count in (ranges(B, S, M), (torch.zeros_like(causal), causal)):
        expected = ops.index_topk.definition(*tensors, first, count, k)
        found = select("triton", *tensors, first, count, k)
        assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize("entries", [5, 8, 300])
def test_equal_scores_take_the_earlier_entry_however_many_follow(entries):
    q, weight, keys = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1), torch.ones(1, entries, 2)
    keys[0, 3] = 2.0
    assert select("triton", q, weight, keys, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[5]]), 3).tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize("part", [8192, 16])
def test_scores_of_every_size_are_in_order_and_negative_zero_equals_zero(part, monkeypatch):
    monkeypatch.setattr(module, "_PART", part)
    sizes = torch.tensor([0.0, 1e-44, 1e-42, 1e-38, 1e-3, 1.0, 1.0000001, 2.0, 3e38, float("inf")])
    score = torch.cat([sizes, -sizes, sizes, -sizes, sizes[:1]])[torch.randperm(41, generator=torch.Generator().manual_seed(1))].view(1, 1, 41)
    first, count = torch.tensor([[2]]), torch.tensor([[37]])
    order = score[0, 0, 2:39].sort(descending=True, stable=True).indices + 2
    for k in range(1, 41, 3):
        assert module._best(score, first, count, 0, k).tolist() == [[order[:k].sort().values.tolist() + [-1] * (k - 37)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_by_the_kernels_scores_in_any_batch(dtype, monkeypatch):
    monkeypatch.setattr(module, "_PART", 32)
    monkeypatch.setattr(module, "_TILE_SCORES", 128)
    tensors, (first, count) = problem(2, 8, 4, 16, 90, dtype), ranges(2, 8, 90)
    found = select("triton", *tensors, first, count, 9)
    with ops.using("triton"):
        scores = ops.index_scores(*tensors)
    for b in range(2):
        for s in range(8):
            begin, n = int(first[b, s]), int(count[b, s])
            best = sorted(range(begin, begin + n), key=lambda m: (-float(scores[b, s, m]), m))[:9]
            assert found[b, s].tolist() == sorted(best) + [-1] * (9 - len(best))
    alone = [each[1:, 5:7] for each in tensors[:2]] + [tensors[2][1:]]
    assert torch.equal(select("triton", *alone, first[1:, 5:7], count[1:, 5:7], 9), found[1:, 5:7])


def test_what_no_query_may_choose_among_is_not_scored(monkeypatch):
    """Queries that read all they may see, and entries that none may: their scores stay what they were."""
    made, empty = [], torch.Tensor.new_empty

    def new_empty(self, *sizes, **options):
        made.append(empty(self, *sizes, **options))
        return made[-1].fill_(float("nan")) if made[-1].dtype == torch.float32 else made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    first, count = torch.tensor([[0, 70, 0]]), torch.tensor([[3, 50, 0]])
    found = select("triton", *problem(1, 3, 2, 4, 200), first, count, 4)
    scores = next(each for each in made if each.shape == (1, 3, 200))
    assert scores[0, 0].isnan().all() and scores[0, 2].isnan().all()
    assert scores[0, 1].isnan().tolist() == [not 64 <= m < 128 for m in range(200)]
    assert found[0, 0].tolist() == [0, 1, 2, -1] and found[0, 2].tolist() == [-1] * 4


def test_the_definition_takes_the_rest():
    q, weight, keys = problem(1, 2, 3, 4, 6)
    none = torch.zeros(1, 2, dtype=torch.int64)
    assert ops.index_scores.choose(q, weight, keys)[0] == "definition"  # on CPU it must be asked for
    assert ops.index_topk.choose(q, weight, keys, none, none, 2)[0] != "triton"
    with ops.using("triton"):
        assert ops.index_scores.choose(q.double(), weight.double(), keys.double())[0] == "definition"
        assert ops.index_topk.choose(q.double(), weight, keys.double(), none, none, 2)[0] == "definition"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, S, H, D, M, k", [(1, 1, 3, 16, 1, 4), (2, 5, 4, 40, 130, 7), (1, 17, 2, 33, 70, 70), (2, 3, 20, 128, 200, 16)])
def test_keys_that_lie_in_records_are_read_there(B, S, H, D, M, k, dtype):
    q, weight, keys = problem(B, S, H, D, M, dtype)
    record = KeyRecord(D, dtype)
    kept = torch.full((B, M + 3, record.width), 255, dtype=torch.uint8)  # of a cache with places behind them
    kept[:, :M] = record.pack(keys * torch.logspace(-3, 3, M)[:, None].to(dtype))
    recorded = ops.Recorded(kept[:, :M], record)
    assert recorded.shape == (B, M, D) and recorded.dtype == dtype
    first, count = ranges(B, S, M)
    found = select("triton", q, weight, recorded, first, count, k)
    assert torch.equal(found, select("triton", q, weight, recorded.vectors(), first, count, k))
    assert torch.equal(found, select("definition", q.double(), weight.double(), recorded.vectors().double(), first, count, k))


def test_records_of_another_precision_are_unpacked():
    q, weight, _ = problem(1, 2, 3, 32, 9)
    recorded = ops.Recorded(torch.zeros(1, 9, 17, dtype=torch.uint8), KeyRecord(32, torch.bfloat16))
    with ops.using("triton"):
        assert ops.index_topk.choose(q, weight, recorded, *ranges(1, 2, 9), 4)[0] != "triton"
