"""Attention over window keys, entries and a sink in Triton (report 2.3.1 - 2.3.3, eq. 27): one pass over the keys, one softmax.

A program holds the queries of one tile and goes through tiles of the keys that they read, in an order that depends on nothing but the row,
so a row has the same bits in any batch. Few queries (decoding) leave most of a GPU idle: their entries are read in parts of a fixed size,
a program each, which a second kernel joins. Only whether a call has few queries per row changes the order of a row's sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.attention import Entries, Window, attention
from fathom.ops.triton.attention_backward import gradients
from fathom.ops.triton.attention_tiles import Reads, cells, entry_keys, ranges, reads, rows, scores, tiles, window_keys
from fathom.ops.triton.launch import NAME, runs

_CHANNELS = (16, 32, 64, 128, 256, 512)
_FEW_QUERIES = 4  # per row of the batch: a decoded token and its drafts
_PART = 128  # entries of a part; a multiple of every number of keys in a tile


@triton.jit
def _add_keys(q_RD, k_JD, seen_RJ, scale, top_R, sum_R, out_RD, VALUES: tl.constexpr):
    """Go on with a softmax by a tile of keys: exp(score - top) is summed in `sum`, and times the key in `out`."""
    score_RJ = tl.where(seen_RJ, scores(q_RD, k_JD, scale), float("-inf"))
    new_top_R = tl.maximum(top_R, tl.max(score_RJ, 1))
    keep_R = tl.exp(top_R - new_top_R)
    weight_RJ = tl.exp(score_RJ - new_top_R[:, None])
    sum_R = sum_R * keep_R + tl.sum(weight_RJ, 1)
    if VALUES:
        out_RD = tl.dot(weight_RJ.to(k_JD.dtype), k_JD, out_RD * keep_R[:, None], input_precision="ieee")
    return new_top_R, sum_R, out_RD


@triton.jit
def _attend(q_BSHD, kv_BTD, kv_BMD, sink_H, order_BT, begin_BS, end_BS, first_BS, last_BS, selected_BSK, out_PBSHD, norm_PBSH, sum_PBSH,
            S, H, T, K, scale, kv_row, kv_key, entry_row, entry_key, D: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
            KEYS: tl.constexpr, SELECTED: tl.constexpr, PART: tl.constexpr, VALUES: tl.constexpr):
    """Output and log-sum-exp (`norm`) of a tile of queries; with parts, part 0 is the window and the sink, the others PART entries each."""
    head_tiles = tl.cdiv(H, HEADS)
    b, part = tl.program_id(1) // head_tiles, tl.program_id(2)
    first_head = tl.program_id(1) % head_tiles * HEADS
    query_R, cell_R, real_R = rows(b, tl.program_id(0) * QUERIES, first_head, S, H, QUERIES, HEADS)
    q_RD = cells(q_BSHD, cell_R, real_R, D)
    # the sink joins the denominator only: a score without a key. Every part measures its scores from it, so that no maximum is infinite
    top_R = tl.load(sink_H + cell_R % H, mask=real_R, other=0.0).to(tl.float32)
    sum_R = tl.zeros_like(top_R) + tl.where(part == 0, 1.0, 0.0)
    out_RD = tl.zeros([QUERIES * HEADS, D], tl.float32)

    begin_R, end_R, low, high = ranges(begin_BS, end_BS, query_R, real_R)
    if PART:
        high = tl.where(part == 0, high, 0)
    for start in range(low // KEYS * KEYS, high, KEYS):
        k_JD, seen_RJ = window_keys(kv_BTD, order_BT, b, start, begin_R, end_R, T, kv_row, kv_key, D, KEYS)
        top_R, sum_R, out_RD = _add_keys(q_RD, k_JD, seen_RJ, scale, top_R, sum_R, out_RD, VALUES)

    first_R, last_R, low, high = ranges(first_BS, last_BS, query_R, real_R)
    if SELECTED:
        low, high = 0, K
    low = low // KEYS * KEYS
    if PART:
        low, high = tl.maximum(low, (part - 1) * PART), tl.minimum(high, part * PART)
    for start in range(low, high, KEYS):
        k_JD, seen_RJ = entry_keys(kv_BMD, selected_BSK, b, tl.program_id(0), start, high, first_R, last_R, real_R, S, K, entry_row, entry_key,
                                   D, KEYS, SELECTED)
        top_R, sum_R, out_RD = _add_keys(q_RD, k_JD, seen_RJ, scale, top_R, sum_R, out_RD, VALUES)

    if PART:
        cell_R += part.to(tl.int64) * (tl.num_programs(1) // head_tiles) * S * H
        tl.store(sum_PBSH + cell_R, sum_R, mask=real_R)
        tl.store(norm_PBSH + cell_R, top_R, mask=real_R)
    else:
        out_RD = out_RD / sum_R[:, None]  # which holds at least the greatest score's weight, 1
        tl.store(norm_PBSH + cell_R, top_R + tl.log(sum_R), mask=real_R)
    if VALUES:
        tl.store(out_PBSHD + cell_R[:, None] * D + tl.arange(0, D)[None, :], out_RD.to(out_PBSHD.dtype.element_ty), mask=real_R[:, None])


@triton.jit
def _join(out_PBSHD, top_PBSH, sum_PBSH, out_BSHD, cells_of_part, parts, D: tl.constexpr):
    """One cell's output [D] from its parts, one after the other: the sums of all parts, measured from the greatest maximum."""
    cell = tl.program_id(0).to(tl.int64)
    channel_D = tl.arange(0, D)
    top = tl.load(top_PBSH + cell)
    for part in range(1, parts):
        top = tl.maximum(top, tl.load(top_PBSH + part * cells_of_part + cell))
    total = top * 0
    out_D = tl.zeros([D], tl.float32)
    for part in range(0, parts):
        at = part * cells_of_part + cell
        share = tl.exp(tl.load(top_PBSH + at) - top)
        total += share * tl.load(sum_PBSH + at)
        out_D += share * tl.load(out_PBSHD + at * D + channel_D)
    tl.store(out_BSHD + cell * D + channel_D, (out_D / total).to(out_BSHD.dtype.element_ty))


