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
