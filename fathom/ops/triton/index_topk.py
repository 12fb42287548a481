"""The indexer's scores and selection on GPUs (report 2.3.1, eq. 15-17).

A program scores a tile of entries for some queries one after the other, all heads of a query in one product, so that products of heads stay
in registers. The selection scores a chunk of queries at a time (at most 2^26 scores), skips what a query may not read and queries that read
all they may, and then looks for each query's k-th best score in four steps: a histogram of eight more bits of the scores' order each. Another
pass writes the slots of all better scores, and of as many equal ones as there is room for, from the first on: ascending, without sorting,
and of equals the earlier. Long rows are cut into parts, so that one query fills a GPU too: the best of the parts' best are the best of all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.index_topk import index_scores, index_topk
from fathom.ops.records import Recorded
from fathom.ops.triton.launch import NAME, here, power_of_two, runs
from fathom.ops.triton.linear import fp4_numbers, scale_numbers, warps
from fathom.quant.formats import FP4_BLOCK

_TILE_S, _TILE_M = 16, 64  # queries that a program goes through, entries in its tile
_SUMS = 16  # partial sums that the keys' gradient is made of, at most
_CHUNK_SCORES = 1 << 26  # of a chunk of queries: 256 MB
_TILE_SCORES = 1024  # looked at together by a selection
_PART = 8192  # entries of a part, or 8 k


def _sides(H: int, D: int) -> dict[str, int]:
    """Sides of the tile that holds all heads of a query, 16 at least each."""
    return {"TILE_H": max(16, power_of_two(H)), "TILE_D": max(16, power_of_two(D))}


@triton.jit
def _relu(product):
    """What is not a number stays none."""
    return tl.where(product < 0, 0.0, product)


@triton.jit
def _load_keys(keys_BMD, b, m, M, D: tl.constexpr, TILE_D: tl.constexpr):
    """Entries m of row b, zero outside."""
    d = tl.arange(0, TILE_D)
    return tl.load(keys_BMD + (b.to(tl.int64) * M + m[:, None]) * D + d[None, :], mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)


@triton.jit
def _load_records(records_BMC, b, m, M, row_stride, width, D: tl.constexpr, TILE_D: tl.constexpr, BLOCK: tl.constexpr):
    """Entries m of row b that lie in records: FP4 codes, two a byte, and a scale for each `BLOCK` channels; zero outside."""
    record_m = records_BMC + b.to(tl.int64) * row_stride + m[:, None].to(tl.int64) * width
    byte, block = tl.arange(0, TILE_D // 2)[None, :], tl.arange(0, TILE_D // BLOCK)[None, :]
    code_mc = tl.load(record_m + byte, mask=(m[:, None] < M) & (2 * byte < D), other=0)
    scale_mb = tl.load(record_m + (D + 1) // 2 + block, mask=(m[:, None] < M) & (block * BLOCK < D), other=0)
    number_md = fp4_numbers(tl.interleave(code_mc & 15, code_mc >> 4 & 15))
    number_mbc = tl.reshape(number_md, [m.shape[0], TILE_D // BLOCK, BLOCK]) * scale_numbers(scale_mb)[:, :, None]
    return tl.reshape(number_mbc, [m.shape[0], TILE_D])


@triton.jit
def _load_query(q_BSHD, weight_BSH, row, scale, H: tl.constexpr, D: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr):
    """A query's heads [h, d] and their weights times D^-0.5 H^-0.5 [h], zero outside."""
    h, d = tl.arange(0, TILE_H), tl.arange(0, TILE_D)
    q_hd = tl.load(q_BSHD + (row * H + h[:, None]) * D + d[None, :], mask=(h[:, None] < H) & (d[None, :] < D), other=0.0)
    return q_hd, tl.load(weight_BSH + row * H + h, mask=h < H, other=0.0).to(tl.float32) * scale


