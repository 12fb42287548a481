"""Pooling tokens into compressed entries on GPUs (report eq. 9-12 and 20-23), one program for a block and a tile of channels.

One softmax runs over the block's tokens, a tile of them at a time; where blocks overlap, over the first halves of the previous block's tokens
before. Its log-sum-exp is kept, so the backward pass reads each token once. That pass stores without adding: every token must be in at most
one block of `current_NR`, and in at most one of `previous_NR` whose `has_previous_N` is true (another half of its channels).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.compress import pool_blocks
from fathom.ops.triton.launch import NAME, power_of_two, runs

_TILE_R, _TILE_D = 16, 128


@triton.jit
def _pool_tokens(largest_d, total_d, sum_d, value_IC, score_IC, index_NR, n, count, value_stride, score_stride, R, c, real_d, TILE_R: tl.constexpr):
    """Takes the first `count` tokens of block n, at channels c, into a running softmax mean: its largest score, weights and weighted values."""
    for start in range(0, count, TILE_R):
        r = start + tl.arange(0, TILE_R)
        token_r1 = tl.load(index_NR + n * R + r, mask=r < count, other=0).to(tl.int64)[:, None]
        real_rd = (r[:, None] < count) & real_d
        score_rd = tl.load(score_IC + token_r1 * score_stride + c, mask=real_rd, other=0.0).to(tl.float32)
        score_rd = tl.where(r[:, None] < count, score_rd, float("-inf"))
        value_rd = tl.load(value_IC + token_r1 * value_stride + c, mask=real_rd, other=0.0).to(tl.float32)
        new_d = tl.maximum(largest_d, tl.max(score_rd, 0))
        weight_rd, shrink_d = tl.exp(score_rd - new_d), tl.exp(largest_d - new_d)
        total_d = total_d * shrink_d + tl.sum(weight_rd, 0)
        sum_d = sum_d * shrink_d + tl.sum(weight_rd * value_rd, 0)
        largest_d = new_d
    return largest_d, total_d, sum_d


@triton.jit
def _pool(value_IC, score_IC, current_NR, previous_NR, has_previous_N, pooled_ND, log_total_ND, value_stride, score_stride, R, D,
          OVERLAP: tl.constexpr, TILE_R: tl.constexpr, TILE_D: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    c, real_d = d, d < D
    largest_d = tl.full((TILE_D,), float("-inf"), tl.float32)
    total_d, sum_d = tl.zeros((TILE_D,), tl.float32), tl.zeros((TILE_D,), tl.float32)
    if OVERLAP:
        count = R * tl.load(has_previous_N + n).to(tl.int32)
        largest_d, total_d, sum_d = _pool_tokens(largest_d, total_d, sum_d, value_IC, score_IC, previous_NR, n, count, value_stride,
                                                 score_stride, R, d, real_d, TILE_R)
        c += D
    largest_d, total_d, sum_d = _pool_tokens(largest_d, total_d, sum_d, value_IC, score_IC, current_NR, n, R, value_stride,
                                             score_stride, R, c, real_d, TILE_R)
    # (softmax(score) * value).sum
    tl.store(pooled_ND + n * D + d, sum_d / total_d, mask=real_d)
    tl.store(log_total_ND + n * D + d, largest_d + tl.log(total_d), mask=real_d)


@triton.jit
def _pool_tokens_backward(grad_d, pooled_d, log_total_d, value_IC, score_IC, index_NR, value_grad_IC, score_grad_IC, n, count, value_stride,
                          score_stride, R, C, c, real_d, TILE_R: tl.constexpr):
    """Gradients of the first `count` tokens of block n at channels c: weight grad, and weight (value - pooled) grad."""
    for start in range(0, count, TILE_R):
        r = start + tl.arange(0, TILE_R)
        token_r1 = tl.load(index_NR + n * R + r, mask=r < count, other=0).to(tl.int64)[:, None]
        real_rd = (r[:, None] < count) & real_d
        score_rd = tl.load(score_IC + token_r1 * score_stride + c, mask=real_rd, other=0.0).to(tl.float32)
        value_rd = tl.load(value_IC + token_r1 * value_stride + c, mask=real_rd, other=0.0).to(tl.float32)
        value_grad_rd = tl.exp(score_rd - log_total_d) * grad_d
        tl.store(value_grad_IC + token_r1 * C + c, value_grad_rd, mask=real_rd)
        tl.store(score_grad_IC + token_r1 * C + c, value_grad_rd * (value_rd - pooled_d), mask=real_rd)


@triton.jit
def _pool_backward(grad_ND, pooled_ND, log_total_ND, value_IC, score_IC, current_NR, previous_NR, has_previous_N, value_grad_IC, score_grad_IC,
                   value_stride, score_stride, R, D, OVERLAP: tl.constexpr, TILE_R: tl.constexpr, TILE_D: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    c, C, real_d = d, D, d < D
    grad_d = tl.load(grad_ND + n * D + d, mask=real_d, other=0.0)
    pooled_d = tl.load(pooled_ND + n * D + d, mask=real_d, other=0.0)
    log_total_d = tl.load(log_total_ND + n * D + d, mask=real_d, other=0.0)
    if OVERLAP:
        count = R * tl.load(has_previous_N + n).to(tl.int32)
        C = 2 * D
        _pool_tokens_backward(grad_d, pooled_d, log_total_d, value_IC, score_IC, previous_NR, value_grad_IC, score_grad_IC, n, count,
                              value_stride, score_stride, R, C, d, real_d, TILE_R)
        c += D
    _pool_tokens_backward(grad_d, pooled_d, log_total_d, value_IC, score_IC, current_NR, value_grad_IC, score_grad_IC, n, R,
                          value_stride, score_stride, R, C, c, real_d, TILE_R)


def _tiles(N: int, R: int, D: int) -> tuple[tuple[int, int], int, int]:
    """The grid, and the tokens and channels of a tile."""
    tile_D = min(_TILE_D, power_of_two(D))
    return (N, triton.cdiv(D, tile_D)), min(_TILE_R, power_of_two(R)), tile_D


class _PoolBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value_IC: Tensor, score_IC: Tensor, current_NR: Tensor, previous_NR: Tensor | None, has_previous_N: Tensor | None) -> Tensor:
        overlap, (N, R), C = previous_NR is not None, current_NR.shape, value_IC.shape[1]
        D = C // 2 if overlap else C
        pooled_ND = value_IC.new_empty(N, D, dtype=torch.float32)
        log_total_ND = torch.empty_like(pooled_ND)
        indices = (current_NR, previous_NR, has_previous_N) if overlap else (current_NR, current_NR, current_NR)
        grid, tile_R, tile_D = _tiles(N, R, D)
        _pool[grid](value_IC, score_IC, *indices, pooled_ND, log_total_ND, value_IC.stride(0), score_IC.stride(0), R, D, overlap, tile_R, tile_D)
        ctx.save_for_backward(pooled_ND, log_total_ND, value_IC, score_IC, *indices)
        ctx.overlap = overlap
        return pooled_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        _, _, value_IC, score_IC, current_NR, *_ = ctx.saved_tensors
        (N, R), D = current_NR.shape, grad_ND.shape[1]
        grads = value_IC.new_zeros(value_IC.shape), score_IC.new_zeros(score_IC.shape)  # tokens in no block keep the zeros
        grid, tile_R, tile_D = _tiles(N, R, D)
        _pool_backward[grid](grad_ND.contiguous(), *ctx.saved_tensors, *grads, value_IC.stride(0), score_IC.stride(0), R, D, ctx.overlap,
                             tile_R, tile_D)
        return *grads, None, None, None


def _rows(x_BJC: Tensor) -> Tensor:
    """[B, J, C] as [B * J, C] with neighbouring channels side by side; no copy where it is half of a wider tensor."""
    x_IC = x_BJC.flatten(0, 1)
    return x_IC if x_IC.stride(1) == 1 else x_IC.contiguous()


@pool_blocks.register(NAME, supports=lambda value_BJC, score_BJC, current_NR, previous_NR, has_previous_N: runs(value_BJC, score_BJC))
def pool_blocks_triton(value_BJC: Tensor, score_BJC: Tensor, current_NR: Tensor, previous_NR: Tensor | None,
                       has_previous_N: Tensor | None) -> Tensor:
    """`pool_blocks` where no token is in two blocks."""
    previous_NR, has_previous_N = (None if x is None else x.contiguous() for x in (previous_NR, has_previous_N))
    return _PoolBlocks.apply(_rows(value_BJC), _rows(score_BJC), current_NR.contiguous(), previous_NR, has_previous_N)
