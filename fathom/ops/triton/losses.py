"""Cross-entropy and distillation's divergence on GPUs: logits exist in tiles only, in the backward pass in chunks of the vocabulary.

Forward, a program takes a tile of tokens through a chunk of the vocabulary with a running log-sum-exp (of student and teacher, whose running
difference is kept beside it). Backward, the gradient of the logits is computed anew for one chunk at a time, and two products add it to the
gradient of hidden and make the chunk's rows of the head's: each number is summed by one program in a fixed order. Products multiply in the
inputs' dtype and add in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.losses import IGNORE, cross_entropy, reverse_kl
from fathom.ops.triton.launch import NAME, runs

_CHUNK_V = 4096  # a multiple of the tile; the largest intermediate is [N, chunk], about the size of hidden
_TILE = 128  # tokens, classes or channels of a tile of a product
_TILE_BYTES = 128  # of the summed axis: 32 numbers of float32, 64 of bfloat16
_WARPS = 8


@triton.jit
def _tile_product(a_MK, b_KN, m, n, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n, product_mn, TILE_K: tl.constexpr):
    """product + a @ b at rows m and columns n of matrices with any strides."""
    m, n = m.to(tl.int64)[:, None], n.to(tl.int64)[None, :]
    for start in range(0, K, TILE_K):
        k = start + tl.arange(0, TILE_K).to(tl.int64)
        a_mk = tl.load(a_MK + m * a_stride_m + k[None, :] * a_stride_k, mask=(m < M) & (k[None, :] < K), other=0.0)
        b_kn = tl.load(b_KN + k[:, None] * b_stride_k + n * b_stride_n, mask=(k[:, None] < K) & (n < N), other=0.0)
        product_mn = tl.dot(a_mk, b_kn, product_mn, input_precision="ieee")
    return product_mn


@triton.jit
def _log_sum_exp(hidden_NW, head_VW, target_N, largest_CN, total_CN, chosen_N, N, V, W, CHUNK_V: tl.constexpr, TILE: tl.constexpr,
                 TILE_W: tl.constexpr):
    """Over one chunk of the vocabulary: the largest logit and the sum of exp(logits - largest); the target's logit where it is in the chunk."""
    chunk, n = tl.program_id(0), tl.program_id(1) * TILE + tl.arange(0, TILE)
    first, last = chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V)
    target_n = tl.load(target_N + n, mask=n < N, other=-1)
    largest_n = tl.full((TILE,), float("-inf"), tl.float32)
    total_n, chosen_n = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(first, last, TILE):
        # logits = hidden @ head.T
        v = start + tl.arange(0, TILE)
        logits_nv = _tile_product(hidden_NW, head_VW, n, v, N, V, W, W, 1, 1, W, tl.zeros((TILE, TILE), tl.float32), TILE_W)
        chosen_n += tl.sum(tl.where(v[None, :] == target_n[:, None], logits_nv, 0.0), 1)
        logits_nv = tl.where(v[None, :] < V, logits_nv, float("-inf"))
        new_n = tl.maximum(largest_n, tl.max(logits_nv, 1))
        total_n = total_n * tl.exp(largest_n - new_n) + tl.sum(tl.exp(logits_nv - new_n[:, None]), 1)
        largest_n = new_n
    tl.store(largest_CN + chunk.to(tl.int64) * N + n, largest_n, mask=n < N)
    tl.store(total_CN + chunk.to(tl.int64) * N + n, total_n, mask=n < N)
    tl.store(chosen_N + n, chosen_n, mask=(n < N) & (target_n >= first) & (target_n < last))


@triton.jit
def _logits_grad(hidden_NW, head_VW, target_N, largest_N, total_N, grad, logits_grad_NV, first, N, V, W, chunk_V, TILE: tl.constexpr,
                 TILE_W: tl.constexpr):
    """grad * (softmax(logits) - [v is the target]), a tile of the chunk of classes from `first` on, in the dtype that products multiply in."""
    n, c = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    v = first + c
    logits_nv = _tile_product(hidden_NW, head_VW, n, v, N, V, W, W, 1, 1, W, tl.zeros((TILE, TILE), tl.float32), TILE_W)
    target_n = tl.load(target_N + n, mask=n < N, other=-1)
    largest_n = tl.load(largest_N + n, mask=n < N, other=0.0)
    total_n = tl.load(total_N + n, mask=n < N, other=1.0)
    share_nv = tl.exp(logits_nv - largest_n[:, None]) / total_n[:, None]
    logits_grad_nv = tl.load(grad).to(tl.float32) * (share_nv - tl.where(v[None, :] == target_n[:, None], 1.0, 0.0))
    tl.store(logits_grad_NV + n.to(tl.int64)[:, None] * chunk_V + c[None, :], logits_grad_nv, mask=(n[:, None] < N) & (c[None, :] < chunk_V))