@triton.jit(do_not_specialize=["S", "M", "begin", "queries", "least"])
def _score(q_BSHD, weight_BSH, keys_BMD, first_BS, count_BS, score_BCM, scale, S, M, begin, queries, least, row_stride, width,
           H: tl.constexpr, D: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr, TILE_S: tl.constexpr, TILE_M: tl.constexpr, TILE_H: tl.constexpr,
           TILE_D: tl.constexpr):
    """score[b, c, m] = sum_h w_h relu(q_h . k_m) for C queries from `begin` on; `RANGES`: where an entry of a tile is visible, of more than `least`;
    `BLOCK`, if not 0: keys lie in records with a scale for so many channels.
    """
    first_m, first_c, b = tl.program_id(0) * TILE_M, tl.program_id(1) * TILE_S, tl.program_id(2)
    m = first_m + tl.arange(0, TILE_M)
    if BLOCK:
        keys_md = _load_records(keys_BMD, b, m, M, row_stride, width, D, TILE_D, BLOCK).to(q_BSHD.dtype.element_ty)
    else:
        keys_md = _load_keys(keys_BMD, b, m, M, D, TILE_D)
    for c in range(first_c, tl.minimum(first_c + TILE_S, queries)):
        row, wanted = b.to(tl.int64) * S + begin + c, True
        if RANGES:
            first, count = tl.load(first_BS + row), tl.load(count_BS + row)
            wanted = (count > least) & (first < first_m + TILE_M) & (first + count > first_m)
        if wanted:
            q_hd, weight_h = _load_query(q_BSHD, weight_BSH, row, scale, H, D, TILE_H, TILE_D)
            product_mh = tl.dot(keys_md, tl.trans(q_hd), input_precision="ieee")
            score_m = tl.sum(_relu(product_mh) * weight_h[None, :], 1)
            tl.store(score_BCM + (b.to(tl.int64) * queries + c) * M + m, score_m, mask=m < M)


@triton.jit
def _score_backward_query(q_BSHD, weight_BSH, keys_BMD, grad_BSM, q_grad_BSHD, weight_grad_BSH, scale, S, M, H: tl.constexpr, D: tl.constexpr,
                          TILE_M: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr):
    """dq_h = sum_m w_h [q_h . k_m > 0] g_m k_m, dw_h = sum_m relu(q_h . k_m) g_m."""
    b, row = tl.program_id(1), tl.program_id(1).to(tl.int64) * S + tl.program_id(0)
    q_hd, weight_h = _load_query(q_BSHD, weight_BSH, row, scale, H, D, TILE_H, TILE_D)
    q_grad_hd, weight_grad_h = tl.zeros([TILE_H, TILE_D], tl.float32), tl.zeros([TILE_H], tl.float32)
    for first_m in range(0, M, TILE_M):
        m = first_m + tl.arange(0, TILE_M)
        keys_md, grad_m = _load_keys(keys_BMD, b, m, M, D, TILE_D), tl.load(grad_BSM + row * M + m, mask=m < M, other=0.0)
        product_hm = tl.dot(q_hd, tl.trans(keys_md), input_precision="ieee")
        weight_grad_h += tl.sum(_relu(product_hm) * grad_m[None, :], 1)
        product_grad_hm = tl.where(product_hm > 0, weight_h[:, None] * grad_m[None, :], 0.0).to(keys_md.dtype)
        q_grad_hd = tl.dot(product_grad_hm, keys_md, q_grad_hd, input_precision="ieee")
    h, d = tl.arange(0, TILE_H), tl.arange(0, TILE_D)
    tl.store(q_grad_BSHD + (row * H + h[:, None]) * D + d[None, :], q_grad_hd.to(q_grad_BSHD.dtype.element_ty),
             mask=(h[:, None] < H) & (d[None, :] < D))
    tl.store(weight_grad_BSH + row * H + h, (weight_grad_h * scale).to(weight_grad_BSH.dtype.element_ty), mask=h < H)


@triton.jit
def _score_backward_keys(q_BSHD, weight_BSH, keys_BMD, grad_BSM, keys_grad_PBMD, scale, S, M, queries, H: tl.constexpr, D: tl.constexpr,
                         TILE_M: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr):
    """dk_m = sum_sh w_h [q_h . k_m > 0] g_m q_h, over each of P parts of so many queries."""
    m, part, b = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M), tl.program_id(1), tl.program_id(2)
    keys_md = _load_keys(keys_BMD, b, m, M, D, TILE_D)
    keys_grad_md = tl.zeros([TILE_M, TILE_D], tl.float32)
    for s in range(part * queries, tl.minimum((part + 1) * queries, S)):
        row = b.to(tl.int64) * S + s
        q_hd, weight_h = _load_query(q_BSHD, weight_BSH, row, scale, H, D, TILE_H, TILE_D)
        grad_m = tl.load(grad_BSM + row * M + m, mask=m < M, other=0.0)
        product_mh = tl.dot(keys_md, tl.trans(q_hd), input_precision="ieee")
        product_grad_mh = tl.where(product_mh > 0, weight_h[None, :] * grad_m[:, None], 0.0).to(q_hd.dtype)
        keys_grad_md = tl.dot(product_grad_mh, q_hd, keys_grad_md, input_precision="ieee")
    d, place = tl.arange(0, TILE_D), (part.to(tl.int64) * tl.num_programs(2) + b) * M
    tl.store(keys_grad_PBMD + (place + m[:, None]) * D + d[None, :], keys_grad_md, mask=(m[:, None] < M) & (d[None, :] < D))


