"""Attention on CPU (report 2.3.1 - 2.3.3, eq. 27): blocks of queries that read only the keys some of them see.

Heads share their keys, so they become rows of one product per block: C queries have R = C H rows. A block's J columns
are window keys, then entries, then the sink, whose key is zero. float32 only: anything else is left to the definition.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.attention import Entries, Window, attended_entries, attention, entry_mass

_MIN_QUERIES = 16  # fewer: the definition's few calls are cheaper (decoding one token: 0.14 ms against 0.21 ms)
_MIN_BLOCK = 32


class _Block(NamedTuple):
    queries: slice
    places: slice  # of window keys
    slots: slice  # of entries

    def keys(self, kv_BTD: Tensor, kv_BMD: Tensor | None) -> Tensor:
        """Keys [B, J, D] of all columns."""
        parts = [kv_BTD[:, self.places]] if kv_BMD is None else [kv_BTD[:, self.places], kv_BMD[:, self.slots]]
        return torch.cat([*parts, kv_BTD.new_zeros(len(kv_BTD), 1, kv_BTD.shape[2])], 1)


def _blocks(window: Window, entries: Entries | None) -> Iterator[tuple[_Block, Tensor]]:
    """Each block with its mask [B, C, J - 1] of the keys seen.

    Half a window of queries wastes a third of the window's products; at windows of 64 and 128, smaller blocks were
    slower for their calls and larger ones for their waste. A block's slices hold what any row of the batch may see.
    """
    last_BS, key_BT = window.query_place_BS.int(), window.key_place_BT.int()
    first_BS = last_BS - window.reach_BS.int()
    size = max(_MIN_BLOCK, (int(window.reach_BS.max()) + 1) // 2)
    for start in range(0, last_BS.shape[1], size):
        queries = slice(start, start + size)
        first_BC, last_BC = first_BS[:, queries], last_BS[:, queries]
        near_BT = (key_BT >= first_BC.amin(1, keepdim=True)) & (key_BT <= last_BC.amax(1, keepdim=True))
        near_N = near_BT.any(0).nonzero()
        places = slice(int(near_N[0]), int(near_N[-1]) + 1) if len(near_N) else slice(0, 0)
        key_B1J = key_BT[:, None, places]
        seen_BCJ = (key_B1J >= first_BC[..., None]) & (key_B1J <= last_BC[..., None])
        slots = slice(0, 0)
        if entries is not None:
            first_BC, count_BC = entries.first_BS[:, queries], entries.count_BS[:, queries]
            slots = slice(int(first_BC.min()), int((first_BC + count_BC).max()))
            selected_BCK = None if entries.selected_BSK is None else entries.selected_BSK[:, queries] - slots.start
            visible = Entries(entries.kv_BMD[:, slots], first_BC - slots.start, count_BC, selected_BCK)
            seen_BCJ = torch.cat([seen_BCJ, attended_entries(visible)], 2)
        yield _Block(queries, places, slots), seen_BCJ


def window_blocks(window: Window) -> Iterator[tuple[_Block, Tensor]]:
    """Blocks of queries with their window keys' mask [B, C, J] alone."""
    return _blocks(window, None)


