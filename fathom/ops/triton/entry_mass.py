"""The attention that each entry gets from all heads together, in Triton (report 2.3.1): the indexer's target.

A first pass over the keys gives each query's log-sum-exp, a second one the probabilities of the entries, summed over heads on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.attention import Entries, Window, entry_mass
from fathom.ops.triton.attention import attend, keys_in_order, supports, wants_gradients
from fathom.ops.triton.attention_tiles import cells, keys, ranges, reads, rows, scores, tiles
from fathom.ops.triton.launch import NAME


@triton.jit
def _visible_mass(q_BSHD, kv_BMD, first_BS, last_BS, norm_BSH, mass_BSM, S, H, M, scale, entry_row, entry_key,
                  D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Masses [R, J] of a tile of entries for a tile of queries: its rows are one head's, and head is added to head."""
    b, start = tl.program_id(2), tl.program_id(1) * KEYS
    at_J = start + tl.arange(0, KEYS)
    query_R, _, real_R = rows(b, tl.program_id(0) * QUERIES, 0, S, H, QUERIES, 1)
    first_R, last_R, low, high = ranges(first_BS, last_BS, query_R, real_R)
    seen_RJ = (at_J[None, :] >= first_R[:, None]) & (at_J[None, :] < last_R[:, None])
    k_JD = keys(kv_BMD, b, at_J, at_J < M, entry_row, entry_key, D)
    mass_RJ = tl.zeros([QUERIES, KEYS], tl.float32)
    heads = tl.where((low < start + KEYS) & (high > start), H, 0)  # none where no query sees any of these entries
    for head in range(0, heads):
        cell_R = query_R * H + head
        norm_R = tl.load(norm_BSH + cell_R, mask=real_R, other=0.0)
        mass_RJ += tl.exp(scores(cells(q_BSHD, cell_R, real_R, D), k_JD, scale) - norm_R[:, None])
    mass_RJ = tl.where(seen_RJ, mass_RJ, 0.0)
    tl.store(mass_BSM + query_R[:, None] * M + at_J[None, :], mass_RJ, mask=real_R[:, None] & (at_J < M)[None, :])


@triton.jit
def _selected_mass(q_BSHD, kv_BMD, selected_BSK, norm_BSH, mass_BSM, S, H, M, K, scale, entry_row, entry_key,
                   D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """Masses of the entries in one query's slots [J]: its rows are heads, which are summed."""
    s, b = tl.program_id(0), tl.program_id(2)
    at_J = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    query = b.to(tl.int64) * S + s
    index_J = tl.load(selected_BSK + query * K + at_J, mask=at_J < K, other=-1)
    k_JD = keys(kv_BMD, b, index_J, index_J >= 0, entry_row, entry_key, D)
    mass_J = tl.zeros([KEYS], tl.float32)
    for first_head in range(0, H, HEADS):
        _, cell_R, real_R = rows(b, s, first_head, S, H, 1, HEADS)
        norm_R = tl.load(norm_BSH + cell_R, mask=real_R, other=0.0)
        p_RJ = tl.exp(scores(cells(q_BSHD, cell_R, real_R, D), k_JD, scale) - norm_R[:, None])
        mass_J += tl.sum(tl.where(real_R[:, None], p_RJ, 0.0), 0)
    tl.store(mass_BSM + query * M + index_J, mass_J, mask=index_J >= 0)


@entry_mass.register(NAME, supports=lambda *arguments: supports(*arguments) and not wants_gradients(*arguments))
@torch.no_grad()
def entry_mass_triton(q_BSHD: Tensor, window: Window, entries: Entries, sink_H: Tensor) -> Tensor:
    """`entry_mass` on a GPU, where no gradient is asked for."""
    (B, S, H, D), M = q_BSHD.shape, entries.kv_BMD.shape[1]
    q_BSHD, read = q_BSHD.contiguous(), reads(window, entries)
    kv_BTD, kv_BMD = keys_in_order(window.kv_BTD, entries.kv_BMD)
    mass_BSM = q_BSHD.new_zeros(B, S, M, dtype=torch.float32)
    if not M:
        return mass_BSM
    _, norm_BSH, _ = attend(q_BSHD, kv_BTD, kv_BMD, sink_H, read, values=False)
    tile = tiles(q_BSHD, read.selected_BSK is not None)
    numbers = S, H, M, *([] if read.selected_BSK is None else [read.selected_BSK.shape[2]]), D**-0.5, *kv_BMD.stride()[:2]
    if read.selected_BSK is None:
        size = tile.queries * tile.heads
        _visible_mass[triton.cdiv(S, size), triton.cdiv(M, tile.keys), B](
            q_BSHD, kv_BMD, read.first_BS, read.last_BS, norm_BSH, mass_BSM, *numbers, D=D, QUERIES=size, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=2)
    elif read.selected_BSK.shape[2]:
        _selected_mass[S, triton.cdiv(read.selected_BSK.shape[2], tile.keys), B](
            q_BSHD, kv_BMD, read.selected_BSK, norm_BSH, mass_BSM, *numbers, D=D, HEADS=tile.heads, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=2)
    return mass_BSM