def attend(q_BSHD: Tensor, kv_BTD: Tensor, kv_BMD: Tensor, sink_H: Tensor, read: Reads, parts: int | None = None,
           values: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H]; with parts [P, ...]: sums of values, maxima and denominators, before any division.

    q_BSHD is contiguous, and channels lie side by side in kv_BTD and kv_BMD. Without `values` there is no output.
    """
    B, S, H, D = q_BSHD.shape
    K = 0 if read.selected_BSK is None else read.selected_BSK.shape[2]
    tile = tiles(q_BSHD, read.selected_BSK is not None)
    shape = (B, S, H) if parts is None else (parts, B, S, H)
    norm, total = q_BSHD.new_empty(2, *shape, dtype=torch.float32)
    out = q_BSHD.new_empty(*shape, D if values else 0, dtype=q_BSHD.dtype if parts is None else torch.float32)
    grid = triton.cdiv(S, tile.queries), B * triton.cdiv(H, tile.heads), parts or 1
    _attend[grid](q_BSHD, kv_BTD, kv_BMD, sink_H.contiguous(), *read, out, norm, total, S, H, kv_BTD.shape[1], K, D**-0.5, *kv_BTD.stride()[:2],
                  *kv_BMD.stride()[:2], D=D, QUERIES=tile.queries, HEADS=tile.heads, KEYS=tile.keys, SELECTED=read.selected_BSK is not None,
                  PART=0 if parts is None else _PART, VALUES=values, num_warps=tile.warps, num_stages=2)
    return out, norm, total


def _attend_in_parts(q_BSHD: Tensor, kv_BTD: Tensor, kv_BMD: Tensor, sink_H: Tensor, read: Reads) -> Tensor:
    """`attend`'s output alone, of few queries: the parts at once, then joined."""
    entries = kv_BMD.shape[1] if read.selected_BSK is None else read.selected_BSK.shape[2]
    parts = 1 + triton.cdiv(entries, _PART)  # more where another row has more: they add exact zeros
    out_PBSHD, top_PBSH, sum_PBSH = attend(q_BSHD, kv_BTD, kv_BMD, sink_H, read, parts)
    out_BSHD = torch.empty_like(q_BSHD)
    cells_of_part = sum_PBSH[0].numel()
    _join[(cells_of_part,)](out_PBSHD, top_PBSH, sum_PBSH, out_BSHD, cells_of_part, parts, D=q_BSHD.shape[3], num_warps=4)
    return out_BSHD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHD: Tensor, kv_BTD: Tensor, kv_BMD: Tensor | None, sink_H: Tensor, read: Reads) -> Tensor:
        q_BSHD = q_BSHD.contiguous()
        out_BSHD, norm_BSH, _ = attend(q_BSHD, *keys_in_order(kv_BTD, kv_BMD), sink_H, read)
        ctx.save_for_backward(q_BSHD, kv_BTD, kv_BMD, sink_H, out_BSHD, norm_BSH)
        ctx.read = read  # integers
        return out_BSHD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHD, kv_BTD, kv_BMD, sink_H, out_BSHD, norm_BSH = ctx.saved_tensors
        keys_of_both = keys_in_order(kv_BTD, kv_BMD)
        q_grad, kv_grad, entry_grad, sink_grad = gradients(q_BSHD, *keys_of_both, sink_H, ctx.read, out_BSHD, norm_BSH,
                                                           grad_BSHD.contiguous())
        return q_grad, kv_grad, None if kv_BMD is None else entry_grad, sink_grad, None


def keys_in_order(kv_BTD: Tensor, kv_BMD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Window keys [B, T, D] and entries [B, M, D], M = 0 for none, with channels side by side; a part of a cache is not copied."""
    kv_BMD = kv_BTD[:, :0] if kv_BMD is None else kv_BMD
    return tuple(x if x.stride(2) == 1 else x.contiguous() for x in (kv_BTD, kv_BMD))


def wants_gradients(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> bool:
    """Whether autograd will ask for gradients of the arguments, q_BSHD and the others."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(q_BSHD, window, entries, sink_H))


def supports(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> bool:
    """Whether the kernels take the arguments: queries [B, S, H, D] and keys of one dtype, D a power of two from 16 to 512."""
    tensors = _tensors(q_BSHD, window, entries, sink_H)
    return (runs(*tensors) and q_BSHD.numel() > 0 and q_BSHD.shape[3] in _CHANNELS
            and all(x.dtype == q_BSHD.dtype for x in tensors[:-1]))


def _tensors(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> list[Tensor]:
    return [q_BSHD, window.kv_BTD] + ([] if entries is None else [entries.kv_BMD]) + [sink_H]


@attention.register(NAME, supports=supports)
def attention_triton(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    """`attention` on a GPU."""
    read, kv_BMD = reads(window, entries), None if entries is None else entries.kv_BMD
    if q_BSHD.shape[1] <= _FEW_QUERIES and not wants_gradients(q_BSHD, window, entries, sink_H):
        return _attend_in_parts(q_BSHD.contiguous(), *keys_in_order(window.kv_BTD, kv_BMD), sink_H, read)
    return _Attention.apply(q_BSHD, window.kv_BTD, kv_BMD, sink_H, read)