def _probabilities(q_BSHD: Tensor, window: Window, entries: Entries | None,
                   sink_H: Tensor) -> Iterator[tuple[_Block, Tensor, Tensor]]:
    """Each block with its keys [B, J, D] and the softmax [B, R, J] of its scores."""
    for block, seen_BCJ in _blocks(window, entries):
        q_BCHD = q_BSHD[:, block.queries]
        keys_BJD = block.keys(window.kv_BTD, None if entries is None else entries.kv_BMD)
        score_BCHJ = q_BSHD.new_empty(*q_BCHD.shape[:3], keys_BJD.shape[1])
        score_BCHJ[..., :-1] = torch.where(seen_BCJ, 0.0, float("-inf"))[:, :, None]
        score_BCHJ[..., -1] = sink_H
        score_BRJ = score_BCHJ.flatten(1, 2)
        score_BRJ.baddbmm_(q_BCHD.flatten(1, 2), keys_BJD.mT, alpha=q_BCHD.shape[3]**-0.5)
        yield block, keys_BJD, torch.softmax(score_BRJ, -1, out=score_BRJ)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHD: Tensor, kv_BTD: Tensor, kv_BMD: Tensor | None, sink_H: Tensor, window: Window,
                entries: Entries | None, wants_grad: bool) -> Tensor:
        out_BSHD = torch.empty_like(q_BSHD)
        ctx.blocks, kept = [], []
        for block, keys_BJD, probability_BRJ in _probabilities(q_BSHD, window, entries, sink_H):
            out_BSHD[:, block.queries] = (probability_BRJ @ keys_BJD).unflatten(1, (-1, len(sink_H)))
            if wants_grad:
                ctx.blocks.append(block)
                kept.append(probability_BRJ)
        ctx.save_for_backward(q_BSHD, kv_BTD, kv_BMD, *kept)
        return out_BSHD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHD, kv_BTD, kv_BMD, *kept = ctx.saved_tensors
        H, D = q_BSHD.shape[2:]
        q_grad_BSHD, kv_grad_BTD, sink_grad_H = torch.empty_like(q_BSHD), torch.zeros_like(kv_BTD), q_BSHD.new_zeros(H)
        kv_grad_BMD = None if kv_BMD is None else torch.zeros_like(kv_BMD)
        for block, probability_BRJ in zip(ctx.blocks, kept, strict=True):
            keys_BJD = block.keys(kv_BTD, kv_BMD)
            q_BRD, grad_BRD = (x[:, block.queries].flatten(1, 2) for x in (q_BSHD, grad_BSHD))
            score_grad_BRJ = (grad_BRD @ keys_BJD.mT).mul_(probability_BRJ)
            score_grad_BRJ.addcmul_(probability_BRJ, score_grad_BRJ.sum(-1, keepdim=True), value=-1)
            q_grad_BSHD[:, block.queries] = (score_grad_BRJ @ keys_BJD).mul_(D**-0.5).unflatten(1, (-1, H))
            keys_grad_BJD = (probability_BRJ.mT @ grad_BRD).baddbmm_(score_grad_BRJ.mT, q_BRD, alpha=D**-0.5)
            window_grad = kv_grad_BTD[:, block.places]
            window_grad += keys_grad_BJD[:, :window_grad.shape[1]]
            if kv_BMD is not None:
                kv_grad_BMD[:, block.slots] += keys_grad_BJD[:, window_grad.shape[1]:-1]
            sink_grad_H += score_grad_BRJ[..., -1].unflatten(1, (-1, H)).sum((0, 1))
        return q_grad_BSHD, kv_grad_BTD, kv_grad_BMD, sink_grad_H, None, None, None


def _differentiable(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> list[Tensor]:
    return [q_BSHD, window.kv_BTD, sink_H] + ([] if entries is None else [entries.kv_BMD])


def asks_for_gradients(*arguments) -> bool:
    """Whether autograd will ask for gradients of an attention operator's arguments."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in _differentiable(*arguments))


def supports(q_BSHD: Tensor, *others) -> bool:
    """Whether all tensors [B, S, H, D] ... that gradients could reach are float32 on a CPU."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in _differentiable(q_BSHD, *others))


def _supports(q_BSHD: Tensor, *others) -> bool:
    return q_BSHD.shape[1] >= _MIN_QUERIES and supports(q_BSHD, *others)


@attention.register("cpu", supports=_supports)
def attention_cpu(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    """`attention` for float32 and enough queries; probabilities are kept only where autograd will ask for gradients."""
    wants_grad = asks_for_gradients(q_BSHD, window, entries, sink_H)
    kv_BMD = None if entries is None else entries.kv_BMD
    return _Attention.apply(q_BSHD, window.kv_BTD, kv_BMD, sink_H, window, entries, wants_grad)


@entry_mass.register("cpu", supports=lambda *arguments: _supports(*arguments) and not asks_for_gradients(*arguments))
def entry_mass_cpu(q_BSHD: Tensor, window: Window, entries: Entries, sink_H: Tensor) -> Tensor:
    """`entry_mass` for float32 and enough queries, where no gradient is asked for."""
    mass_BSM = q_BSHD.new_zeros(*q_BSHD.shape[:2], entries.kv_BMD.shape[1])
    for block, _, probability_BRJ in _probabilities(q_BSHD, window, entries, sink_H):
        mass_BCM = mass_BSM[:, block.queries, block.slots]
        entries_BRM = probability_BRJ[..., -1 - mass_BCM.shape[2]:-1]
        mass_BCM.copy_(entries_BRM.unflatten(1, (-1, len(sink_H))).sum(2))
    return mass_BSM
