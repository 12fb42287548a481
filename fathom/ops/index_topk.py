"""The lightning indexer's scores and the best visible entries (report 2.3.1, eq. 15-17)."""

import torch
from torch import Tensor

from fathom.ops.attention import visible_entries
from fathom.ops.dispatch import op
from fathom.ops.precision import wide
from fathom.ops.records import Recorded


@op
def index_scores(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor) -> Tensor:
    """I[b, s, m] = sum_h w_h relu(q_h . k_m) D^-0.5 H^-0.5 -> [B, S, M] in float32 (eq. 16)."""
    H, D = q_BSHD.shape[2:]
    product_BSHM = wide(torch.einsum("bshd,bmd->bshm", q_BSHD, keys_BMD)).relu()
    return torch.einsum("bsh,bshm->bsm", wide(weight_BSH) * (D * H) ** -0.5, product_BSHM)


@op
def index_topk(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor | Recorded, first_BS: Tensor, count_BS: Tensor,
               k: int) -> Tensor:
    """Slots [B, S, min(k, M)] of the k best visible entries, ascending, -1 behind the last; of equal scores the earlier entry's."""
    if isinstance(keys_BMD, Recorded):
        return index_topk(q_BSHD, weight_BSH, keys_BMD.vectors(), first_BS, count_BS, k)
    visible_BSM = visible_entries(first_BS, count_BS, keys_BMD.shape[1])
    score_BSM = index_scores(q_BSHD, weight_BSH, keys_BMD).masked_fill(~visible_BSM, float("-inf"))
    slot_BSM = score_BSM.sort(dim=-1, descending=True, stable=True).indices
    best_BSK = slot_BSM[..., :k]
    rank_K = torch.arange(best_BSK.shape[-1], device=best_BSK.device)
    return ascending(best_BSK.masked_fill(rank_K >= count_BS[..., None], -1))


def ascending(slot: Tensor) -> Tensor:
    """Slots [..., K] in order, with -1 (none) behind the last."""
    last = torch.iinfo(slot.dtype).max
    ordered = slot.masked_fill(slot < 0, last).sort(dim=-1).values
    return ordered.masked_fill_(ordered == last, -1)
