"""Attention on CPU (report 2.3.1 - 2.3.3, eq. 27): blocks of queries that read only the keys some of them see.

Heads share their keys, so they become rows of one product per block: C queries have R = C H rows. A block's J columns are window keys, then
entries, then zeros, the last of which stands for the sink; their number is rounded up, so that few shapes occur. The backward
pass computes the probabilities anew. float32 and bfloat16; anything else is left to the definition.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.attention import Entries, Window, attention, attention_gradients, column_gradients, column_probabilities, entry_mass
from fathom.ops.cpu.products import batch_times

_MIN_QUERIES = 16  # fewer: the definition's few calls are cheaper (decoding one token: 0.14 ms against 0.21 ms)
_MIN_BLOCK = 32
_COLUMNS = 64


class Block(NamedTuple):
    """Queries that are attended together, and what any of them may see; columns of scores are the window's places, the slots, zeros, the sink."""

    queries: slice
    places: slice  # of window keys
    slots: slice  # of entries
    columns: int

    def keys(self, kv_BTD: Tensor, kv_BMD: Tensor | None) -> Tensor:
        """Keys [B, J, D] of all columns."""
        keys_BJD = kv_BTD.new_zeros(len(kv_BTD), self.columns, kv_BTD.shape[2])
        near = self.places.stop - self.places.start
        keys_BJD[:, :near] = kv_BTD[:, self.places]
        if kv_BMD is not None:
            keys_BJD[:, near:near + self.slots.stop - self.slots.start] = kv_BMD[:, self.slots]
        return keys_BJD

    def window(self, window: Window) -> Window:
        """The part of a window that it reads."""
        return Window(window.kv_BTD[:, self.places], window.key_place_BT[:, self.places], window.query_place_BS[:, self.queries],
                      window.reach_BS[:, self.queries])