@triton.jit
def _load_order(score_M, list_BCL, place, j, last, scored, LISTED: tl.constexpr):
    """Slots of places j before the last, whether there are any, and their scores' order as unsigned integers, 0's from `scored` on."""
    if LISTED:
        slot_j = tl.load(list_BCL + place * last + j, mask=j < last, other=-1)
        real_j = slot_j >= 0
    else:
        slot_j, real_j = j, j < last
    score_j = tl.load(score_M + slot_j, mask=real_j & (j < scored), other=0.0)
    # Of floats by bits: negative ones fall as their bits rise, and lie below the positive ones; -0 equals 0.
    bits_j = tl.where(score_j == 0.0, 0.0, score_j).to(tl.uint32, bitcast=True)
    return slot_j, real_j, tl.where(bits_j >> 31 != 0, bits_j ^ 0xFFFFFFFF, bits_j ^ 0x80000000)


@triton.jit(do_not_specialize=["S", "begin", "queries"])
def _select(score_BCM, list_BCL, first_BS, count_BS, slot_BCPK, S, M, begin, queries, length, k, LISTED: tl.constexpr, TILE: tl.constexpr):
    """The k best of part p of `length` visible entries, or of those in a list of that length, ascending; -1 is there already."""
    c, part, parts, b = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    row, place = b.to(tl.int64) * S + begin + c, b.to(tl.int64) * queries + c
    first, count = tl.load(first_BS + row), tl.load(count_BS + row)
    if LISTED:
        begin_j, end_j, choosing = 0, length, count > k
    else:
        begin_j = first + part * length
        end_j = tl.minimum(tl.minimum(begin_j + length, first + count), M)
        choosing = end_j - begin_j > k
    scored = tl.where(choosing, end_j, begin_j)  # scores are read before this place, and all is chosen from it on
    score_M, slot_K = score_BCM + place * M, slot_BCPK + (place * parts + part) * k
    # The k-th best score's order, eight bits at a time: those above them leave less room.
    threshold, known, room = tl.zeros([], tl.uint32), tl.zeros([], tl.uint32), k
    if choosing:
        digit_d = tl.arange(0, 256)
        for shift in tl.static_range(24, -8, -8):
            count_d = tl.zeros([256], tl.int32)
            for first_j in range(begin_j, end_j, TILE):
                _, real_j, order_j = _load_order(score_M, list_BCL, place, first_j + tl.arange(0, TILE), end_j, scored, LISTED)
                count_d += tl.histogram((order_j >> shift & 255).to(tl.int32), 256, mask=real_j & (order_j & known == threshold))
            digit = tl.sum((tl.cumsum(count_d, 0, reverse=True) >= room).to(tl.int32)) - 1
            room -= tl.sum(tl.where(digit_d > digit, count_d, 0))
            threshold |= digit.to(tl.uint32) << shift
            known |= tl.full([], 255, tl.uint32) << shift
    written, equals = 0, 0
    for first_j in range(begin_j, end_j, TILE):
        j = first_j + tl.arange(0, TILE)
        slot_j, real_j, order_j = _load_order(score_M, list_BCL, place, j, end_j, scored, LISTED)
        equal_j = (real_j & (order_j == threshold)).to(tl.int32)
        earlier_j = equals + tl.cumsum(equal_j, 0) <= room
        chosen_j = real_j & ((j >= scored) | (order_j > threshold) | (equal_j != 0) & earlier_j)
        to_j = written + tl.cumsum(chosen_j.to(tl.int32), 0) - 1
        tl.store(slot_K + to_j, slot_j.to(tl.int64), mask=chosen_j)
        written += tl.sum(chosen_j.to(tl.int32))
        equals += tl.sum(equal_j)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor) -> Tensor:
        tensors = q_BSHD.contiguous(), weight_BSH.contiguous(), keys_BMD.contiguous()
        ctx.save_for_backward(*tensors)
        (B, S, H, D), M = q_BSHD.shape, keys_BMD.shape[1]
        score_BSM = q_BSHD.new_empty(B, S, M, dtype=torch.float32)
        if score_BSM.numel():
            _score[triton.cdiv(M, _TILE_M), triton.cdiv(S, _TILE_S), B](
                *tensors, None, None, score_BSM, (D * H) ** -0.5, S, M, 0, S, 0, 0, 0, H=H, D=D, RANGES=False, BLOCK=0, TILE_S=_TILE_S, TILE_M=_TILE_M, **_sides(H, D))
        return score_BSM

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, weight_BSH, keys_BMD = tensors = ctx.saved_tensors
        (B, S, H, D), M, grad_BSM = q_BSHD.shape, keys_BMD.shape[1], grad_BSM.contiguous()
        if not grad_BSM.numel():
            return tuple(torch.zeros_like(each) for each in tensors)
        q_grad_BSHD, weight_grad_BSH, sizes = torch.empty_like(q_BSHD), torch.empty_like(weight_BSH), {"H": H, "D": D, "TILE_M": _TILE_M, **_sides(H, D)}
        sizes["num_warps"] = warps(q_BSHD)
        _score_backward_query[S, B](*tensors, grad_BSM, q_grad_BSHD, weight_grad_BSH, (D * H) ** -0.5, S, M, **sizes)
        queries = max(_TILE_S, triton.cdiv(S, _SUMS))
        keys_grad_PBMD = keys_BMD.new_empty(triton.cdiv(S, queries), B, M, D, dtype=torch.float32)
        _score_backward_keys[triton.cdiv(M, _TILE_M), len(keys_grad_PBMD), B](
            *tensors, grad_BSM, keys_grad_PBMD, (D * H) ** -0.5, S, M, queries, **sizes)
        return q_grad_BSHD, weight_grad_BSH, keys_grad_PBMD.sum(0).to(keys_BMD.dtype)