@triton.jit
def _divergence(hidden_NW, head_VW, teacher_NU, teacher_head_VU, largest_CN, total_CN, teacher_largest_CN, teacher_total_CN, ahead_CN, N, V, W, U,
                CHUNK_V: tl.constexpr, TILE: tl.constexpr, TILE_W: tl.constexpr):
    """Over one chunk of the vocabulary, of student and teacher: the largest logit and the sum of exp(logits - largest); and the student's sum of
    exp(logits - largest) ahead, ahead = (logits - largest) - (the teacher's logits - their largest).
    """
    chunk, n = tl.program_id(0), tl.program_id(1) * TILE + tl.arange(0, TILE)
    first, last = chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V)
    largest_n, teacher_largest_n = tl.full((TILE,), float("-inf"), tl.float32), tl.full((TILE,), float("-inf"), tl.float32)
    total_n, teacher_total_n, ahead_n = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(first, last, TILE):
        v = start + tl.arange(0, TILE)
        real_nv = v[None, :] < V
        logits_nv = _tile_product(hidden_NW, head_VW, n, v, N, V, W, W, 1, 1, W, tl.zeros((TILE, TILE), tl.float32), TILE_W)
        teacher_nv = _tile_product(teacher_NU, teacher_head_VU, n, v, N, V, U, U, 1, 1, U, tl.zeros((TILE, TILE), tl.float32), TILE_W)
        new_n = tl.maximum(largest_n, tl.max(tl.where(real_nv, logits_nv, float("-inf")), 1))
        teacher_new_n = tl.maximum(teacher_largest_n, tl.max(tl.where(real_nv, teacher_nv, float("-inf")), 1))
        # What was ahead of the old largest logits is ahead of the new ones by so much more; the first time there is nothing yet.
        moved_n = tl.where(start == first, 0.0, largest_n - new_n) - tl.where(start == first, 0.0, teacher_largest_n - teacher_new_n)
        share_nv = tl.where(real_nv, tl.exp(logits_nv - new_n[:, None]), 0.0)
        teacher_share_nv = tl.where(real_nv, tl.exp(teacher_nv - teacher_new_n[:, None]), 0.0)
        ahead_nv = (logits_nv - new_n[:, None]) - (teacher_nv - teacher_new_n[:, None])
        ahead_n = tl.exp(largest_n - new_n) * (ahead_n + total_n * moved_n) + tl.sum(share_nv * ahead_nv, 1)
        total_n = total_n * tl.exp(largest_n - new_n) + tl.sum(share_nv, 1)
        teacher_total_n = teacher_total_n * tl.exp(teacher_largest_n - teacher_new_n) + tl.sum(teacher_share_nv, 1)
        largest_n, teacher_largest_n = new_n, teacher_new_n
    place_n, real_n = chunk.to(tl.int64) * N + n, n < N
    tl.store(largest_CN + place_n, largest_n, mask=real_n)
    tl.store(total_CN + place_n, total_n, mask=real_n)
    tl.store(teacher_largest_CN + place_n, teacher_largest_n, mask=real_n)
    tl.store(teacher_total_CN + place_n, teacher_total_n, mask=real_n)
    tl.store(ahead_CN + place_n, ahead_n, mask=real_n)


@triton.jit
def _divergence_grad(hidden_NW, head_VW, teacher_NU, teacher_head_VU, largest_N, total_N, teacher_largest_N, ahead_N, grad_N, logits_grad_NV, first,
                     N, V, W, U, chunk_V, TILE: tl.constexpr, TILE_W: tl.constexpr):
    """grad * p * (log p - log q - KL), a tile of the chunk of classes from `first` on, in the dtype that products multiply in."""
    n, c = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    v = first + c
    logits_nv = _tile_product(hidden_NW, head_VW, n, v, N, V, W, W, 1, 1, W, tl.zeros((TILE, TILE), tl.float32), TILE_W)
    teacher_nv = _tile_product(teacher_NU, teacher_head_VU, n, v, N, V, U, U, 1, 1, U, tl.zeros((TILE, TILE), tl.float32), TILE_W)
    logits_nv -= tl.load(largest_N + n, mask=n < N, other=0.0)[:, None]
    teacher_nv -= tl.load(teacher_largest_N + n, mask=n < N, other=0.0)[:, None]
    share_nv = tl.exp(logits_nv) / tl.load(total_N + n, mask=n < N, other=1.0)[:, None]
    # log p - log q is ahead less the same number for every class, and KL is its mean: that number falls out.
    ahead_n = tl.load(ahead_N + n, mask=n < N, other=0.0)
    logits_grad_nv = tl.load(grad_N + n, mask=n < N, other=0.0)[:, None] * share_nv * (logits_nv - teacher_nv - ahead_n[:, None])
    tl.store(logits_grad_NV + n.to(tl.int64)[:, None] * chunk_V + c[None, :], logits_grad_nv, mask=(n[:, None] < N) & (c[None, :] < chunk_V))


