"""The indexer's selection on CPU (report 2.3.1, eq. 15-17): scores live for a block of queries at a time, and are never sorted in full.

A block scores only the entries that some of its queries may read, a tile of keys at a time, and nothing where every visible entry is
read anyway. Among many entries the best are looked for in two steps: the k best groups, by their best member, hold the k best entries.
"""

import numpy as np
import torch
from torch import Tensor

from fathom.ops.cpu.products import times_relu
from fathom.ops.index_topk import index_topk
from fathom.ops.precision import wide

_BLOCK_SCORES = 1 << 21  # of a block's queries: 8 MB
_MIN_BLOCK, _MAX_BLOCK = 16, 256  # queries
_TILE_PRODUCTS = 1 << 20  # of all heads with a tile of keys: 4 MB in float32
_ROUND = 256  # entries: a block's range is rounded to these, so that few shapes occur
_GROUP = 16  # entries that are looked at together, and
_MANY = 64  # how many times k entries there must be for it


@index_topk.register("cpu", supports=lambda q_BSHD, weight_BSH, keys_BMD, first_BS, count_BS, k: (
    isinstance(keys_BMD, Tensor) and q_BSHD.device.type == "cpu" and q_BSHD.dtype in (torch.float32, torch.bfloat16)))
@torch.no_grad()
def index_topk_cpu(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor,
                   k: int) -> Tensor:
    """`index_topk` for float32 and bfloat16, a block of queries at a time."""
    (B, S, H, D), M = q_BSHD.shape, keys_BMD.shape[1]
    k = min(k, M)
    rank_K = torch.arange(k, device=first_BS.device)
    selected_BSK = (first_BS[..., None] + rank_K).masked_fill(rank_K >= count_BS[..., None], -1)  # right where no more than k are visible
    weight_BS1H = (wide(weight_BSH) * (D * H) ** -0.5)[:, :, None]
    size = max(_MIN_BLOCK, min(_MAX_BLOCK, _BLOCK_SCORES // max(1, M)))
    rows = [b for b, most in enumerate(count_BS.amax(1).tolist()) if most > k] if S else []
    together = max(1, size // S) if S else 1  # rows
    for at in range(0, len(rows), together):
        row_R = torch.tensor(rows[at:at + together])
        for begin in range(0, S, size):
            block = slice(begin, begin + size)
            first_RC, count_RC = first_BS[row_R, block], count_BS[row_R, block]
            if int(count_RC.max()) <= k:
                continue
            parts = [(q_BSHD[b, block], weight_BS1H[b, block], keys_BMD[b]) for b in rows[at:at + together]]
            best_RCK = _select(parts, first_RC, count_RC, k)
            selected_BSK[row_R, block] = best_RCK.where((count_RC > k)[..., None], selected_BSK[row_R, block])
    return selected_BSK


def _select(parts: list[tuple[Tensor, Tensor, Tensor]], first_RC: Tensor, count_RC: Tensor, k: int) -> Tensor:
    """Slots [R, C, k] of R rows' C queries, each part a row's queries [C, H, D], weights [C, 1, H] and keys [M, D]; right where count > k."""
    end_RC, M = first_RC + count_RC, len(parts[0][2])
    bounds = zip(first_RC.amin(1).tolist(), end_RC.amax(1).tolist(), strict=True)
    ranges = [(first // _ROUND * _ROUND, min(M, -(-end // _ROUND) * _ROUND)) for first, end in bounds]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    score_RCM = torch.empty(*first_RC.shape, -(-(high - low) // _GROUP) * _GROUP)
    for score_CM, (q_CHD, weight_C1H, keys_MD), (begin, end) in zip(score_RCM, parts, ranges, strict=True):
        _score(q_CHD, weight_C1H, keys_MD[begin:end], score_CM[:, begin - low:end - low])
    score_QM, first_Q, end_Q = score_RCM.flatten(0, 1), first_RC.flatten() - low, end_RC.flatten() - low
    _hide(score_QM, first_Q, end_Q)
    slot_QK, tied_Q = (_many_best if score_QM.shape[1] >= _MANY * k else _best)(score_QM, k)
    tied_q = tied_Q.logical_and_(count_RC.flatten() > k).nonzero()[:, 0]
    if len(tied_q):
        slot_QK[tied_q] = _earlier_of_equals(score_QM[tied_q], score_QM.gather(1, slot_QK)[tied_q].amin(1, keepdim=True), k)
    slot_QK.numpy().sort(axis=1)  # with AVX-512 where there is: a fifth of the time of torch's sort, which wants the places too
    return (slot_QK + low).view(*first_RC.shape, k)


def _score(q_CHD: Tensor, weight_C1H: Tensor, keys_MD: Tensor, score_CM: Tensor) -> None:
    """Write the scores of M entries."""
    (C, H, _), M = q_CHD.shape, len(keys_MD)
    q_PD, size = q_CHD.flatten(0, 1), max(_ROUND, _TILE_PRODUCTS // (C * H) // _ROUND * _ROUND)
    for begin in range(0, M, size):
        product_CHm = wide(times_relu(q_PD, keys_MD[begin:begin + size])).unflatten(0, (C, H))
        score_CM[:, begin:begin + size] = torch.bmm(weight_C1H, product_CHm)[:, 0]


def _hide(score_CM: Tensor, first_C: Tensor, end_C: Tensor) -> None:
    """-inf for the entries that lie before a query's first or from its end on."""
    for low, high in ((0, int(first_C.max())), (int(end_C.min()), score_CM.shape[1])):
        if low < high:
            slot_m = torch.arange(low, high, device=first_C.device)
            score_CM[:, low:high].masked_fill_((slot_m < first_C[:, None]) | (slot_m >= end_C[:, None]), float("-inf"))


def _best(score_CM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Slots of k best scores [C, k], in no order, and whether others equal the last of them [C]."""
    slot_CK = _partition(score_CM, k)
    last_C1 = score_CM.gather(1, slot_CK).amin(1, keepdim=True)
    return slot_CK, (score_CM >= last_C1).sum(1) > k


def _many_best(score_CM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_best` in two steps; a group is every G-th entry."""
    score_CNG = score_CM.unflatten(1, (_GROUP, -1))
    best_CG = score_CNG.amax(1)
    group_CK = _partition(best_CG, k)
    candidate_CI = score_CNG.gather(2, group_CK[:, None].expand(-1, _GROUP, -1)).flatten(1)
    place_CK = _partition(candidate_CI, k)
    last_C1 = candidate_CI.gather(1, place_CK).amin(1, keepdim=True)
    tied_C = ((best_CG >= last_C1).sum(1) > k) | ((candidate_CI >= last_C1).sum(1) > k)
    return place_CK // k * score_CNG.shape[2] + group_CK.gather(1, place_CK % k), tied_C


def _earlier_of_equals(score_CM: Tensor, last_C1: Tensor, k: int) -> Tensor:
    """Slots of the k best scores [C, k] where several share the last place: the earlier ones get it."""
    better_CM, equal_CM = score_CM > last_C1, score_CM == last_C1
    room_C1 = k - better_CM.sum(1, keepdim=True)
    return (better_CM | (equal_CM & (equal_CM.cumsum(1) <= room_C1))).nonzero()[:, 1].view(-1, k)


def _partition(score_CM: Tensor, k: int) -> Tensor:
    """Slots of k best scores [C, k], in no order; numpy partitions with AVX-512 where there is, in half of the time of torch's topk."""
    M = score_CM.shape[1]
    return torch.from_numpy(np.argpartition(score_CM.numpy(), M - k, axis=1)[:, M - k:].copy()) if k < M else (
        torch.arange(M).expand(len(score_CM), M).contiguous())
