"""Attention over the window, the visible compressed entries and a sink: one softmax (report 2.3.1 - 2.3.3, eq. 27).

Keys are their own values (one shared key/value head). What a query may see is described by integers, never by
a stored [S, T] mask, so that faster implementations can skip what is invisible.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fathom.ops.dispatch import op, product
from fathom.ops.precision import wide


class Window(NamedTuple):
    """Uncompressed keys. A query at place p with reach r sees the keys at places p - r ... p of its row."""

    kv_BTD: Tensor
    key_place_BT: Tensor
    query_place_BS: Tensor
    reach_BS: Tensor


class Entries(NamedTuple):
    """Compressed keys. A query sees the `count` entries from `first` on, or only the `selected` among them (-1: none)."""

    kv_BMD: Tensor
    first_BS: Tensor
    count_BS: Tensor
    selected_BSK: Tensor | None

    def part(self, queries: slice, slots: slice) -> "Entries":
        """Of these queries, and these entries [B, m, D], which count from 0."""
        first, count, selected = self.first_BS[:, queries], self.count_BS[:, queries], None if self.selected_BSK is None else self.selected_BSK[:, queries]
        if slots.start:
            first, selected = first - slots.start, None if selected is None else (selected - slots.start).clamp(min=-1)
        return Entries(self.kv_BMD[:, slots], first, count, selected)


def window_keys(window: Window) -> Tensor:
    """Mask [B, S, T] of the window's keys that each query sees."""
    distance_BST = window.query_place_BS[:, :, None] - window.key_place_BT[:, None, :]
    return (distance_BST >= 0) & (distance_BST <= window.reach_BS[:, :, None])


def visible_entries(first_BS: Tensor, count_BS: Tensor, entries: int) -> Tensor:
    """Mask [B, S, M] of the entries that each query may read: its own document's complete blocks."""
    slot_M = torch.arange(entries, device=first_BS.device)
    return (slot_M >= first_BS[..., None]) & (slot_M < (first_BS + count_BS)[..., None])


def attended_entries(entries: Entries) -> Tensor:
    """Mask [B, S, M] of the entries that each query does read: the selected ones, else all visible ones."""
    if entries.selected_BSK is None:
        return visible_entries(entries.first_BS, entries.count_BS, entries.kv_BMD.shape[1])
    B, S, _ = entries.selected_BSK.shape
    M = entries.kv_BMD.shape[1]
    slot_BSK = entries.selected_BSK.where(entries.selected_BSK >= 0, M)  # "none" lands in a column that is cut off
    return torch.zeros(B, S, M + 1, dtype=torch.bool, device=slot_BSK.device).scatter(2, slot_BSK, True)[..., :M]


@product(0, 1, 2)
def attention(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    """Softmax attention [B, S, H, D] with scale D^-0.5; the sink joins the denominator only (eq. 27)."""
    keys_BJD = window.kv_BTD if entries is None else torch.cat([window.kv_BTD, entries.kv_BMD], 1)
    probability_BHSJ = _probabilities(q_BSHD, keys_BJD, window, entries, sink_H)
    return torch.einsum("bhsj,bjd->bshd", probability_BHSJ.to(keys_BJD.dtype), keys_BJD)


@op
def attention_gradients(q_BSHD: Tensor, grad_BSHD: Tensor, window: Window, entries: Entries | None,
                        sink_H: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """From the gradients of `attention`, those of queries [B, S, H, D], in their dtype, and of keys [B, T, D], entries [B, M, D] and sinks [H] in float32."""
    wanted = [q_BSHD, window.kv_BTD, sink_H, *([] if entries is None else [entries.kv_BMD])]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in wanted]
        out_BSHD = attention.definition(leaves[0], window._replace(kv_BTD=leaves[1]), entries and entries._replace(kv_BMD=leaves[3]), leaves[2])
        q_grad, kv_grad, sink_grad, *entries_grad = torch.autograd.grad(out_BSHD, leaves, grad_BSHD)
    return q_grad, wide(kv_grad), wide(entries_grad[0]) if entries_grad else None, wide(sink_grad)


@op
def entry_mass(q_BSHD: Tensor, window: Window, entries: Entries, sink_H: Tensor) -> Tensor:
    """Attention [B, S, M] that each entry gets from all heads together under the joint softmax; the indexer's target."""
    keys_BJD = torch.cat([window.kv_BTD, entries.kv_BMD], 1)
    probability_BHSJ = _probabilities(q_BSHD, keys_BJD, window, entries, sink_H)
    return probability_BHSJ[..., window.kv_BTD.shape[1]:].sum(1)


@op
def column_probabilities(score_BCHJ: Tensor, window: Window, entries: Entries | None, sink_H: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Each row's softmax [B, C, H, J] of `scale` times its products with keys, which are given up, in `dtype`.

    Columns: the window's T keys, M entries, any number that no query sees, and the sink. Entries without keys are the selected ones, each
    query's own K.
    """
    seen_BCJ = window_keys(window)
    if entries is not None:
        seen_BCJ = torch.cat([seen_BCJ, entries.selected_BSK >= 0 if entries.kv_BMD is None else attended_entries(entries)], 2)
    score_BCHJ = wide(score_BCHJ)
    bias_BCJ = score_BCHJ.new_full((*seen_BCJ.shape[:2], score_BCHJ.shape[3]), float("-inf"))
    bias_BCJ[..., :seen_BCJ.shape[2]].masked_fill_(seen_BCJ, 0)
    torch.add(bias_BCJ[:, :, None], score_BCHJ, alpha=scale, out=score_BCHJ)
    score_BCHJ[..., -1] = sink_H
    return torch.softmax(score_BCHJ, -1, out=score_BCHJ).to(dtype)


@op
def column_gradients(grad_BRJ: Tensor, probability_BRJ: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """From the gradients of `column_probabilities`, which are given up: those of the products [B, R, J], and of the sink in each row [B, R] in float32."""
    score_grad_BRJ = wide(grad_BRJ).mul_(probability_BRJ)
    score_grad_BRJ.addcmul_(probability_BRJ, score_grad_BRJ.sum(-1, keepdim=True), value=-1)
    sink_BR = score_grad_BRJ[..., -1].clone()
    return score_grad_BRJ.mul_(scale).to(grad_BRJ.dtype), sink_BR


def _probabilities(q_BSHD: Tensor, keys_BJD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    seen_BSJ = window_keys(window)
    if entries is not None:
        seen_BSJ = torch.cat([seen_BSJ, attended_entries(entries)], 2)
    B, S, H, D = q_BSHD.shape
    score_BHSJ = wide(torch.einsum("bshd,bjd->bhsj", q_BSHD, keys_BJD)) * D**-0.5
    score_BHSJ = score_BHSJ.masked_fill(~seen_BSJ[:, None], float("-inf"))
    sink_BHS1 = wide(sink_H)[None, :, None, None].expand(B, H, S, 1)
    return torch.cat([score_BHSJ, sink_BHS1], -1).softmax(-1)[..., :-1]
