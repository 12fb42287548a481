"""What the attention kernels share: which keys a query reads, as ranges of lists, the sizes of tiles, and how tiles are loaded.

All heads of a query read the same keys, so heads and queries together are the rows of one product: a tile has R = QUERIES x HEADS rows.
Rows are numbered flat: `query` over [B, S], `cell` over [B, S, H].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.attention import Entries, Window
from fathom.ops.triton.launch import power_of_two

_SMALLEST = 16  # rows or keys of a tile: a product of tiles takes no fewer


class Reads(NamedTuple):
    """Which keys each query reads, int32: window keys order_BT[begin_BS] ... order_BT[end_BS - 1], entries first_BS ... last_BS - 1.

    With selected_BSK (-1: none) it reads those entries instead, each at most once, as `index_topk` gives them.
    """

    order_BT: Tensor
    begin_BS: Tensor
    end_BS: Tensor
    first_BS: Tensor
    last_BS: Tensor
    selected_BSK: Tensor | None


class Tiles(NamedTuple):
    """Sizes of tiles: R = queries x heads rows by `keys` keys, and how many warps work on them. Nothing of a batch decides them."""

    queries: int
    heads: int
    keys: int
    warps: int


def reads(window: Window, entries: Entries | None) -> Reads:
    """What each of [B, S] queries reads. In the order of their places, a query's window keys lie side by side, however the row has them."""
    place_BT, order_BT = window.key_place_BT.sort(dim=1, stable=True)
    first_place_BS = (window.query_place_BS - window.reach_BS).contiguous()
    begin_BS = torch.searchsorted(place_BT, first_place_BS, out_int32=True)
    end_BS = torch.searchsorted(place_BT, window.query_place_BS.contiguous(), right=True, out_int32=True)
    if entries is None:
        first_BS = last_BS = torch.zeros_like(begin_BS)
        selected_BSK = None
    else:
        first_BS, last_BS = entries.first_BS, (entries.first_BS + entries.count_BS).clamp(max=entries.kv_BMD.shape[1])
        selected_BSK = entries.selected_BSK
    selected_BSK = None if selected_BSK is None else selected_BSK.int().contiguous()
    return Reads(order_BT.int(), begin_BS, end_BS, first_BS.int().contiguous(), last_BS.int().contiguous(), selected_BSK)


def tiles(q_BSHD: Tensor, one_query: bool, backward: bool = False) -> Tiles:
    """Tiles for queries [B, S, H, D]; of one query each where every query has a list of keys of its own.

    The sizes are the largest whose operands fit in shared memory, and whose sums fit in registers or nearly so, by what the compiler reports for
    compute capability 9.0 (H100). No matrix unit multiplies float32 at its full precision, so its tiles are smaller.
    """
    H, D = q_BSHD.shape[2:]
    row_numbers, key_numbers, largest, warps = 32_768, 16_384, 64, 8 if D >= 256 else 4
    if backward:  # a tile of the output's gradients lies beside the queries
        row_numbers = 16_384
    if q_BSHD.dtype == torch.float32:
        row_numbers, key_numbers, largest, warps = 8_192, 8_192, 32, 8
    tile_rows, tile_keys = (min(max(numbers // D, _SMALLEST), largest) for numbers in (row_numbers, key_numbers))
    heads = min(power_of_two(H), tile_rows)
    if one_query:
        return Tiles(1, max(heads, _SMALLEST), tile_keys, warps)
    return Tiles(tile_rows // heads, heads, tile_keys, warps)


@triton.jit
def rows(b, first_query, first_head, S, H, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """A tile's rows: flat queries [R], flat cells [R] and whether each row is one [R]."""
    row_R = tl.arange(0, QUERIES * HEADS)
    step_R, head_R = first_query + row_R // HEADS, first_head + row_R % HEADS
    query_R = b.to(tl.int64) * S + step_R
    return query_R, query_R * H + head_R, (step_R < S) & (head_R < H)


@triton.jit
def ranges(begin_BS, end_BS, query_R, real_R):
    """Where the rows' ranges begin and end [R], and the range that holds them all; rows that are none have none."""
    begin_R = tl.load(begin_BS + query_R, mask=real_R, other=2147483647)
    end_R = tl.load(end_BS + query_R, mask=real_R, other=0)
    return begin_R, end_R, tl.min(begin_R, 0), tl.max(end_R, 0)


@triton.jit
def cells(x_BSHD, cell_R, real_R, D: tl.constexpr):
    """Rows [R, D] of x [B, S, H, D]; zeros where there is no row."""
    return tl.load(x_BSHD + cell_R[:, None] * D + tl.arange(0, D)[None, :], mask=real_R[:, None], other=0.0)


@triton.jit
def keys(kv_BTD, b, index_J, real_J, row_stride, key_stride, D: tl.constexpr):
    """Keys [J, D] of row b at index_J; zeros where there is none."""
    offset_J = b.to(tl.int64) * row_stride + index_J.to(tl.int64) * key_stride
    return tl.load(kv_BTD + offset_J[:, None] + tl.arange(0, D)[None, :], mask=real_J[:, None], other=0.0)


@triton.jit
def window_keys(kv_BTD, order_BT, b, start, begin_R, end_R, T, row_stride, key_stride, D: tl.constexpr, KEYS: tl.constexpr):
    """Window keys [J, D] from `start` on in the order of their places, and which of them each row reads [R, J]."""
    at_J = start + tl.arange(0, KEYS)
    index_J = tl.load(order_BT + b * T + at_J, mask=at_J < T, other=0)
    seen_RJ = (at_J[None, :] >= begin_R[:, None]) & (at_J[None, :] < end_R[:, None])
    return keys(kv_BTD, b, index_J, at_J < T, row_stride, key_stride, D), seen_RJ


@triton.jit
def entry_keys(kv_BMD, selected_BSK, b, s, start, stop, first_R, last_R, real_R, S, K, row_stride, key_stride, D: tl.constexpr,
               KEYS: tl.constexpr, SELECTED: tl.constexpr):
    """Entries [J, D] from `start` on, below `stop`, and which of them each row reads [R, J]; of a selection, those that query s lists."""
    at_J = start + tl.arange(0, KEYS)
    if SELECTED:
        index_J = tl.load(selected_BSK + (b.to(tl.int64) * S + s) * K + at_J, mask=at_J < K, other=-1)
        read_J = index_J >= 0
        seen_RJ = read_J[None, :] & real_R[:, None]
    else:
        index_J, read_J = at_J, at_J < stop
        seen_RJ = (at_J[None, :] >= first_R[:, None]) & (at_J[None, :] < last_R[:, None])
    return keys(kv_BMD, b, index_J, read_J, row_stride, key_stride, D), seen_RJ


@triton.jit
def scores(q_RD, k_JD, scale):
    """q . k D^-0.5 [R, J] in float32."""
    return tl.dot(q_RD, tl.trans(k_JD), input_precision="ieee") * scale
