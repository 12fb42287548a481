"""RMS normalisation and interleaved rotary turns on GPUs, alone or in one pass (report 2.3.3).

A program takes whole rows, as pairs of neighbouring channels. The backward pass turns the gradient back, and computes what the
normalisation did to it from the input and one number a row; the weight's gradient is summed over runs of rows in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.heads import low_rank_queries
from fathom.ops.linear import Layer
from fathom.ops.norm import rms_normalise
from fathom.ops.rotary import rotate
from fathom.ops.triton.launch import NAME, power_of_two, runs

_TILE = 2048  # channels of the rows that a program holds at once
_ROWS = 32  # rows whose part of the weight's gradient one program sums
_WIDE = 4096  # channels from which a row has twice as many threads


class _Turn(NamedTuple):
    """Cosines and sines [..., C, 2] for rows b, s, h of [B, S, H]: how many rows, and steps in memory from one to the next."""

    parts: Tensor
    C: int
    S: int
    H: int
    stride_b: int
    stride_s: int
    stride_h: int

    @classmethod
    def of(cls, turn: Tensor, x: Tensor) -> "_Turn":
        """`turn` [..., C] for x [..., D] of at most three leading axes."""
        C, shape = turn.shape[-1], (1,) * (4 - x.dim()) + tuple(x.shape[:-1])
        parts = torch.view_as_real(turn.resolve_conj()).expand(*shape, C, 2)
        if parts.stride(-2) != 2 or parts.stride(-1) != 1:
            parts = parts.contiguous()
        return cls(parts, C, *shape[1:], *parts.stride()[:3])


@triton.jit
def _turned(even_rp, odd_rp, turn, r, p, R, D, C, S, H, stride_b, stride_s, stride_h, sign):
    """Pairs p of rows r as complex numbers, the last C of a row times cos + i sin."""
    place_r = (r // (S * H)).to(tl.int64) * stride_b + (r // H % S).to(tl.int64) * stride_s + (r % H).to(tl.int64) * stride_h
    c = p - (D // 2 - C)
    turns_rp = (r[:, None] < R) & (c[None, :] >= 0) & (c[None, :] < C)
    cos_rp = tl.load(turn + place_r[:, None] + 2 * c[None, :], mask=turns_rp, other=1.0)
    sin_rp = sign * tl.load(turn + place_r[:, None] + 2 * c[None, :] + 1, mask=turns_rp, other=0.0)
    return even_rp * cos_rp - odd_rp * sin_rp, even_rp * sin_rp + odd_rp * cos_rp


@triton.jit
def _pairs(x_RD, r, p, R, D):
    """Even and odd channels of pairs p of rows r, in float32."""
    place_rp = r.to(tl.int64)[:, None] * D + 2 * p[None, :]
    even_rp = tl.load(x_RD + place_rp, mask=(r[:, None] < R) & (2 * p[None, :] < D), other=0.0)
    odd_rp = tl.load(x_RD + place_rp + 1, mask=(r[:, None] < R) & (2 * p[None, :] + 1 < D), other=0.0)
    return even_rp.to(tl.float32), odd_rp.to(tl.float32)


@triton.jit
def _store_pairs(x_RD, even_rp, odd_rp, r, p, R, D):
    place_rp = r.to(tl.int64)[:, None] * D + 2 * p[None, :]
    tl.store(x_RD + place_rp, even_rp, mask=(r[:, None] < R) & (2 * p[None, :] < D))
    tl.store(x_RD + place_rp + 1, odd_rp, mask=(r[:, None] < R) & (2 * p[None, :] + 1 < D))


@triton.jit
def _forward(x_RD, weight_D, turn, out_RD, scale_R, R, D, C, S, H, stride_b, stride_s, stride_h, eps, sign, NORM: tl.constexpr,
             WEIGHT: tl.constexpr, TURN: tl.constexpr, TILE_R: tl.constexpr, TILE_P: tl.constexpr):
    r, p = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R), tl.arange(0, TILE_P)
    even_rp, odd_rp = _pairs(x_RD, r, p, R, D)
    if NORM:
        # x / sqrt(mean(x ** 2) + eps) * weight, in the dtype of x
        scale_r = 1 / tl.sqrt(tl.sum(even_rp * even_rp + odd_rp * odd_rp, 1) / D + eps)
        tl.store(scale_R + r, scale_r, mask=r < R)
        even_rp, odd_rp = even_rp * scale_r[:, None], odd_rp * scale_r[:, None]
        if WEIGHT:
            weight_even_p = tl.load(weight_D + 2 * p, mask=2 * p < D, other=0.0).to(tl.float32)
            weight_odd_p = tl.load(weight_D + 2 * p + 1, mask=2 * p + 1 < D, other=0.0).to(tl.float32)
            even_rp, odd_rp = even_rp * weight_even_p[None, :], odd_rp * weight_odd_p[None, :]
        even_rp = even_rp.to(out_RD.dtype.element_ty).to(tl.float32)
        odd_rp = odd_rp.to(out_RD.dtype.element_ty).to(tl.float32)
    if TURN:
        # view_as_complex(pairs) * turn
        even_rp, odd_rp = _turned(even_rp, odd_rp, turn, r, p, R, D, C, S, H, stride_b, stride_s, stride_h, sign)
    _store_pairs(out_RD, even_rp, odd_rp, r, p, R, D)


@triton.jit
def _backward(grad_RD, x_RD, scale_R, weight_D, turn, x_grad_RD, weight_grad_GD, R, D, C, S, H, stride_b, stride_s, stride_h, sign,
              WEIGHT: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_P: tl.constexpr):
    """Of the normalisation, and of the turn behind it: its gradient is turned back."""
    group, p = tl.program_id(0), tl.arange(0, TILE_P)
    if WEIGHT:
        weight_even_p = tl.load(weight_D + 2 * p, mask=2 * p < D, other=0.0).to(tl.float32)
        weight_odd_p = tl.load(weight_D + 2 * p + 1, mask=2 * p + 1 < D, other=0.0).to(tl.float32)
        sum_even_p, sum_odd_p = tl.zeros((TILE_P,), tl.float32), tl.zeros((TILE_P,), tl.float32)
    for start in range(0, ROWS, TILE_R):
        r = group * ROWS + start + tl.arange(0, TILE_R)
        even_rp, odd_rp = _pairs(grad_RD, r, p, R, D)
        if TURN:
            even_rp, odd_rp = _turned(even_rp, odd_rp, turn, r, p, R, D, C, S, H, stride_b, stride_s, stride_h, -sign)
        scale_r1 = tl.load(scale_R + r, mask=r < R, other=0.0)[:, None]
        x_even_rp, x_odd_rp = _pairs(x_RD, r, p, R, D)
        x_even_rp, x_odd_rp = x_even_rp * scale_r1, x_odd_rp * scale_r1  # normalised
        if WEIGHT:
            sum_even_p += tl.sum(even_rp * x_even_rp, 0)
            sum_odd_p += tl.sum(odd_rp * x_odd_rp, 0)
            even_rp, odd_rp = even_rp * weight_even_p[None, :], odd_rp * weight_odd_p[None, :]
        # A longer row is made shorter: what of the gradient points along it does nothing.
        along_r1 = tl.sum(even_rp * x_even_rp + odd_rp * x_odd_rp, 1)[:, None] / D
        _store_pairs(x_grad_RD, scale_r1 * (even_rp - along_r1 * x_even_rp), scale_r1 * (odd_rp - along_r1 * x_odd_rp), r, p, R, D)
    if WEIGHT:
        tl.store(weight_grad_GD + group.to(tl.int64) * D + 2 * p, sum_even_p, mask=2 * p < D)
        tl.store(weight_grad_GD + group.to(tl.int64) * D + 2 * p + 1, sum_odd_p, mask=2 * p + 1 < D)


def _sizes(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows and channels of x [..., D], and how a program is shaped."""
    D = x.shape[-1]
    pairs = power_of_two(triton.cdiv(D, 2))
    return x.numel() // D, D, {"TILE_R": min(_ROWS, max(1, _TILE // (2 * pairs))), "TILE_P": pairs, "num_warps": 8 if D >= _WIDE else 4}


