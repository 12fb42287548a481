"""Losses: next-token cross-entropy, distillation's reverse divergence, the router's sequence balance, the indexer's divergence."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import op, product
from fathom.ops.precision import wide

IGNORE = -100  # target of a position that predicts nothing


@product(0, 1)
def cross_entropy(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor) -> Tensor:
    """Sum over targets (IGNORE left out) of -log softmax(head hidden)[target], a float32 scalar from [N, W] and [V, W]."""
    kept_n = (target_N != IGNORE).nonzero().squeeze(1)
    logits_nV = F.linear(wide(hidden_NW.index_select(0, kept_n)), wide(head_VW))
    return F.cross_entropy(logits_nV, target_N.index_select(0, kept_n), reduction="sum")


@op
def reverse_kl(hidden_NW: Tensor, head_VW: Tensor, teacher_hidden_NU: Tensor, teacher_head_VU: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p_v (log p_v - log q_v) at each position [N], float32, p = softmax(head hidden), over the whole vocabulary.

    The widths W of student and U of teacher may differ; the teacher gets no gradient. Report 5.1.2.
    """
    log_p_NV = F.linear(wide(hidden_NW), wide(head_VW)).log_softmax(-1)
    log_q_NV = F.linear(wide(teacher_hidden_NU.detach()), wide(teacher_head_VU.detach())).log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


@op
def sequence_balance(score_BSE: Tensor, chosen_BSK: Tensor, counted_BS: Tensor) -> Tensor:
    """V3's sequence-wise balance loss, mean over rows of sum_e f_e P_e, from [B, S, E] scores; 1 when balanced.

    f_e = E / (K T) times the number of tokens that chose e; P_e = mean normalised score. Padding is not counted.
    """
    E, K = score_BSE.shape[-1], chosen_BSK.shape[-1]
    counted_BS1 = counted_BS[..., None].to(score_BSE.dtype)
    tokens_B1 = counted_BS1.sum(1).clamp(min=1)
    chosen_BE = torch.zeros_like(score_BSE[:, 0]).scatter_add(
        1, chosen_BSK.flatten(1), counted_BS1.expand_as(chosen_BSK).flatten(1))
    share_BSE = score_BSE / score_BSE.sum(-1, keepdim=True)
    mean_share_BE = (share_BSE * counted_BS1).sum(1) / tokens_B1
    return (chosen_BE * E / (K * tokens_B1) * mean_share_BE).sum(-1).mean()


@op
def index_divergence(score_BSM: Tensor, mass_BSM: Tensor, attended_BSM: Tensor) -> Tensor:
    """Mean over queries that read entries of KL(mass / sum mass || softmax of the scores), all [B, S, M], same entries."""
    mass_BSM = wide(mass_BSM).masked_fill(~attended_BSM, 0)
    total_BS1 = mass_BSM.sum(-1, keepdim=True)
    target_BSM = mass_BSM / total_BS1.clamp(min=torch.finfo(mass_BSM.dtype).tiny)
    log_share_BSM = score_BSM.masked_fill(~attended_BSM, torch.finfo(score_BSM.dtype).min).log_softmax(-1)
    divergence_BS = (target_BSM.xlogy(target_BSM) - target_BSM * log_share_BSM).sum(-1)
    reads_BS = total_BS1.squeeze(-1) > 0
    return divergence_BS.where(reads_BS, 0).sum() / reads_BS.sum().clamp(min=1)