def blocks(window: Window, entries: Entries | None) -> Iterator[Block]:
    """Blocks of queries, from the first to the last.

    Half a window of queries wastes a third of the window's products; at windows of 64 and 128, smaller blocks were
    slower for their calls and larger ones for their waste.
    """
    last_BS, key_BT = window.query_place_BS.int(), window.key_place_BT.int()
    first_BS = last_BS - window.reach_BS.int()
    size = max(_MIN_BLOCK, (int(window.reach_BS.max()) + 1) // 2)
    for start in range(0, last_BS.shape[1], size):
        queries = slice(start, start + size)
        near_BT = (key_BT >= first_BS[:, queries].amin(1, keepdim=True)) & (key_BT <= last_BS[:, queries].amax(1, keepdim=True))
        near_N = near_BT.any(0).nonzero()
        places = slice(int(near_N[0]), int(near_N[-1]) + 1) if len(near_N) else slice(0, 0)
        slots = slice(0, 0)
        if entries is not None:
            first_BC = entries.first_BS[:, queries]
            slots = slice(int(first_BC.min()), int((first_BC + entries.count_BS[:, queries]).max()))
        columns = places.stop - places.start + slots.stop - slots.start + 1
        yield Block(queries, places, slots, -(-columns // _COLUMNS) * _COLUMNS)


def probabilities(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor,
                  dtype: torch.dtype = torch.float32) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each block with its keys [B, J, D] and the softmax [B, R, J] of its scores."""
    for block in blocks(window, entries):
        q_BCHD = q_BSHD[:, block.queries]
        keys_BJD = block.keys(window.kv_BTD, None if entries is None else entries.kv_BMD)
        score_BCHJ = batch_times(q_BCHD.flatten(1, 2), keys_BJD).unflatten(1, q_BCHD.shape[1:3])
        far = None if entries is None else entries.part(block.queries, block.slots)
        yield block, keys_BJD, column_probabilities(score_BCHJ, block.window(window), far, sink_H, q_BCHD.shape[3]**-0.5, dtype).flatten(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHD: Tensor, kv_BTD: Tensor, kv_BMD: Tensor | None, sink_H: Tensor, window: Window,
                entries: Entries | None) -> Tensor:
        name, function = attention.choose(q_BSHD, window, entries, sink_H)
        out_BSHD = function(q_BSHD, window, entries, sink_H) if name == "native" else _in_blocks(q_BSHD, window, entries, sink_H)
        ctx.save_for_backward(q_BSHD, kv_BTD, kv_BMD, sink_H)
        # Only integers besides, without which the tensors above would be kept alive by the graph.
        ctx.window, ctx.entries = window._replace(kv_BTD=None), None if entries is None else entries._replace(kv_BMD=None)
        return out_BSHD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHD, kv_BTD, kv_BMD, sink_H = ctx.saved_tensors
        window, entries = ctx.window._replace(kv_BTD=kv_BTD), ctx.entries and ctx.entries._replace(kv_BMD=kv_BMD)
        q_grad_BSHD, kv_grad_BTD, kv_grad_BMD, sink_grad_H = attention_gradients(q_BSHD, grad_BSHD, window, entries, sink_H)
        kv_grads = (None if x is None else x.to(q_BSHD.dtype) for x in (kv_grad_BTD, kv_grad_BMD))
        return q_grad_BSHD, *kv_grads, sink_grad_H.to(sink_H.dtype), None, None


def _in_blocks(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    out_BSHD = torch.empty(q_BSHD.shape, dtype=q_BSHD.dtype)
    for block, keys_BJD, probability_BRJ in probabilities(q_BSHD, window, entries, sink_H, q_BSHD.dtype):
        out_BSHD[:, block.queries] = batch_times(probability_BRJ, keys_BJD.mT).unflatten(1, (-1, len(sink_H)))
    return out_BSHD


def _differentiable(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> list[Tensor]:
    return [q_BSHD, window.kv_BTD, sink_H] + ([] if entries is None else [entries.kv_BMD])


def asks_for_gradients(*arguments) -> bool:
    """Whether autograd will ask for gradients of an attention operator's arguments."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in _differentiable(*arguments))


def supports(*arguments) -> bool:
    """Whether queries [B, S, H, D] and keys are all float32 or all bfloat16, the sink that or float32, on a CPU."""
    q, window_kv, sink, *more = _differentiable(*arguments)
    return (all(x.device.type == "cpu" for x in (q, window_kv, sink, *more)) and q.dtype in (torch.float32, torch.bfloat16)
            and all(x.dtype == q.dtype for x in (window_kv, *more)) and sink.dtype in (q.dtype, torch.float32))


@attention_gradients.register("cpu", supports=lambda q_BSHD, grad_BSHD, *others: supports(q_BSHD, *others))
def attention_gradients_cpu(q_BSHD: Tensor, grad_BSHD: Tensor, window: Window, entries: Entries | None,
                            sink_H: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`attention_gradients`, a block of queries at a time."""
    H, D = q_BSHD.shape[2:]
    q_grad_BSHD, kv_grad_BTD, sink_grad_H = torch.empty(q_BSHD.shape, dtype=q_BSHD.dtype), torch.zeros(window.kv_BTD.shape), torch.zeros(H)
    kv_grad_BMD = None if entries is None else torch.zeros(entries.kv_BMD.shape)
    for block, keys_BJD, probability_BRJ in probabilities(q_BSHD, window, entries, sink_H):
        q_BRD, grad_BRD = (x[:, block.queries].flatten(1, 2) for x in (q_BSHD, grad_BSHD))
        score_grad_BRJ, sink_grad_BR = column_gradients(batch_times(grad_BRD, keys_BJD), probability_BRJ, D**-0.5)
        sink_grad_H += sink_grad_BR.unflatten(1, (-1, H)).sum((0, 1))
        probability_BRJ = probability_BRJ.to(q_BSHD.dtype)
        q_grad_BSHD[:, block.queries] = batch_times(score_grad_BRJ, keys_BJD.mT).unflatten(1, (-1, H))
        keys_grad_BJD = batch_times(probability_BRJ.mT, grad_BRD.mT).add_(batch_times(score_grad_BRJ.mT, q_BRD.mT))
        window_grad = kv_grad_BTD[:, block.places]
        window_grad += keys_grad_BJD[:, :window_grad.shape[1]]
        if entries is not None:
            entries_grad = kv_grad_BMD[:, block.slots]
            entries_grad += keys_grad_BJD[:, window_grad.shape[1]:window_grad.shape[1] + entries_grad.shape[1]]
    return q_grad_BSHD, kv_grad_BTD, kv_grad_BMD, sink_grad_H


def _supports(q_BSHD: Tensor, *others) -> bool:
    return q_BSHD.shape[1] >= _MIN_QUERIES and supports(q_BSHD, *others)


@attention.register("cpu", supports=_supports)
def attention_cpu(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    """`attention` for enough queries."""
    return _Attention.apply(q_BSHD, window.kv_BTD, None if entries is None else entries.kv_BMD, sink_H, window, entries)


@entry_mass.register("cpu", supports=lambda *arguments: _supports(*arguments) and not asks_for_gradients(*arguments))
@torch.no_grad()
def entry_mass_cpu(q_BSHD: Tensor, window: Window, entries: Entries, sink_H: Tensor) -> Tensor:
    """`entry_mass` for enough queries, where no gradient is asked for."""
    mass_BSM = torch.zeros(*q_BSHD.shape[:2], entries.kv_BMD.shape[1])
    for block, _, probability_BRJ in probabilities(q_BSHD, window, entries, sink_H):
        mass_BCM = mass_BSM[:, block.queries, block.slots]
        first = block.places.stop - block.places.start
        entries_BRM = probability_BRJ[..., first:first + mass_BCM.shape[2]]
        mass_BCM.copy_(entries_BRM.unflatten(1, (-1, len(sink_H))).sum(2))
    return mass_BSM
