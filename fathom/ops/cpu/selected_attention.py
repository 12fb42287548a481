"""Attention over selected entries on CPU (report 2.3.1): each query's entries are gathered, so that cost does not grow with context.

Takes over from masked blocks (attention.py) where far more entries are visible than selected. Without gradients only; few queries, one
decoded token above all, are taken as well as many.
"""

import torch
from torch import Tensor

from fathom.ops.attention import Entries, Window, attention, column_probabilities
from fathom.ops.cpu.attention import asks_for_gradients, blocks, supports
from fathom.ops.cpu.products import batch_times

_COLUMNS = 16  # of scores: a round number of them
_MANY = 8  # visible entries for each selected one, from which on gathering is cheaper than masking


def _supports(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> bool:
    return (entries is not None and entries.selected_BSK is not None
            and entries.kv_BMD.shape[1] >= _MANY * entries.selected_BSK.shape[2]
            and supports(q_BSHD, window, entries, sink_H) and not asks_for_gradients(q_BSHD, window, entries, sink_H))


@attention.register("gathered", supports=_supports)
def attention_gathered(q_BSHD: Tensor, window: Window, entries: Entries, sink_H: Tensor) -> Tensor:
    """`attention` for a selection and no gradients: window keys by blocks, entries by query, one softmax."""
    B, S, H, D = q_BSHD.shape
    M, K = entries.kv_BMD.shape[1], entries.selected_BSK.shape[2]
    kv_ID = entries.kv_BMD.flatten(0, 1)
    row_B11 = torch.arange(B, device=kv_ID.device)[:, None, None] * M
    index_BSK = entries.selected_BSK.clamp(min=0) + row_B11
    out_BSHD = torch.empty_like(q_BSHD)
    for block in blocks(window, None):
        near, q_BCHD, index_BCK = block.window(window), q_BSHD[:, block.queries], index_BSK[:, block.queries]
        C, T = q_BCHD.shape[1], near.kv_BTD.shape[1]
        chosen_NKD = kv_ID.index_select(0, index_BCK.flatten()).view(B * C, K, D)
        score_BCHJ = q_BSHD.new_zeros(B, C, H, -(-(T + K + 1) // _COLUMNS) * _COLUMNS)
        score_BCHJ[..., :T] = batch_times(q_BCHD.flatten(1, 2), near.kv_BTD).view(B, C, H, T)
        score_BCHJ[..., T:T + K] = torch.bmm(q_BCHD.flatten(0, 1), chosen_NKD.mT).view(B, C, H, K)
        far = Entries(None, None, None, entries.selected_BSK[:, block.queries])
        probability_BCHJ = column_probabilities(score_BCHJ, near, far, sink_H, D**-0.5, q_BSHD.dtype)
        out_BRD = batch_times(probability_BCHJ[..., :T].flatten(1, 2), near.kv_BTD.mT)
        from_entries_NHD = torch.bmm(probability_BCHJ[..., T:T + K].flatten(0, 1), chosen_NKD)
        out_BSHD[:, block.queries] = out_BRD.view(B, C, H, D).add_(from_entries_NHD.view(B, C, H, D))
    return out_BSHD
