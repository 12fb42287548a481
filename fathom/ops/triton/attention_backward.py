"""Gradients of attention in Triton: probabilities computed anew from the log-sum-exp, one pass for queries and one for keys.

With p = exp(score - norm) and delta = output . its gradient, a score's gradient is p (gradient . key - delta), a query's is the sum of those
times the keys, and a key's, being its own value, the sum over rows of p times the gradient and of the score's gradient times the query.
No atomics: every sum has one order. Many queries read one key, so their rows are split among programs, whose sums are added afterwards.
Entries that queries select lie anywhere: the gradient of each pair of a query and one of its entries is written down, for as many queries as
there is memory set aside, then the pairs are summed by entry in the queries' order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.triton.attention_tiles import Reads, cells, entry_keys, keys, ranges, rows, scores, tiles, window_keys

_PROGRAMS = 1024  # enough to fill a GPU several times over; their partial sums take 64 MiB at most
_PAIR_NUMBERS = 2**26  # of the pairs' gradients at a time: 256 MiB
_PAIRS = 16  # in a tile


@triton.jit
def _score_gradients(q_RD, grad_RD, k_JD, seen_RJ, norm_R, delta_R, scale):
    """Probabilities [R, J] and what the products q . k get [R, J]."""
    p_RJ = tl.where(seen_RJ, tl.exp(scores(q_RD, k_JD, scale) - norm_R[:, None]), 0.0)
    return p_RJ, p_RJ * (tl.dot(grad_RD, tl.trans(k_JD), input_precision="ieee") - delta_R[:, None]) * scale


@triton.jit
def _query_gradient(q_BSHD, kv_BTD, kv_BMD, order_BT, begin_BS, end_BS, first_BS, last_BS, selected_BSK, out_BSHD, norm_BSH, grad_BSHD,
                    q_grad_BSHD, delta_BSH, S, H, T, K, scale, kv_row, kv_key, entry_row, entry_key, D: tl.constexpr,
                    QUERIES: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, SELECTED: tl.constexpr):
    """delta and the gradient of a tile of queries, over the same tiles of keys as the forward pass."""
    head_tiles = tl.cdiv(H, HEADS)
    b = tl.program_id(1) // head_tiles
    first_head = tl.program_id(1) % head_tiles * HEADS
    query_R, cell_R, real_R = rows(b, tl.program_id(0) * QUERIES, first_head, S, H, QUERIES, HEADS)
    q_RD, grad_RD = cells(q_BSHD, cell_R, real_R, D), cells(grad_BSHD, cell_R, real_R, D)
    norm_R = tl.load(norm_BSH + cell_R, mask=real_R, other=0.0)
    delta_R = tl.sum(cells(out_BSHD, cell_R, real_R, D).to(tl.float32) * grad_RD.to(tl.float32), 1)
    tl.store(delta_BSH + cell_R, delta_R, mask=real_R)
    q_grad_RD = tl.zeros([QUERIES * HEADS, D], tl.float32)

    begin_R, end_R, low, high = ranges(begin_BS, end_BS, query_R, real_R)
    for start in range(low // KEYS * KEYS, high, KEYS):
        k_JD, seen_RJ = window_keys(kv_BTD, order_BT, b, start, begin_R, end_R, T, kv_row, kv_key, D, KEYS)
        _, score_RJ = _score_gradients(q_RD, grad_RD, k_JD, seen_RJ, norm_R, delta_R, scale)
        q_grad_RD = tl.dot(score_RJ.to(k_JD.dtype), k_JD, q_grad_RD, input_precision="ieee")

    first_R, last_R, low, high = ranges(first_BS, last_BS, query_R, real_R)
    if SELECTED:
        low, high = 0, K
    for start in range(low // KEYS * KEYS, high, KEYS):
        k_JD, seen_RJ = entry_keys(kv_BMD, selected_BSK, b, tl.program_id(0), start, high, first_R, last_R, real_R, S, K, entry_row, entry_key,
                                   D, KEYS, SELECTED)
        _, score_RJ = _score_gradients(q_RD, grad_RD, k_JD, seen_RJ, norm_R, delta_R, scale)
        q_grad_RD = tl.dot(score_RJ.to(k_JD.dtype), k_JD, q_grad_RD, input_precision="ieee")
    tl.store(q_grad_BSHD + cell_R[:, None] * D + tl.arange(0, D)[None, :], q_grad_RD.to(q_grad_BSHD.dtype.element_ty), mask=real_R[:, None])


@triton.jit
def _add_rows(q_BSHD, grad_BSHD, norm_BSH, delta_BSH, cell_R, real_R, k_JD, seen_RJ, k_grad_JD, scale, D: tl.constexpr):
    """Add to the gradient of a tile of keys what a tile of queries gives it."""
    q_RD, grad_RD = cells(q_BSHD, cell_R, real_R, D), cells(grad_BSHD, cell_R, real_R, D)
    norm_R = tl.load(norm_BSH + cell_R, mask=real_R, other=0.0)
    delta_R = tl.load(delta_BSH + cell_R, mask=real_R, other=0.0)
    p_RJ, score_RJ = _score_gradients(q_RD, grad_RD, k_JD, seen_RJ, norm_R, delta_R, scale)
    k_grad_JD = tl.dot(tl.trans(p_RJ.to(k_JD.dtype)), grad_RD, k_grad_JD, input_precision="ieee")
    return tl.dot(tl.trans(score_RJ.to(k_JD.dtype)), q_RD, k_grad_JD, input_precision="ieee")


@triton.jit
def _key_gradient(q_BSHD, kv_BTD, order_BT, begin_BS, end_BS, from_BN, to_BN, norm_BSH, grad_BSHD, delta_BSH, kv_grad_PBTD,
                  S, H, T, scale, kv_row, kv_key, D: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
                  ORDERED: tl.constexpr):
    """A tile of keys' gradient from one of P shares of the rows of the queries that may read it, `from` ... `to` - 1."""
    tile, b, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_J = tile * KEYS + tl.arange(0, KEYS)
    real_J = at_J < T
    index_J = at_J
    if ORDERED:
        index_J = tl.load(order_BT + b * T + at_J, mask=real_J, other=0)
    k_JD = keys(kv_BTD, b, index_J, real_J, kv_row, kv_key, D)
    k_grad_JD = tl.zeros([KEYS, D], tl.float32)

    first = tl.load(from_BN + b * tl.num_programs(0) + tile)
    last = tl.load(to_BN + b * tl.num_programs(0) + tile)
    head_tiles = tl.cdiv(H, HEADS)
    steps = tl.cdiv(tl.maximum(last - first, 0), QUERIES) * head_tiles
    steps_of_share = tl.cdiv(steps, tl.num_programs(2))
    for step in range(share * steps_of_share, tl.minimum((share + 1) * steps_of_share, steps)):
        first_query = first + step // head_tiles * QUERIES
        query_R, cell_R, real_R = rows(b, first_query, step % head_tiles * HEADS, S, H, QUERIES, HEADS)
        begin_R, end_R, _, _ = ranges(begin_BS, end_BS, query_R, real_R)
        seen_RJ = (at_J[None, :] >= begin_R[:, None]) & (at_J[None, :] < end_R[:, None])
        k_grad_JD = _add_rows(q_BSHD, grad_BSHD, norm_BSH, delta_BSH, cell_R, real_R, k_JD, seen_RJ, k_grad_JD, scale, D)
    row = share.to(tl.int64) * tl.num_programs(1) + b
    at_JD = (row * T + index_J)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(kv_grad_PBTD + at_JD, k_grad_JD, mask=real_J[:, None])


