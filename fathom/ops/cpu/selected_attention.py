"""Attention over selected entries on CPU (report 2.3.1): each query's entries are gathered, so that cost does not grow with context.

Takes over from masked blocks (attention.py) where far more entries are visible than selected. Without gradients only; few queries, one
decoded token above all, are taken as well as many.
"""

import torch
from torch import Tensor

from fathom.ops.attention import Entries, Window, attention
from fathom.ops.cpu.attention import asks_for_gradients, supports, window_blocks
from fathom.ops.cpu.products import batch_times

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
    none_BSK = entries.selected_BSK < 0
    out_BSHD = torch.empty_like(q_BSHD)
    for block, bias_BCJ in window_blocks(window):
        q_BCHD, index_BCK = q_BSHD[:, block.queries], index_BSK[:, block.queries]
        (_, C), J, keys_BJD = index_BCK.shape[:2], block.columns, block.keys(window.kv_BTD, None)
        chosen_NKD = kv_ID.index_select(0, index_BCK.flatten()).view(B * C, K, D)
        score_BCHJ = torch.empty(B, C, H, J + K)  # the sink is the last of the window's columns
        near_BCHJ, far_BCHK = score_BCHJ.split([J, K], -1)
        near_BCHJ.copy_(batch_times(q_BCHD.flatten(1, 2), keys_BJD).view(B, C, H, J)).mul_(D**-0.5).add_(bias_BCJ[:, :, None])
        near_BCHJ[..., -1] = sink_H
        far_BCHK.copy_(torch.bmm(q_BCHD.flatten(0, 1), chosen_NKD.mT).view(B, C, H, K)).mul_(D**-0.5)
        far_BCHK.masked_fill_(none_BSK[:, block.queries, None], float("-inf"))
        probability_BCHJ = torch.softmax(score_BCHJ, -1, out=score_BCHJ).to(q_BSHD.dtype)
        near_BCHJ, far_BCHK = probability_BCHJ.split([J, K], -1)
        out_BRD = batch_times(near_BCHJ.flatten(1, 2), keys_BJD.mT)
        from_entries_NHD = torch.bmm(far_BCHK.flatten(0, 1), chosen_NKD)
        out_BSHD[:, block.queries] = out_BRD.view(B, C, H, D).add_(from_entries_NHD.view(B, C, H, D))
    return out_BSHD