class _NormaliseAndTurn(torch.autograd.Function):
    """x [..., D] normalised where `eps` is given, times the weight [D] where there is one, then turned where there is a turn."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor | None, turn: Tensor | None, eps: float | None, inverse: bool) -> Tensor:
        x = x.contiguous()
        (R, D, shape), out = _sizes(x), torch.empty_like(x)
        scale_R = x.new_empty(R if eps is not None else 1, dtype=torch.float32)
        steps = (x, 0, 1, 1, 0, 0, 0) if turn is None else _Turn.of(turn, x)
        _forward[triton.cdiv(R, shape["TILE_R"]),](
            x, x if weight_D is None else weight_D, steps[0], out, scale_R, R, D, *steps[1:], 0.0 if eps is None else eps, -1 if inverse else 1,
            eps is not None, weight_D is not None, turn is not None, **shape)
        ctx.save_for_backward(x if eps is not None else None, weight_D, turn, scale_R)
        ctx.inverse = inverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, turn, scale_R = ctx.saved_tensors
        if x is None:
            return _NormaliseAndTurn.apply(grad, None, turn, None, not ctx.inverse), None, None, None, None
        R, D, shape = _sizes(x)
        groups, x_grad = triton.cdiv(R, _ROWS), torch.empty_like(x)
        weight_grad_GD = x.new_empty(groups if weight_D is not None else 1, D, dtype=torch.float32)
        steps = (x, 0, 1, 1, 0, 0, 0) if turn is None else _Turn.of(turn, x)
        _backward[groups,](
            grad.contiguous(), x, scale_R, x if weight_D is None else weight_D, steps[0], x_grad, weight_grad_GD, R, D, *steps[1:],
            -1 if ctx.inverse else 1, weight_D is not None, turn is not None, _ROWS, **shape)
        return x_grad, None if weight_D is None else weight_grad_GD.sum(0).to(weight_D.dtype), None, None, None


def _turns(x: Tensor, turn: Tensor, inverse: bool = False) -> bool:
    real = turn.dtype == torch.complex64 and turn.device == x.device and not turn.requires_grad
    return real and x.dim() <= 4 and x.shape[-1] % 2 == 0 and x.numel() > 0 and runs(x)


@rms_normalise.register(NAME, supports=lambda x, eps, weight=None: x.numel() > 0 and runs(*(t for t in (x, weight) if t is not None)))
def rms_normalise_triton(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """`rms_normalise` of x [..., D]."""
    return _NormaliseAndTurn.apply(x, None if weight is None else weight.contiguous(), None, eps, False)


@rotate.register(NAME, supports=_turns)
def rotate_triton(x: Tensor, turn: Tensor, inverse: bool = False) -> Tensor:
    """`rotate` of x [..., D] with at most three leading axes."""
    return _NormaliseAndTurn.apply(x, None, turn, None, inverse)


@low_rank_queries.register(NAME, supports=lambda x_BSW, down, norm, up, heads, turn_BSC, eps: runs(x_BSW))
def low_rank_queries_triton(x_BSW: Tensor, down: Layer, norm: Layer, up: Layer, heads: int, turn_BSC: Tensor,
                            eps: float) -> tuple[Tensor, Tensor]:
    """`low_rank_queries` with queries [B, S, H, D] normalised and turned in one pass."""
    latent_BSR = norm(down(x_BSW))
    q_BSHD, turn_BSHC = up(latent_BSR).unflatten(-1, (heads, -1)), turn_BSC[:, :, None]
    if not _turns(q_BSHD, turn_BSHC):
        return latent_BSR, rotate(rms_normalise(q_BSHD, eps), turn_BSHC)
    return latent_BSR, _NormaliseAndTurn.apply(q_BSHD, None, turn_BSHC, eps, False)
