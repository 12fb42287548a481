"""What teaches the indexer: its scores' softmax is to match the attention that entries got (report 2.3.1; objective of DeepSeek-V3.2)."""

import torch
from torch import Tensor

from fathom.ops.attention import Entries, Window, attended_entries, entry_mass
from fathom.ops.dispatch import op
from fathom.ops.index_topk import index_scores
from fathom.ops.losses import index_divergence


@op
def index_objective(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
                    sink_H: Tensor) -> Tensor:
    """Mean KL, a scalar in float32, of the scores' softmax from the heads' attention, over the entries that each query reads.

    Scores [B, S, M] as `index_scores` makes them from the first three; attention as `entry_mass`, which gets no gradient.
    """
    with torch.no_grad():
        mass_BSM = entry_mass(q_BSHD, window, entries, sink_H)
    return index_divergence(index_scores(index_q_BSHD, weight_BSH, keys_BMD), mass_BSM, attended_entries(entries))


def apply_objective(function: type[torch.autograd.Function], index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window,
                    entries: Entries, sink_H: Tensor) -> Tensor:
    """`index_objective`, a scalar, by a function of queries, weights and keys [B, S or M, ...], of the attention, which gets no gradient, and
    of whether gradients are wanted.
    """
    attention = (q_BSHD.detach(), window._replace(kv_BTD=window.kv_BTD.detach()), entries._replace(kv_BMD=entries.kv_BMD.detach()),
                 sink_H.detach())
    learned = index_q_BSHD, weight_BSH, keys_BMD
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
    return function.apply(*learned, attention, wants_grad)


@op
def block_divergence(probability_BRJ: Tensor, near: int, product_BCHM: Tensor, weight_BCH: Tensor, seen_BCM: Tensor,
                     wants_grad: bool) -> tuple[Tensor, ...]:
    """The objective of a block of C queries: KL [B, C], 0 where nothing is read; whether anything is [B, C]; if wanted, the gradients of a sum of KL
    with respect to the products [B, C, H, M], in their memory or not, and to the weights [B, C, H].

    Attention's probabilities [B, C heads, J] of the M entries, which stand from column `near` on; products of the indexer's queries and keys, negative ones
    already 0; weights of its heads; which entries a query sees, a bool. No autograd passes through it.
    """
    M, (B, C, _) = product_BCHM.shape[-1], weight_BCH.shape
    target_BCM = probability_BRJ[..., near:near + M].reshape(B, C, -1, M).sum(2)
    target_BCM.div_(target_BCM.sum(-1, keepdim=True).clamp_(min=torch.finfo(target_BCM.dtype).tiny))
    reads_BC1 = target_BCM.sum(-1, keepdim=True) > 0
    score_BCM = (weight_BCH[:, :, None] @ product_BCHM)[:, :, 0]
    log_share_BCM = score_BCM.masked_fill_(~seen_BCM, torch.finfo(score_BCM.dtype).min).log_softmax(-1)
    divergence_BC = (target_BCM.xlogy(target_BCM) - target_BCM * log_share_BCM).masked_fill_(~reads_BC1, 0).sum(-1)
    if not wants_grad:
        return divergence_BC, reads_BC1[..., 0]
    score_grad_BCM = log_share_BCM.exp_().sub_(target_BCM).masked_fill_(~(seen_BCM & reads_BC1), 0)
    product_grad_BCHM = (weight_BCH[..., None] * score_grad_BCM[:, :, None]).masked_fill_(product_BCHM == 0, 0)
    return divergence_BC, reads_BC1[..., 0], product_grad_BCHM, (product_BCHM @ score_grad_BCM[..., None])[..., 0]
