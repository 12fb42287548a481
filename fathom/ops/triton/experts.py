"""SwiGLU experts on GPUs (report 2.1; clamps: 4.2.3), plain or packed.

The P = N K pairs of token and expert are sorted by expert; a tile of pairs belongs to one expert, and a table made without waiting for the
GPU names it. One kernel makes the activations (gate, up, clamps, routing weight), one multiplies by down and puts rows back in the order of
their pairs, one adds up each token's K rows in order. The backward pass makes the activations again. Products have the weight as their left
factor (see linear.py); every sum over channels runs in tiles that do not depend on the number of tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.experts import clamped_swiglu, routed_experts
from fathom.ops.linear import Matrix
from fathom.ops.rounding import EXACT, Rounding
from fathom.ops.triton.launch import NAME, runs
from fathom.ops.triton.linear import reads, stored, warps, weight_tile
from fathom.quant.formats import Packed

_TILE = 64  # channels of a weight's tile, both ways
_FEW_PAIRS, _MANY_PAIRS = 16, 64  # in a tile
_BLOCK = 1024  # numbers of what is done number by number


@triton.jit
def _swiglu(gate, up, limit):
    """silu(min(gate, limit)) * clamp(up, -limit, limit); not a number stays none."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _swiglu_grads(gate, up, grad, limit):
    """Gradients of gate and up: d silu = sigmoid (1 + gate (1 - sigmoid)), and nothing passes a clamp that acts."""
    low_gate = tl.where(gate > limit, limit, gate)
    bounded = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    sigmoid = tl.sigmoid(low_gate)
    gate_grad = tl.where(gate > limit, 0.0, sigmoid * (1.0 + low_gate * (1.0 - sigmoid)) * bounded * grad)
    return gate_grad, tl.where((up > limit) | (up < -limit), 0.0, low_gate * sigmoid * grad)