@triton.jit
def _product(a_MK, b_KN, out_MN, M, N, K, a_stride_m, a_stride_k, ADD: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr):
    """out = a @ b, or out += a @ b, for a with any strides."""
    m, n = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    place_mn, real_mn = m.to(tl.int64)[:, None] * N + n[None, :], (m[:, None] < M) & (n[None, :] < N)
    out_mn = tl.zeros((TILE, TILE), tl.float32)
    if ADD:
        out_mn = tl.load(out_MN + place_mn, mask=real_mn, other=0.0)
    tl.store(out_MN + place_mn, _tile_product(a_MK, b_KN, m, n, M, N, K, a_stride_m, a_stride_k, N, 1, out_mn, TILE_K), mask=real_mn)


def _multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, add: bool) -> None:
    """out [M, N] = a [M, K] b [K, N], or what it holds plus that; b and out contiguous."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    _product[triton.cdiv(N, _TILE), triton.cdiv(M, _TILE)](
        a_MK, b_KN, out_MN, M, N, K, *a_MK.stride(), add, _TILE, _TILE_BYTES // a_MK.element_size(), num_warps=_WARPS)


def _give_back(logits_grad_nv: Tensor, head_vW: Tensor, hidden_nW: Tensor, hidden_grad_nW: Tensor | None, head_grad_VW: Tensor | None, first: int) -> None:
    """A chunk's part of the gradient of hidden [n, W], and its rows of the head's, from `first` on; of those that are asked for."""
    if hidden_grad_nW is not None:
        _multiply(logits_grad_nv, head_vW, hidden_grad_nW, add=True)
    if head_grad_VW is not None:
        _multiply(logits_grad_nv.T, hidden_nW, head_grad_VW[first:first + _CHUNK_V], add=False)


class _CrossEntropy(torch.autograd.Function):
    """Of hidden and head, both contiguous and of one dtype; statistics are those of the n kept tokens."""

    @staticmethod
    def forward(ctx, hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor) -> Tensor:
        kept_n, (V, W) = (target_N != IGNORE).nonzero().squeeze(1), head_VW.shape
        hidden_nW, target_n, n, chunks = hidden_NW.index_select(0, kept_n), target_N.index_select(0, kept_n), len(kept_n), triton.cdiv(V, _CHUNK_V)
        largest_Cn, total_Cn = hidden_NW.new_empty(2, chunks, n, dtype=torch.float32)
        chosen_n = largest_Cn.new_empty(n)
        _log_sum_exp[chunks, triton.cdiv(n, _TILE)](
            hidden_nW, head_VW, target_n, largest_Cn, total_Cn, chosen_n, n, V, W, _CHUNK_V, _TILE, _TILE_BYTES // head_VW.element_size(),
            num_warps=_WARPS)
        largest_n = largest_Cn.amax(0)
        total_n = (total_Cn * (largest_Cn - largest_n).exp()).sum(0)
        ctx.save_for_backward(hidden_NW, head_VW, kept_n, target_n, largest_n, total_n)
        return (largest_n - chosen_n + total_n.log()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_NW, head_VW, kept_n, *statistics = ctx.saved_tensors
        hidden_nW, (V, W), n = hidden_NW.index_select(0, kept_n), head_VW.shape, len(kept_n)
        hidden_grad_nW = hidden_nW.new_zeros(n, W, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        head_grad_VW = torch.empty_like(head_VW) if ctx.needs_input_grad[1] else None
        for first in range(0, V, _CHUNK_V):
            head_vW = head_VW[first:first + _CHUNK_V]
            logits_grad_nv = hidden_nW.new_empty(n, len(head_vW))
            _logits_grad[triton.cdiv(len(head_vW), _TILE), triton.cdiv(n, _TILE)](
                hidden_nW, head_VW, *statistics, grad, logits_grad_nv, first, n, V, W, len(head_vW), _TILE, _TILE_BYTES // head_VW.element_size(),
                num_warps=_WARPS)
            _give_back(logits_grad_nv, head_vW, hidden_nW, hidden_grad_nW, head_grad_VW, first)
        if hidden_grad_nW is None:
            return None, head_grad_VW, None
        hidden_grad_NW = torch.zeros_like(hidden_NW).index_copy_(0, kept_n, hidden_grad_nW.to(hidden_NW.dtype))
        return hidden_grad_NW, head_grad_VW, None


class _ReverseKl(torch.autograd.Function):
    """Of hidden states and heads, all contiguous, each pair of one dtype."""

    @staticmethod
    def forward(ctx, hidden_NW: Tensor, head_VW: Tensor, teacher_hidden_NU: Tensor, teacher_head_VU: Tensor) -> Tensor:
        (N, W), (V, U), chunks = hidden_NW.shape, teacher_head_VU.shape, triton.cdiv(len(head_VW), _CHUNK_V)
        largest_CN, total_CN, teacher_largest_CN, teacher_total_CN, ahead_CN = hidden_NW.new_empty(5, chunks, N, dtype=torch.float32)
        _divergence[chunks, triton.cdiv(N, _TILE)](
            hidden_NW, head_VW, teacher_hidden_NU, teacher_head_VU, largest_CN, total_CN, teacher_largest_CN, teacher_total_CN, ahead_CN, N, V, W, U,
            _CHUNK_V, _TILE, _TILE_BYTES // head_VW.element_size(), num_warps=_WARPS)
        largest_N, teacher_largest_N = largest_CN.amax(0), teacher_largest_CN.amax(0)
        behind_CN, teacher_behind_CN = largest_CN - largest_N, teacher_largest_CN - teacher_largest_N
        total_N = (total_CN * behind_CN.exp()).sum(0)
        ahead_N = (behind_CN.exp() * (ahead_CN + total_CN * (behind_CN - teacher_behind_CN))).sum(0) / total_N
        ctx.save_for_backward(hidden_NW, head_VW, teacher_hidden_NU, teacher_head_VU, largest_N, total_N, teacher_largest_N, ahead_N)
        return ahead_N - total_N.log() + (teacher_total_CN * teacher_behind_CN.exp()).sum(0).log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NW, head_VW, *_ = ctx.saved_tensors
        (N, W), (V, U) = hidden_NW.shape, ctx.saved_tensors[3].shape
        hidden_grad_NW = hidden_NW.new_zeros(N, W, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        head_grad_VW = torch.empty_like(head_VW) if ctx.needs_input_grad[1] else None
        for first in range(0, V, _CHUNK_V):
            head_vW = head_VW[first:first + _CHUNK_V]
            logits_grad_Nv = hidden_NW.new_empty(N, len(head_vW))
            _divergence_grad[triton.cdiv(len(head_vW), _TILE), triton.cdiv(N, _TILE)](
                *ctx.saved_tensors, grad_N.contiguous(), logits_grad_Nv, first, N, V, W, U, len(head_vW), _TILE,
                _TILE_BYTES // head_VW.element_size(), num_warps=_WARPS)
            _give_back(logits_grad_Nv, head_vW, hidden_NW, hidden_grad_NW, head_grad_VW, first)
        return None if hidden_grad_NW is None else hidden_grad_NW.to(hidden_NW.dtype), head_grad_VW, None, None


@cross_entropy.register(NAME, supports=lambda hidden_NW, head_VW, target_N: hidden_NW.dtype == head_VW.dtype and runs(hidden_NW, head_VW))
def cross_entropy_triton(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor) -> Tensor:
    """`cross_entropy` for hidden and head of one dtype; in bfloat16 their gradients come from gradients of the logits rounded to it."""
    return _CrossEntropy.apply(hidden_NW.contiguous(), head_VW.contiguous(), target_N)


def _one_precision(hidden_NW: Tensor, head_VW: Tensor, teacher_hidden_NU: Tensor, teacher_head_VU: Tensor) -> bool:
    one = hidden_NW.dtype == head_VW.dtype and teacher_hidden_NU.dtype == teacher_head_VU.dtype
    return one and len(hidden_NW) > 0 and runs(hidden_NW, head_VW, teacher_hidden_NU, teacher_head_VU)


@reverse_kl.register(NAME, supports=_one_precision)
def reverse_kl_triton(hidden_NW: Tensor, head_VW: Tensor, teacher_hidden_NU: Tensor, teacher_head_VU: Tensor) -> Tensor:
    """`reverse_kl` for a student of one dtype and a teacher of one; bfloat16 gradients come from gradients of the logits rounded to it."""
    return _ReverseKl.apply(*(x.contiguous() for x in (hidden_NW, head_VW, teacher_hidden_NU.detach(), teacher_head_VU.detach())))
