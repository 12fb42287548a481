"""The indexer's selection on CPU (report 2.3.1, eq. 15-17): scores live for a block of queries at a time, and are never sorted in full.

A block scores only the entries that some of its queries may read, and nothing where every visible entry is read anyway.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fathom.ops.index_topk import ascending, index_topk
from fathom.ops.precision import wide

_BLOCK_SCORES = 1 << 21  # of all heads: 8 MB in float32


@index_topk.register("cpu", supports=lambda q_BSHD, weight_BSH, keys_BMD, first_BS, count_BS, k: (
    q_BSHD.device.type == "cpu" and q_BSHD.dtype in (torch.float32, torch.bfloat16)))
def index_topk_cpu(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor,
                   k: int) -> Tensor:
    """`index_topk` for float32 and bfloat16, a block of queries at a time."""
    B, S, H, D = q_BSHD.shape
    k = min(k, keys_BMD.shape[1])
    selected_BSK = first_BS.new_empty(B, S, k)
    weight_BS1H = (wide(weight_BSH) * (D * H) ** -0.5)[:, :, None]
    for b in range(B):
        for block in _blocks((first_BS[b] + count_BS[b]).cummax(0).values.tolist(), _BLOCK_SCORES // H):
            selected_BSK[b, block] = _select(q_BSHD[b, block], weight_BS1H[b, block], keys_BMD[b], first_BS[b, block],
                                             count_BS[b, block], k)
    return selected_BSK


def _blocks(reach_S: list[int], scores: int) -> Iterator[slice]:
    """All queries in blocks whose queries times the furthest entry's slot are at most `scores`, or of one query."""
    start = 0
    while start < len(reach_S):
        size = max(1, min(len(reach_S) - start, scores // max(reach_S[start], 1)))
        while size > 1 and size * reach_S[start + size - 1] > scores:
            size = max(1, min(size - 1, scores // reach_S[start + size - 1]))
        yield slice(start, start + size)
        start += size


def _select(q_CHD: Tensor, weight_C1H: Tensor, keys_MD: Tensor, first_C: Tensor, count_C: Tensor, k: int) -> Tensor:
    """Slots [C, k] for one row's C queries."""
    if int(count_C.max()) <= k:
        rank_K = torch.arange(k, device=first_C.device)
        return (first_C[:, None] + rank_K).masked_fill(rank_K >= count_C[:, None], -1)
    low, high = int(first_C.min()), int((first_C + count_C).max())
    product_CHM = wide(q_CHD.flatten(0, 1) @ keys_MD[low:high].T).relu_().unflatten(0, q_CHD.shape[:2])
    score_CM = torch.bmm(weight_C1H, product_CHM)[:, 0]
    slot_M = torch.arange(low, high, device=first_C.device)
    score_CM.masked_fill_((slot_M < first_C[:, None]) | (slot_M >= (first_C + count_C)[:, None]), float("-inf"))
    best = score_CM.topk(min(k, high - low), sorted=False)
    last_C1 = best.values.amin(1, keepdim=True)
    tied_c = ((score_CM >= last_C1).sum(1) > k).logical_and(last_C1[:, 0].isfinite()).nonzero()[:, 0]
    slot_CK = best.indices
    if len(tied_c):  # several entries share the last place: the earlier ones get it
        slot_CK[tied_c] = score_CM[tied_c].sort(dim=1, descending=True, stable=True).indices[:, :slot_CK.shape[1]]
    slot_CK = ascending((slot_CK + low).masked_fill(score_CM.gather(1, slot_CK) == float("-inf"), -1))
    return torch.nn.functional.pad(slot_CK, (0, k - slot_CK.shape[1]), value=-1)