@triton.jit(do_not_specialize=["numbers"])
def _clamped_swiglu(gate, up, out, limit, numbers, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_i = tl.load(gate + i, mask=i < numbers, other=0.0).to(tl.float32)
    up_i = tl.load(up + i, mask=i < numbers, other=0.0).to(tl.float32)
    tl.store(out + i, _swiglu(gate_i, up_i, limit), mask=i < numbers)


@triton.jit(do_not_specialize=["numbers"])
def _clamped_swiglu_backward(gate, up, grad, gate_grad, up_grad, limit, numbers, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_i = tl.load(gate + i, mask=i < numbers, other=0.0).to(tl.float32)
    up_i = tl.load(up + i, mask=i < numbers, other=0.0).to(tl.float32)
    gate_grad_i, up_grad_i = _swiglu_grads(gate_i, up_i, tl.load(grad + i, mask=i < numbers, other=0.0), limit)
    tl.store(gate_grad + i, gate_grad_i.to(gate_grad.dtype.element_ty), mask=i < numbers)
    tl.store(up_grad + i, up_grad_i.to(up_grad.dtype.element_ty), mask=i < numbers)


class _ClampedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.limit, out, numbers = limit, torch.empty_like(gate, dtype=torch.float32), gate.numel()
        if numbers:
            _clamped_swiglu[triton.cdiv(numbers, _BLOCK),](gate, up, out, limit, numbers, BLOCK=_BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad, numbers = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        if numbers:
            _clamped_swiglu_backward[triton.cdiv(numbers, _BLOCK),](
                gate, up, grad.contiguous(), gate_grad, up_grad, ctx.limit, numbers, BLOCK=_BLOCK)
        return gate_grad, up_grad, None


@clamped_swiglu.register(NAME, supports=lambda gate, up, limit: gate.shape == up.shape and runs(gate, up))
def clamped_swiglu_triton(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """`clamped_swiglu` in one pass, and its gradients in one."""
    return _ClampedSwiglu.apply(gate, up, limit)


class _Groups(NamedTuple):
    """Pairs sorted by expert: `pair_P` is where each was, E experts' pairs are begin ... end, and T tiles' of at most `size` first ... last."""

    pair_P: Tensor
    begin_E: Tensor
    end_E: Tensor
    expert_T: Tensor
    first_T: Tensor
    last_T: Tensor
    size: int


def _groups(expert_NK: Tensor, experts: int) -> _Groups:
    """All by arithmetic on the device: as many tiles as there can be, of which those that are too many are empty."""
    expert_P, pair_P = expert_NK.flatten().sort(stable=True)
    P, device = len(pair_P), pair_P.device
    size = _MANY_PAIRS if P >= experts * (_MANY_PAIRS // 2) else _FEW_PAIRS
    bound_E = torch.searchsorted(expert_P, torch.arange(experts + 1, device=device))
    begin_E, end_E = bound_E[:-1], bound_E[1:]
    tiles_E = (end_E - begin_E + size - 1) // size
    after_E = tiles_E.cumsum(0)  # tiles of all experts up to here
    tile_T = torch.arange(P // size + min(P, experts), device=device)
    expert_T = torch.searchsorted(after_E, tile_T, right=True).clamp_(max=experts - 1)
    first_T = begin_E[expert_T] + (tile_T - (after_E - tiles_E)[expert_T]) * size
    return _Groups(pair_P, begin_E, end_E, expert_T, first_T, torch.minimum(first_T + size, end_E[expert_T]), size)


@triton.jit
def _gate_and_up(x_wp, gate, gate_scale, up, up_scale, gate_fp, up_fp, f, w, F, W, TILE: tl.constexpr):
    """Add the products of a tile of channels of x with gate and up."""
    gate_fw = weight_tile(gate, gate_scale, f, w, F, W, x_wp.dtype, TILE, TILE)
    up_fw = weight_tile(up, up_scale, f, w, F, W, x_wp.dtype, TILE, TILE)
    return tl.dot(gate_fw, x_wp, gate_fp, input_precision="ieee"), tl.dot(up_fw, x_wp, up_fp, input_precision="ieee")


@triton.jit
def _hidden(x_NW, weight_P, gate_EFW, gate_scale, up_EFW, up_scale, pair_P, expert_T, first_T, last_T, hidden_PF, limit, W, F, K, scales,
            codes, TILE_P: tl.constexpr, TILE: tl.constexpr):
    """hidden = weight * swiglu(gate x, up x), a tile of pairs and of F; an expert has so many `codes` and `scales`."""
    first, last, expert = tl.load(first_T + tl.program_id(0)), tl.load(last_T + tl.program_id(0)), tl.load(expert_T + tl.program_id(0))
    if first >= last:
        return
    gate, gate_scale, up, up_scale = gate_EFW + expert * codes, gate_scale + expert * scales, up_EFW + expert * codes, up_scale + expert * scales
    p, first_f = first + tl.arange(0, TILE_P), tl.program_id(1) * TILE
    pair_p = tl.load(pair_P + p, mask=p < last, other=0)
    gate_fp, up_fp = tl.zeros([TILE, TILE_P], tl.float32), tl.zeros([TILE, TILE_P], tl.float32)
    for first_w in range(0, W, TILE):
        w = first_w + tl.arange(0, TILE)
        x_wp = tl.load(x_NW + (pair_p // K)[None, :] * W + w[:, None], mask=(p < last)[None, :] & (w < W)[:, None], other=0.0)
        gate_fp, up_fp = _gate_and_up(x_wp, gate, gate_scale, up, up_scale, gate_fp, up_fp, first_f, first_w, F, W, TILE)
    # (clamped_swiglu(gate, up) * weight).to(x.dtype)
    weight_p = tl.load(weight_P + pair_p, mask=p < last, other=0.0).to(tl.float32)
    hidden_fp = _swiglu(gate_fp, up_fp, limit) * weight_p[None, :]
    f = first_f + tl.arange(0, TILE)
    tl.store(hidden_PF + p[None, :] * F + f[:, None], hidden_fp.to(hidden_PF.dtype.element_ty), mask=(p < last)[None, :] & (f < F)[:, None])


@triton.jit
def _down(hidden_PF, down_EWF, down_scale, pair_P, expert_T, first_T, last_T, out_PW, W, F, scales, codes, TILE_P: tl.constexpr, TILE: tl.constexpr):
    """down(hidden) in the order of the pairs, a tile of pairs and of W."""
    first, last, expert = tl.load(first_T + tl.program_id(0)), tl.load(last_T + tl.program_id(0)), tl.load(expert_T + tl.program_id(0))
    if first >= last:
        return
    p, first_w = first + tl.arange(0, TILE_P), tl.program_id(1) * TILE
    out_wp = tl.zeros([TILE, TILE_P], tl.float32)
    for first_f in range(0, F, TILE):
        f = first_f + tl.arange(0, TILE)
        hidden_fp = tl.load(hidden_PF + p[None, :] * F + f[:, None], mask=(p < last)[None, :] & (f < F)[:, None], other=0.0)
        down_wf = weight_tile(down_EWF + expert * codes, down_scale + expert * scales, first_w, first_f, W, F, hidden_fp.dtype, TILE, TILE)
        out_wp = tl.dot(down_wf, hidden_fp, out_wp, input_precision="ieee")
    pair_p, w = tl.load(pair_P + p, mask=p < last, other=0), first_w + tl.arange(0, TILE)
    tl.store(out_PW + pair_p[None, :] * W + w[:, None], out_wp.to(out_PW.dtype.element_ty), mask=(p < last)[None, :] & (w < W)[:, None])


@triton.jit
def _sum_chosen(rows_PW, out_NW, W, K, BLOCK: tl.constexpr):
    """out[n] = sum_k rows[n K + k], one after the other."""
    n, w = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_w = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        out_w += tl.load(rows_PW + (n * K + k) * W + w, mask=w < W, other=0.0).to(tl.float32)
    tl.store(out_NW + n * W + w, out_w.to(out_NW.dtype.element_ty), mask=w < W)


@triton.jit
def _hidden_backward(x_NW, grad_NW, weight_P, gate_EFW, gate_scale, up_EFW, up_scale, down_EWF, down_scale, pair_P, expert_T, first_T, last_T,
                     hidden_PF, gate_grad_PF, up_grad_PF, weight_grad_PB, limit, W, F, K, scales, codes, down_scales, down_codes,
                     TILE_P: tl.constexpr, TILE: tl.constexpr):
    """hidden again, the gradients of gate x and up x, and each of B tiles of F's share of the routing weight's gradient."""
    first, last, expert = tl.load(first_T + tl.program_id(0)), tl.load(last_T + tl.program_id(0)), tl.load(expert_T + tl.program_id(0))
    if first >= last:
        return
    gate, gate_scale, up, up_scale = gate_EFW + expert * codes, gate_scale + expert * scales, up_EFW + expert * codes, up_scale + expert * scales
    down, down_scale = down_EWF + expert * down_codes, down_scale + expert * down_scales
    p, first_f = first + tl.arange(0, TILE_P), tl.program_id(1) * TILE
    pair_p = tl.load(pair_P + p, mask=p < last, other=0)
    gate_fp, up_fp = tl.zeros([TILE, TILE_P], tl.float32), tl.zeros([TILE, TILE_P], tl.float32)
    grad_fp = tl.zeros([TILE, TILE_P], tl.float32)  # of weight * swiglu
    for first_w in range(0, W, TILE):
        w = first_w + tl.arange(0, TILE)
        place_wp, real_wp = (pair_p // K)[None, :] * W + w[:, None], (p < last)[None, :] & (w < W)[:, None]
        x_wp = tl.load(x_NW + place_wp, mask=real_wp, other=0.0)
        gate_fp, up_fp = _gate_and_up(x_wp, gate, gate_scale, up, up_scale, gate_fp, up_fp, first_f, first_w, F, W, TILE)
        grad_wp = tl.load(grad_NW + place_wp, mask=real_wp, other=0.0).to(x_wp.dtype)
        down_wf = weight_tile(down, down_scale, first_w, first_f, W, F, x_wp.dtype, TILE, TILE)
        grad_fp = tl.dot(tl.trans(down_wf), grad_wp, grad_fp, input_precision="ieee")
    plain_fp, f = _swiglu(gate_fp, up_fp, limit), first_f + tl.arange(0, TILE)
    weight_p = tl.load(weight_P + pair_p, mask=p < last, other=0.0).to(tl.float32)
    tl.store(weight_grad_PB + pair_p * tl.num_programs(1) + tl.program_id(1), tl.sum(grad_fp * plain_fp, 0), mask=p < last)
    gate_grad_fp, up_grad_fp = _swiglu_grads(gate_fp, up_fp, grad_fp * weight_p[None, :], limit)
    place_fp, real_fp = p[None, :] * F + f[:, None], (p < last)[None, :] & (f < F)[:, None]
    tl.store(hidden_PF + place_fp, (plain_fp * weight_p[None, :]).to(hidden_PF.dtype.element_ty), mask=real_fp)
    tl.store(gate_grad_PF + place_fp, gate_grad_fp.to(gate_grad_PF.dtype.element_ty), mask=real_fp)
    tl.store(up_grad_PF + place_fp, up_grad_fp.to(up_grad_PF.dtype.element_ty), mask=real_fp)


@triton.jit
def _x_backward(gate_grad_PF, up_grad_PF, gate_EFW, gate_scale, up_EFW, up_scale, pair_P, expert_T, first_T, last_T, x_grad_PW, W, F, scales, codes,
                TILE_P: tl.constexpr, TILE: tl.constexpr):
    """Each pair's share of the gradient of x, in the order of the pairs: gate^T d gate + up^T d up."""
    first, last, expert = tl.load(first_T + tl.program_id(0)), tl.load(last_T + tl.program_id(0)), tl.load(expert_T + tl.program_id(0))
    if first >= last:
        return
    gate, gate_scale, up, up_scale = gate_EFW + expert * codes, gate_scale + expert * scales, up_EFW + expert * codes, up_scale + expert * scales
    p, first_w = first + tl.arange(0, TILE_P), tl.program_id(1) * TILE
    x_grad_wp = tl.zeros([TILE, TILE_P], tl.float32)
    for first_f in range(0, F, TILE):
        f = first_f + tl.arange(0, TILE)
        place_fp, real_fp = p[None, :] * F + f[:, None], (p < last)[None, :] & (f < F)[:, None]
        gate_grad_fp = tl.load(gate_grad_PF + place_fp, mask=real_fp, other=0.0)
        up_grad_fp = tl.load(up_grad_PF + place_fp, mask=real_fp, other=0.0)
        gate_wf = tl.trans(weight_tile(gate, gate_scale, first_f, first_w, F, W, gate_grad_fp.dtype, TILE, TILE))
        up_wf = tl.trans(weight_tile(up, up_scale, first_f, first_w, F, W, gate_grad_fp.dtype, TILE, TILE))
        x_grad_wp = tl.dot(gate_wf, gate_grad_fp, x_grad_wp, input_precision="ieee")
        x_grad_wp = tl.dot(up_wf, up_grad_fp, x_grad_wp, input_precision="ieee")
    pair_p, w = tl.load(pair_P + p, mask=p < last, other=0), first_w + tl.arange(0, TILE)
    tl.store(x_grad_PW + pair_p[None, :] * W + w[:, None], x_grad_wp.to(x_grad_PW.dtype.element_ty), mask=(p < last)[None, :] & (w < W)[:, None])


@triton.jit
def _outer(left_PF, right_NW, pair_P, begin_E, end_E, out, stride_f, stride_w, W, F, K, TILE_P: tl.constexpr, TILE: tl.constexpr):
    """Sum of left right^T over an expert's pairs in order, a tile of F and W; out [E, F, W] or [E, W, F] by its strides."""
    expert, first_f, first_w = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE, tl.program_id(2) * TILE
    begin, end = tl.load(begin_E + expert), tl.load(end_E + expert)
    f, w = first_f + tl.arange(0, TILE), first_w + tl.arange(0, TILE)
    out_fw = tl.zeros([TILE, TILE], tl.float32)
    for first in range(begin, end, TILE_P):
        p = first + tl.arange(0, TILE_P)
        token_p = tl.load(pair_P + p, mask=p < end, other=0) // K
        left_fp = tl.load(left_PF + p[None, :] * F + f[:, None], mask=(p < end)[None, :] & (f < F)[:, None], other=0.0)
        right_pw = tl.load(right_NW + token_p[:, None] * W + w[None, :], mask=(p < end)[:, None] & (w < W)[None, :], other=0.0)
        out_fw = tl.dot(left_fp, right_pw.to(left_fp.dtype), out_fw, input_precision="ieee")
    tl.store(out + expert * F * W + f[:, None] * stride_f + w[None, :] * stride_w, out_fw.to(out.dtype.element_ty), mask=(f < F)[:, None] & (w < W)[None, :])


def _sum_by_token(rows_PW: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Sum of each token's K rows [N, W]."""
    P, W = rows_PW.shape
    out_NW = rows_PW.new_empty(P // K, W, dtype=dtype)
    _sum_chosen[P // K, triton.cdiv(W, _BLOCK)](rows_PW, out_NW, W, K, BLOCK=_BLOCK)
    return out_NW


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NW: Tensor, weight_NK: Tensor, gate_EFW: Tensor, up_EFW: Tensor, down_EWF: Tensor, scales: tuple[Tensor, ...],
                expert_NK: Tensor, hidden: int, limit: float, rounding: Rounding) -> Tensor:
        x_NW, weight_NK, (_, W), K = x_NW.contiguous(), weight_NK.contiguous(), x_NW.shape, expert_NK.shape[1]
        groups = _groups(expert_NK, len(gate_EFW))
        gate_scale, up_scale, down_scale = scales
        ctx.save_for_backward(x_NW, weight_NK, gate_EFW, up_EFW, down_EWF, *scales)
        ctx.groups, ctx.hidden, ctx.limit, ctx.rounding = groups, hidden, limit, rounding
        tiles, tile_arguments = len(groups.expert_T), (groups.pair_P, groups.expert_T, groups.first_T, groups.last_T)
        hidden_PF, out_PW = x_NW.new_empty(len(groups.pair_P), hidden), x_NW.new_empty(len(groups.pair_P), W)
        _hidden[tiles, triton.cdiv(hidden, _TILE)](
            x_NW, weight_NK, gate_EFW, gate_scale, up_EFW, up_scale, *tile_arguments, hidden_PF, limit, W, hidden, K,
            gate_scale[0].numel(), gate_EFW[0].numel(), TILE_P=groups.size, TILE=_TILE, num_warps=warps(x_NW))
        _down[tiles, triton.cdiv(W, _TILE)](
            rounding.inputs(hidden_PF).contiguous(), down_EWF, down_scale, *tile_arguments, out_PW, W, hidden, down_scale[0].numel(), down_EWF[0].numel(),
            TILE_P=groups.size, TILE=_TILE, num_warps=warps(x_NW))
        return _sum_by_token(out_PW, K, torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NW: Tensor) -> tuple[Tensor | None, ...]:
        x_NW, weight_NK, gate_EFW, up_EFW, down_EWF, gate_scale, up_scale, down_scale = ctx.saved_tensors
        groups, F, limit, (N, W), K = ctx.groups, ctx.hidden, ctx.limit, x_NW.shape, weight_NK.shape[1]
        tiles, tile_arguments = len(groups.expert_T), (groups.pair_P, groups.expert_T, groups.first_T, groups.last_T)
        sizes, grad_NW = (gate_scale[0].numel(), gate_EFW[0].numel()), grad_NW.contiguous()
        hidden_PF, gate_grad_PF, up_grad_PF = (x_NW.new_empty(N * K, F) for _ in range(3))
        weight_grad_PB = x_NW.new_empty(N * K, triton.cdiv(F, _TILE), dtype=torch.float32)
        _hidden_backward[tiles, triton.cdiv(F, _TILE)](
            x_NW, grad_NW, weight_NK, gate_EFW, gate_scale, up_EFW, up_scale, down_EWF, down_scale, *tile_arguments,
            hidden_PF, gate_grad_PF, up_grad_PF, weight_grad_PB, limit, W, F, K, *sizes, down_scale[0].numel(), down_EWF[0].numel(),
            TILE_P=groups.size, TILE=_TILE, num_warps=8, num_stages=2)
        x_grad_NW = None
        if ctx.needs_input_grad[0]:
            x_grad_PW = x_NW.new_empty(N * K, W)
            _x_backward[tiles, triton.cdiv(W, _TILE)](
                gate_grad_PF, up_grad_PF, gate_EFW, gate_scale, up_EFW, up_scale, *tile_arguments, x_grad_PW, W, F, *sizes,
                TILE_P=groups.size, TILE=_TILE, num_warps=warps(x_NW))
            x_grad_NW = _sum_by_token(x_grad_PW, K, x_NW.dtype)
        matrix_grads = [None] * 3
        for place, (matrix, left_PF, right_NW, strides) in enumerate((
                (gate_EFW, gate_grad_PF, x_NW, (W, 1)), (up_EFW, up_grad_PF, x_NW, (W, 1)), (down_EWF, hidden_PF, grad_NW, (1, F)))):
            if ctx.needs_input_grad[2 + place]:
                left_PF = ctx.rounding.inputs(left_PF).contiguous() if left_PF is hidden_PF else left_PF
                matrix_grads[place] = torch.empty_like(matrix)
                _outer[len(matrix), triton.cdiv(F, _TILE), triton.cdiv(W, _TILE)](
                    left_PF, right_NW, groups.pair_P, groups.begin_E, groups.end_E, matrix_grads[place], *strides, W, F, K,
                    TILE_P=_MANY_PAIRS, TILE=_TILE, num_warps=warps(x_NW))
        weight_grad_NK = weight_grad_PB.sum(1).view(N, K).to(weight_NK.dtype)
        return x_grad_NW, weight_grad_NK, *matrix_grads, *[None] * 5


def _format(weight: Matrix) -> torch.dtype | None:
    """Of the codes, None of a plain matrix."""
    return weight.codes.dtype if isinstance(weight, Packed) else None


def _supports(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
              rounding: Rounding = EXACT) -> bool:
    readable = all(reads(each, x_NW.device) if isinstance(each, Packed) else runs(each) for each in (gate_EFW, up_EFW, down_EWF))
    return readable and _format(gate_EFW) == _format(up_EFW) and runs(x_NW, weight_NK) and expert_NK.numel() > 0


@routed_experts.register(NAME, supports=_supports)
def routed_experts_triton(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
                          rounding: Rounding = EXACT) -> Tensor:
    """`routed_experts` with gradients of x and the routing weights, and of plain matrices.

    Inputs are rounded before the kernels and activations between them; the gradient passes both roundings straight.
    """
    codes, scales = zip(*(stored(each) for each in (gate_EFW, up_EFW, down_EWF)), strict=True)
    return _RoutedExperts.apply(rounding.inputs(x_NW), weight_NK, *codes, scales, expert_NK, gate_EFW.shape[1], limit, rounding)