@index_scores.register(NAME, supports=lambda q_BSHD, weight_BSH, keys_BMD: q_BSHD.dtype == keys_BMD.dtype and runs(q_BSHD, weight_BSH, keys_BMD))
def index_scores_triton(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor) -> Tensor:
    """`index_scores` without the products of single heads in memory, and its gradients."""
    return _IndexScores.apply(q_BSHD, weight_BSH, keys_BMD)


def _best(score_BCM: Tensor, first_BS: Tensor, count_BS: Tensor, begin: int, k: int) -> Tensor:
    """Slots [B, C, k] of the best visible entries of C queries from `begin` on."""
    (B, C, M), S, length = score_BCM.shape, first_BS.shape[1], max(_PART, 8 * k)
    parts = triton.cdiv(M, length)
    slot_BCPK = first_BS.new_full((B, C, parts, k), -1, dtype=torch.int64)
    _select[C, parts, B](score_BCM, None, first_BS, count_BS, slot_BCPK, S, M, begin, C, length, k, LISTED=False, TILE=_TILE_SCORES)
    if parts == 1:
        return slot_BCPK[:, :, 0]
    best_BCK = first_BS.new_full((B, C, k), -1, dtype=torch.int64)
    _select[C, 1, B](score_BCM, slot_BCPK, first_BS, count_BS, best_BCK, S, M, begin, C, parts * k, k, LISTED=True, TILE=_TILE_SCORES)
    return best_BCK


def _taken(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor | Recorded) -> bool:
    """Whether kernels take these queries and keys."""
    if isinstance(keys_BMD, Recorded):
        return q_BSHD.dtype == keys_BMD.dtype and keys_BMD.records_BMC.stride(2) == 1 and here(keys_BMD.records_BMC) and runs(q_BSHD, weight_BSH)
    return q_BSHD.dtype == keys_BMD.dtype and runs(q_BSHD, weight_BSH, keys_BMD)


@index_topk.register(NAME, supports=lambda q_BSHD, weight_BSH, keys_BMD, first_BS, count_BS, k: _taken(q_BSHD, weight_BSH, keys_BMD))
@torch.no_grad()
def index_topk_triton(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor | Recorded, first_BS: Tensor, count_BS: Tensor, k: int) -> Tensor:
    """`index_topk`, a chunk of queries at a time; keys in records are read as they are, and become numbers inside the tile."""
    (B, S, H, D), M = q_BSHD.shape, keys_BMD.shape[1]
    k, sides, block, stored = min(k, M), _sides(H, D), 0, keys_BMD
    if isinstance(keys_BMD, Recorded):
        block, stored = FP4_BLOCK, keys_BMD.records_BMC
        sides["TILE_D"] = max(FP4_BLOCK, sides["TILE_D"])
    else:
        stored = stored.contiguous()
    selected_BSK = first_BS.new_empty(B, S, k, dtype=torch.int64)
    tensors, ranges = (q_BSHD.contiguous(), weight_BSH.contiguous(), stored), (first_BS.contiguous(), count_BS.contiguous())
    size = max(1, _CHUNK_SCORES // max(1, B * M))
    for begin in range(0, S if selected_BSK.numel() else 0, size):
        C = min(size, S - begin)
        score_BCM = q_BSHD.new_empty(B, C, M, dtype=torch.float32)
        _score[triton.cdiv(M, _TILE_M), triton.cdiv(C, _TILE_S), B](
            *tensors, *ranges, score_BCM, (D * H) ** -0.5, S, M, begin, C, k, *stored.stride()[:2], H=H, D=D, RANGES=True, BLOCK=block,
            TILE_S=_TILE_S, TILE_M=_TILE_M, **sides)
        selected_BSK[:, begin:begin + C] = _best(score_BCM, *ranges, begin, k)
    return selected_BSK