@triton.jit
def _pair_gradients(q_BSHD, kv_BMD, selected_BSK, norm_BSH, grad_BSHD, delta_BSH, pair_grad_NKD, first_query, S, H, K, scale, entry_row, entry_key,
                    D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """Gradients of the entries that one query selects, the n-th of N from first_query on, from its heads alone."""
    n = tl.program_id(0).to(tl.int64)
    b, s = (first_query + n) // S, (first_query + n) % S
    at_J = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    index_J = tl.load(selected_BSK + (first_query + n) * K + at_J, mask=at_J < K, other=-1)
    k_JD = keys(kv_BMD, b, index_J, index_J >= 0, entry_row, entry_key, D)
    k_grad_JD = tl.zeros([KEYS, D], tl.float32)
    for first_head in range(0, H, HEADS):
        _, cell_R, real_R = rows(b, s, first_head, S, H, 1, HEADS)
        seen_RJ = (index_J >= 0)[None, :] & real_R[:, None]
        k_grad_JD = _add_rows(q_BSHD, grad_BSHD, norm_BSH, delta_BSH, cell_R, real_R, k_JD, seen_RJ, k_grad_JD, scale, D)
    tl.store(pair_grad_NKD + (n * K + at_J)[:, None] * D + tl.arange(0, D)[None, :], k_grad_JD, mask=(at_J < K)[:, None])


@triton.jit
def _sum_pairs(pair_grad_ID, pair_I, first_E, kv_grad_ED, D: tl.constexpr, PAIRS: tl.constexpr):
    """Add to one entry's gradient [D] those of its pairs, which lie side by side in the list `pair_I` sorted by entry."""
    entry = tl.program_id(0).to(tl.int64)
    channel_D = tl.arange(0, D)
    begin, end = tl.load(first_E + entry), tl.load(first_E + entry + 1)
    sum_D = tl.load(kv_grad_ED + entry * D + channel_D)
    for start in range(begin, end, PAIRS):
        at_P = start + tl.arange(0, PAIRS)
        pair_P = tl.load(pair_I + at_P, mask=at_P < end, other=0)
        sum_D += tl.sum(tl.load(pair_grad_ID + pair_P[:, None] * D + channel_D[None, :], mask=(at_P < end)[:, None], other=0.0), 0)
    tl.store(kv_grad_ED + entry * D + channel_D, sum_D)


def gradients(q_BSHD: Tensor, kv_BTD: Tensor, kv_BMD: Tensor, sink_H: Tensor, read: Reads, out_BSHD: Tensor, norm_BSH: Tensor,
              grad_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q [B, S, H, D], window keys [B, T, D], entries [B, M, D] and sink [H], from the output's and its log-sum-exp [B, S, H]."""
    B, S, H, D = q_BSHD.shape
    K = 0 if read.selected_BSK is None else read.selected_BSK.shape[2]
    tile = tiles(q_BSHD, read.selected_BSK is not None, backward=True)
    q_grad_BSHD, delta_BSH = torch.empty_like(q_BSHD), torch.empty_like(norm_BSH)
    _query_gradient[triton.cdiv(S, tile.queries), B * triton.cdiv(H, tile.heads)](
        q_BSHD, kv_BTD, kv_BMD, *read, out_BSHD, norm_BSH, grad_BSHD, q_grad_BSHD, delta_BSH, S, H, kv_BTD.shape[1], K, D**-0.5,
        *kv_BTD.stride()[:2], *kv_BMD.stride()[:2], D=D, QUERIES=tile.queries, HEADS=tile.heads, KEYS=tile.keys,
        SELECTED=read.selected_BSK is not None, num_warps=tile.warps, num_stages=1)
    rows_of = q_BSHD, grad_BSHD, norm_BSH, delta_BSH
    kv_grad_BTD = _listed_gradient(*rows_of, kv_BTD, read.order_BT, read.begin_BS, read.end_BS)
    if read.selected_BSK is not None:
        kv_grad_BMD = _selected_gradient(*rows_of, kv_BMD, read.selected_BSK)
    else:
        kv_grad_BMD = _listed_gradient(*rows_of, kv_BMD, None, read.first_BS, read.last_BS)
    # the sink's value is zero, so its score's gradient is p (0 - delta)
    sink_grad_H = -(torch.exp(sink_H.float() - norm_BSH) * delta_BSH).sum((0, 1))
    return q_grad_BSHD, kv_grad_BTD.to(kv_BTD.dtype), kv_grad_BMD.to(kv_BMD.dtype), sink_grad_H.to(sink_H.dtype)


def _listed_gradient(q_BSHD: Tensor, grad_BSHD: Tensor, norm_BSH: Tensor, delta_BSH: Tensor, kv_BTD: Tensor, order_BT: Tensor | None,
                     begin_BS: Tensor, end_BS: Tensor) -> Tensor:
    """Gradient [B, T, D] in float32 of keys of which each query reads a range; in the order given, or as they lie."""
    (B, S, H, D), T = q_BSHD.shape, kv_BTD.shape[1]
    tile = tiles(q_BSHD, False, backward=True)
    N = triton.cdiv(T, tile.keys)
    if not N:
        return kv_BTD.new_zeros(B, 0, D, dtype=torch.float32)
    shares = max(1, min(_PROGRAMS // (B * N), triton.cdiv(S * H, tile.queries * tile.heads)))
    kv_grad_PBTD = kv_BTD.new_empty(shares, B, T, D, dtype=torch.float32)
    _key_gradient[N, B, shares](
        q_BSHD, kv_BTD, order_BT, begin_BS, end_BS, *readers(begin_BS, end_BS, T, tile.keys), norm_BSH, grad_BSHD, delta_BSH, kv_grad_PBTD,
        S, H, T, D**-0.5, *kv_BTD.stride()[:2], D=D, QUERIES=tile.queries, HEADS=tile.heads, KEYS=tile.keys, ORDERED=order_BT is not None,
        num_warps=tile.warps, num_stages=1)
    return kv_grad_PBTD.sum(0)


def readers(begin_BS: Tensor, end_BS: Tensor, T: int, size: int) -> tuple[Tensor, Tensor]:
    """For each of N tiles of `size` keys, bounds [B, N] of the queries that read any of it: from the first on, up to the last excluded.

    Before the first no range has ended behind the tile's start, behind the last none begins before its end. Exact where ranges move on with
    the queries, as in a row of documents; otherwise wider than need be.
    """
    blind_BS = begin_BS >= end_BS
    start_BN = torch.arange(0, T, size, dtype=torch.int32, device=begin_BS.device).expand(len(begin_BS), -1).contiguous()
    furthest_BS = end_BS.masked_fill(blind_BS, 0).cummax(1).values
    nearest_BS = begin_BS.masked_fill(blind_BS, T).flip(1).cummin(1).values.flip(1)
    first_BN = torch.searchsorted(furthest_BS, start_BN, right=True, out_int32=True)
    last_BN = torch.searchsorted(nearest_BS.contiguous(), (start_BN + size).clamp(max=T), out_int32=True)
    return first_BN, last_BN


def _selected_gradient(q_BSHD: Tensor, grad_BSHD: Tensor, norm_BSH: Tensor, delta_BSH: Tensor, kv_BMD: Tensor, selected_BSK: Tensor) -> Tensor:
    """Gradient [B, M, D] in float32 of entries that queries selected: the pairs of N queries at a time, sorted by entry."""
    (B, S, H, D), M, K = q_BSHD.shape, kv_BMD.shape[1], selected_BSK.shape[2]
    kv_grad_BMD = kv_BMD.new_zeros(B, M, D, dtype=torch.float32)
    if not M or not K:
        return kv_grad_BMD
    tile = tiles(q_BSHD, True, backward=True)
    entry_E = torch.arange(B * M + 1, device=kv_BMD.device)
    at_a_time = max(1, _PAIR_NUMBERS // (K * D))
    for first_query in range(0, B * S, at_a_time):
        slot_NK = selected_BSK.flatten(0, 1)[first_query:first_query + at_a_time]
        N = len(slot_NK)
        row_N = torch.arange(first_query, first_query + N, device=kv_BMD.device) // S
        entry_NK = (slot_NK + row_N[:, None] * M).masked_fill(slot_NK < 0, B * M)  # no entry: behind the last
        pair_grad_NKD = kv_BMD.new_empty(N, K, D, dtype=torch.float32)
        _pair_gradients[N, triton.cdiv(K, tile.keys)](
            q_BSHD, kv_BMD, selected_BSK, norm_BSH, grad_BSHD, delta_BSH, pair_grad_NKD, first_query, S, H, K, D**-0.5, *kv_BMD.stride()[:2],
            D=D, HEADS=tile.heads, KEYS=tile.keys, num_warps=tile.warps, num_stages=1)
        sorted_I, pair_I = entry_NK.flatten().sort(stable=True)
        _sum_pairs[(B * M,)](pair_grad_NKD, pair_I, torch.searchsorted(sorted_I, entry_E), kv_grad_BMD, D=D, PAIRS=_PAIRS, num_warps=4)
    return kv_grad_BMD
