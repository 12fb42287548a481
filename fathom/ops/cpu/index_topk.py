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
    q_BSHD.device.type == "cpu" and q_BSHD.dtype in (torch.float32, torch.bfloat16)))
@torch.no_grad()
def index_topk_cpu(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor,
                   k: int) -> Tensor:
    """`index_topk` for float32 and bfloat16, a block of queries at a time."""
    B, S, H, D = q_BSHD.shape
    k = min(k, keys_BMD.shape[1])
    selected_BSK = first_BS.new_empty(B, S, k)
    weight_BS1H = (wide(weight_BSH) * (D * H) ** -0.5)[:, :, None]
    size = max(_MIN_BLOCK, min(_MAX_BLOCK, _BLOCK_SCORES // max(1, keys_BMD.shape[1])))
    for b in range(B):
        for begin in range(0, S, size):
            block = slice(begin, begin + size)
            selected_BSK[b, block] = _select(q_BSHD[b, block], weight_BS1H[b, block], keys_BMD[b], first_BS[b, block],
                                             count_BS[b, block], k)
    return selected_BSK


def _select(q_CHD: Tensor, weight_C1H: Tensor, keys_MD: Tensor, first_C: Tensor, count_C: Tensor, k: int) -> Tensor:
    """Slots [C, k] for one row's C queries."""
    rank_K = torch.arange(k, device=first_C.device)
    every_CK = (first_C[:, None] + rank_K).masked_fill(rank_K >= count_C[:, None], -1)  # right where no more than k are visible
    if int(count_C.max()) <= k:
        return every_CK
    end_C = first_C + count_C
    low = int(first_C.min()) // _ROUND * _ROUND
    high = min(len(keys_MD), -(-int(end_C.max()) // _ROUND) * _ROUND)
    score_CM = _scores(q_CHD, weight_C1H, keys_MD[low:high])
    _hide(score_CM, first_C - low, end_C - low)
    slot_CK, tied_C = (_many_best if score_CM.shape[1] >= _MANY * k else _best)(score_CM, k)
    tied_c = tied_C.logical_and_(count_C > k).nonzero()[:, 0]
    if len(tied_c):
        slot_CK[tied_c] = _earlier_of_equals(score_CM[tied_c], score_CM.gather(1, slot_CK)[tied_c].amin(1, keepdim=True), k)
    slot_CK.numpy().sort(axis=1)  # with AVX-512 where there is: a fifth of the time of torch's sort, which wants the places too
    return (slot_CK + low).where((count_C > k)[:, None], every_CK)


def _scores(q_CHD: Tensor, weight_C1H: Tensor, keys_MD: Tensor) -> Tensor:
    """Scores [C, G * _GROUP] of M entries, -inf behind them."""
    (C, H, _), M = q_CHD.shape, len(keys_MD)
    score_CM = torch.empty(C, -(-M // _GROUP) * _GROUP)
    score_CM[:, M:] = float("-inf")
    q_RD, size = q_CHD.flatten(0, 1), max(_ROUND, _TILE_PRODUCTS // (C * H) // _ROUND * _ROUND)
    for begin in range(0, M, size):
        product_CHm = wide(times_relu(q_RD, keys_MD[begin:begin + size])).unflatten(0, (C, H))
        score_CM[:, begin:begin + size][:, :product_CHm.shape[2]] = torch.bmm(weight_C1H, product_CHm)[:, 0]
    return score_CM


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
