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
def entry_mass(q_BSHD: Tensor, window: Window, entries: Entries, sink_H: Tensor) -> Tensor:
    """Attention [B, S, M] that each entry gets from all heads together under the joint softmax; the indexer's target."""
    keys_BJD = torch.cat([window.kv_BTD, entries.kv_BMD], 1)
    probability_BHSJ = _probabilities(q_BSHD, keys_BJD, window, entries, sink_H)
    return probability_BHSJ[..., window.kv_BTD.shape[1]:].sum(1)


def _probabilities(q_BSHD: Tensor, keys_BJD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    distance_BST = window.query_place_BS[:, :, None] - window.key_place_BT[:, None, :]
    seen_BSJ = (distance_BST >= 0) & (distance_BST <= window.reach_BS[:, :, None])
    if entries is not None:
        seen_BSJ = torch.cat([seen_BSJ, attended_entries(entries)], 2)
    B, S, H, D = q_BSHD.shape
    score_BHSJ = wide(torch.einsum("bshd,bjd->bhsj", q_BSHD, keys_BJD)) * D**-0.5
    score_BHSJ = score_BHSJ.masked_fill(~seen_BSJ[:, None], float("-inf"))
    sink_BHS1 = wide(sink_H)[None, :, None, None].expand(B, H, S, 1)
    return torch.cat([score_BHSJ, sink_BHS1], -1).softmax(-1)[..., :-1]
