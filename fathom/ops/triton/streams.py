"""Hyper-connections on GPUs (report 2.2, eq. 1-8).

T = B S tokens, I = N W numbers of a token's streams, R rows of fn, C chunks. Coefficients read the streams once: products with fn are partial
sums over chunks of channels, so that few tokens fill a GPU too, and a second kernel adds them up and runs Sinkhorn in registers on matrices
padded to 4 x 4 or 8 x 8. The backward pass reads the streams once more; fn's gradient is partial sums over chunks of tokens.
Kernels whose numbers a token's neighbours must not change are compiled once for any T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.streams import collapse_coefficients, sinkhorn, stream_coefficients, streams_in, streams_out
from fathom.ops.triton.launch import NAME, power_of_two, runs

_TILE_T, _TILE_I = 32, 64  # of products with fn
_CHUNK_T, _CHUNK_I = 512, 1024  # of partial sums, multiples of the tiles
_TILE_NW = 2048  # numbers of the streams that are mixed at once
_LARGEST_N = 8


def _pad(N: int) -> int:
    """Rows and columns of a padded matrix."""
    return max(4, power_of_two(N))


def _pad_rows(R: int) -> int:
    """Rows of fn in a tile of a product, which are 16 at least."""
    return max(16, power_of_two(R))


def _tile_channels(N: int, W: int) -> int:
    """Channels that are mixed at once."""
    return min(_TILE_NW // power_of_two(N), power_of_two(W))


@triton.jit
def _softmax(logits_tjk, N: tl.constexpr, PAD: tl.constexpr):
    """Over the last axis; zero outside N x N."""
    j, k = tl.arange(0, PAD)[None, :, None], tl.arange(0, PAD)[None, None, :]
    logits_tjk = tl.where(k < N, logits_tjk, float("-inf"))
    share_tjk = tl.exp(logits_tjk - tl.max(logits_tjk, 2, keep_dims=True))
    share_tjk = share_tjk / tl.sum(share_tjk, 2, keep_dims=True)
    return tl.where((j < N) & (k < N), share_tjk, 0.0)


@triton.jit
def _balance(logits_tjk, divisors_LTN, t, T, iterations, eps, N: tl.constexpr, PAD: tl.constexpr, KEEP: tl.constexpr):
    """Doubly stochastic matrices of a tile's logits (eq. 8); `KEEP`: the L = 2 iterations - 1 divisions' divisors go to memory."""
    j, k = tl.arange(0, PAD)[None, :, None], tl.arange(0, PAD)[None, None, :]
    t = t[:, None, None]
    # matrix = softmax(logits) + eps; matrix = matrix / (sum over rows + eps)
    matrix_tjk = tl.where((j < N) & (k < N), _softmax(logits_tjk, N, PAD) + eps, 0.0)
    column_t1k = tl.sum(matrix_tjk, 1, keep_dims=True) + eps
    matrix_tjk = matrix_tjk / column_t1k
    if KEEP:
        tl.store(divisors_LTN + t * N + k, column_t1k, mask=(t < T) & (k < N))
    for step in range(1, iterations):
        # matrix = matrix / (sum over columns + eps); matrix = matrix / (sum over rows + eps)
        row_tj1 = tl.sum(matrix_tjk, 2, keep_dims=True) + eps
        matrix_tjk = matrix_tjk / row_tj1
        column_t1k = tl.sum(matrix_tjk, 1, keep_dims=True) + eps
        matrix_tjk = matrix_tjk / column_t1k
        if KEEP:
            tl.store(divisors_LTN + ((2 * step - 1) * T + t) * N + j, row_tj1, mask=(t < T) & (j < N))
            tl.store(divisors_LTN + (2 * step * T + t) * N + k, column_t1k, mask=(t < T) & (k < N))
    return matrix_tjk


@triton.jit(do_not_specialize=["T"])
def _sinkhorn(logits_TNN, matrix_TNN, divisors_LTN, T, iterations, eps, N: tl.constexpr, PAD: tl.constexpr, KEEP: tl.constexpr, TILE_T: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    j, k = tl.arange(0, PAD)[None, :, None], tl.arange(0, PAD)[None, None, :]
    place_tjk, real_tjk = (t[:, None, None] * N + j) * N + k, (t[:, None, None] < T) & (j < N) & (k < N)
    logits_tjk = tl.load(logits_TNN + place_tjk, mask=real_tjk, other=0.0)
    tl.store(matrix_TNN + place_tjk, _balance(logits_tjk, divisors_LTN, t, T, iterations, eps, N, PAD, KEEP), mask=real_tjk)


@triton.jit
def _sinkhorn_backward(grad_TNN, logits_TNN, matrix_TNN, divisors_LTN, logits_grad_TNN, T, iterations, N: tl.constexpr, PAD: tl.constexpr,
                       TILE_T: tl.constexpr):
    """Undoes the divisions one by one from the final matrix.

    With y = x / (sum x + eps) and g = y dy, the gradient with respect to log y, each step is g <- g - y sum g.
    """
    t = (tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T))[:, None, None]
    j, k = tl.arange(0, PAD)[None, :, None], tl.arange(0, PAD)[None, None, :]
    place_tjk, real_tjk = (t * N + j) * N + k, (t < T) & (j < N) & (k < N)
    matrix_tjk = tl.load(matrix_TNN + place_tjk, mask=real_tjk, other=0.0)
    log_grad_tjk = tl.load(grad_TNN + place_tjk, mask=real_tjk, other=0.0) * matrix_tjk
    for back in range(1, iterations):
        step = iterations - back
        log_grad_tjk -= matrix_tjk * tl.sum(log_grad_tjk, 1, keep_dims=True)
        matrix_tjk *= tl.load(divisors_LTN + (2 * step * T + t) * N + k, mask=(t < T) & (k < N), other=1.0)
        log_grad_tjk -= matrix_tjk * tl.sum(log_grad_tjk, 2, keep_dims=True)
        matrix_tjk *= tl.load(divisors_LTN + ((2 * step - 1) * T + t) * N + j, mask=(t < T) & (j < N), other=1.0)
    log_grad_tjk -= matrix_tjk * tl.sum(log_grad_tjk, 1, keep_dims=True)
    matrix_tjk *= tl.load(divisors_LTN + t * N + k, mask=(t < T) & (k < N), other=1.0)
    # From log(softmax + eps) to log softmax, and through the softmax.
    share_tjk = _softmax(tl.load(logits_TNN + place_tjk, mask=real_tjk, other=0.0), N, PAD)
    log_grad_tjk = log_grad_tjk * share_tjk / tl.where(real_tjk, matrix_tjk, 1.0)
    tl.store(logits_grad_TNN + place_tjk, log_grad_tjk - share_tjk * tl.sum(log_grad_tjk, 2, keep_dims=True), mask=real_tjk)


@triton.jit(do_not_specialize=["T"])
def _products(x_TI, fn_RI, product_CTR, square_CT, T, I, R, PAD_R: tl.constexpr, CHUNK_I: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr):
    """x @ fn.T and the sum of x's squares over a chunk of channels, for a tile of tokens."""
    chunk, t, r = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T), tl.arange(0, PAD_R)
    product_tr, square_ti = tl.zeros((TILE_T, PAD_R), tl.float32), tl.zeros((TILE_T, TILE_I), tl.float32)
    for start in range(0, CHUNK_I, TILE_I):
        i = chunk * CHUNK_I + start + tl.arange(0, TILE_I)
        x_ti = tl.load(x_TI + t[:, None] * I + i, mask=(t[:, None] < T) & (i < I), other=0.0).to(tl.float32)
        fn_ir = tl.load(fn_RI + r * I + i[:, None], mask=(r < R) & (i[:, None] < I), other=0.0).to(tl.float32)
        product_tr = tl.dot(x_ti, fn_ir, product_tr, input_precision="ieee")
        square_ti += x_ti * x_ti
    tl.store(product_CTR + (chunk * T + t[:, None]) * R + r, product_tr, mask=(t[:, None] < T) & (r < R))
    tl.store(square_CT + chunk * T + t, tl.sum(square_ti, 1), mask=t < T)


@triton.jit(do_not_specialize=["T"])
def _coefficients(product_CTR, square_CT, base_R, scale, mix_TR, inverse_rms_T, pre_TN, post_TN, res_TNN, chunks, T, I, R, iterations, eps,
                  norm_eps, N: tl.constexpr, PAD: tl.constexpr, STREAMS: tl.constexpr, TILE_T: tl.constexpr):
    """pre, post and res of a tile of tokens (`STREAMS`), or pre alone; beside them the mix that they come from, and the inverse RMS.

    A gate's number g stands for row g % PAD of pre (g < PAD) or post; a matrix's number m for row m // PAD and column m % PAD of res.
    """
    t, g, m = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T), tl.arange(0, 2 * PAD), tl.arange(0, PAD * PAD)
    gate_g, res_m = g // PAD * N + g % PAD, 2 * N + m // PAD * N + m % PAD  # rows of fn
    real_g, real_m = (g // PAD < (2 if STREAMS else 1)) & (g % PAD < N), (m // PAD < N) & (m % PAD < N)
    t1, real_tg, real_tm = t[:, None], (t[:, None] < T) & real_g, (t[:, None] < T) & real_m
    gate_tg, res_tm = tl.zeros((TILE_T, 2 * PAD), tl.float32), tl.zeros((TILE_T, PAD * PAD), tl.float32)
    square_t = tl.zeros((TILE_T,), tl.float32)
    for chunk in range(chunks):
        gate_tg += tl.load(product_CTR + (chunk * T + t1) * R + gate_g, mask=real_tg, other=0.0)
        if STREAMS:
            res_tm += tl.load(product_CTR + (chunk * T + t1) * R + res_m, mask=real_tm, other=0.0)
        square_t += tl.load(square_CT + chunk * T + t, mask=t < T, other=0.0)
    # mix = product * rsqrt(mean of squares + norm_eps)
    inverse_rms_t = tl.rsqrt(square_t / I + norm_eps)
    tl.store(inverse_rms_T + t, inverse_rms_t, mask=t < T)
    gate_tg *= inverse_rms_t[:, None]
    tl.store(mix_TR + t1 * R + gate_g, gate_tg, mask=real_tg)
    # pre = sigmoid(mix * scale + base) + eps; post = 2 sigmoid(mix * scale + base)
    scale_g = tl.load(scale + g // PAD, mask=real_g, other=0.0).to(tl.float32)
    gate_tg = tl.sigmoid(gate_tg * scale_g + tl.load(base_R + gate_g, mask=real_g, other=0.0).to(tl.float32))
    tl.store(pre_TN + t1 * N + g, gate_tg + eps, mask=real_tg & (g < PAD))
    if STREAMS:
        tl.store(post_TN + t1 * N + g - PAD, 2 * gate_tg, mask=real_tg & (g >= PAD))
        # res = sinkhorn(mix * scale + base)
        res_tm *= inverse_rms_t[:, None]
        tl.store(mix_TR + t1 * R + res_m, res_tm, mask=real_tm)
        logits_tm = res_tm * tl.load(scale + 2).to(tl.float32) + tl.load(base_R + res_m, mask=real_m, other=0.0).to(tl.float32)
        matrix_tjk = _balance(tl.reshape(logits_tm, (TILE_T, PAD, PAD)), res_TNN, t, T, iterations, eps, N, PAD, False)
        tl.store(res_TNN + t1 * (N * N) + res_m - 2 * N, tl.reshape(matrix_tjk, (TILE_T, PAD * PAD)), mask=real_tm)


@triton.jit
def _product_backward(product_grad_TR, radial_T, x_TI, fn_RI, x_grad_TI, fn_grad_CRI, T, I, R: tl.constexpr, PAD_R: tl.constexpr,
                      CHUNK_T: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr):
    """A tile of channels and a chunk of tokens: x_grad = product_grad @ fn + radial x, and the chunk's product_grad.T @ x."""
    chunk, i, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE_I + tl.arange(0, TILE_I), tl.arange(0, PAD_R)
    place_ri, real_ri = r[:, None] * I + i, (r[:, None] < R) & (i < I)
    fn_ri = tl.load(fn_RI + place_ri, mask=real_ri, other=0.0).to(tl.float32)
    fn_grad_ri = tl.zeros((PAD_R, TILE_I), tl.float32)
    for start in range(0, CHUNK_T, TILE_T):
        t = chunk * CHUNK_T + start + tl.arange(0, TILE_T)
        place_ti, real_ti = t[:, None] * I + i, (t[:, None] < T) & (i < I)
        product_grad_tr = tl.load(product_grad_TR + t[:, None] * R + r, mask=(t[:, None] < T) & (r < R), other=0.0)
        x_ti = tl.load(x_TI + place_ti, mask=real_ti, other=0.0).to(tl.float32)
        radial_t = tl.load(radial_T + t, mask=t < T, other=0.0)
        x_grad_ti = tl.dot(product_grad_tr, fn_ri, radial_t[:, None] * x_ti, input_precision="ieee")
        tl.store(x_grad_TI + place_ti, x_grad_ti, mask=real_ti)
        fn_grad_ri = tl.dot(tl.trans(product_grad_tr), x_ti, fn_grad_ri, input_precision="ieee")
    tl.store(fn_grad_CRI + chunk * R * I + place_ri, fn_grad_ri, mask=real_ri)


@triton.jit
def _streams_in(X_TNW, pre_TN, out_TW, W, N: tl.constexpr, TILE_W: tl.constexpr):
    """out = sum_n pre_n X_n, for one token and a tile of channels."""
    t, w = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_W + tl.arange(0, TILE_W)
    out_w = tl.zeros((TILE_W,), tl.float32)
    for n in tl.static_range(N):
        x_w = tl.load(X_TNW + (t * N + n) * W + w, mask=w < W, other=0.0).to(tl.float32)
        out_w += tl.load(pre_TN + t * N + n).to(tl.float32) * x_w
    tl.store(out_TW + t * W + w, out_w, mask=w < W)


@triton.jit
def _streams_in_backward(grad_TW, X_TNW, pre_TN, X_grad_TNW, pre_grad_TN, W, N: tl.constexpr, PAD: tl.constexpr, TILE_W: tl.constexpr):
    """X_grad_n = pre_n grad and pre_grad_n = sum_w grad X_n, for one token."""
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    pre_n = tl.load(pre_TN + t * N + n, mask=n < N, other=0.0).to(tl.float32)
    product_nw = tl.zeros((PAD, TILE_W), tl.float32)
    for start in range(0, W, TILE_W):
        w = start + tl.arange(0, TILE_W)
        place_nw, real_nw = (t * N + n[:, None]) * W + w, (n[:, None] < N) & (w < W)
        grad_w = tl.load(grad_TW + t * W + w, mask=w < W, other=0.0).to(tl.float32)
        product_nw += tl.load(X_TNW + place_nw, mask=real_nw, other=0.0).to(tl.float32) * grad_w
        tl.store(X_grad_TNW + place_nw, pre_n[:, None] * grad_w, mask=real_nw)
    tl.store(pre_grad_TN + t * N + n, tl.sum(product_nw, 1), mask=n < N)


@triton.jit
def _streams_out(X_TNW, y_TW, post_TN, res_TNN, out_TNW, W, N: tl.constexpr, PAD: tl.constexpr, TILE_W: tl.constexpr):
    """out_k = post_k y + sum_j res[j, k] X_j, for one token and a tile of channels."""
    t, w, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_W + tl.arange(0, TILE_W), tl.arange(0, PAD)
    post_k = tl.load(post_TN + t * N + k, mask=k < N, other=0.0).to(tl.float32)
    out_kw = post_k[:, None] * tl.load(y_TW + t * W + w, mask=w < W, other=0.0).to(tl.float32)
    for j in tl.static_range(N):
        x_w = tl.load(X_TNW + (t * N + j) * W + w, mask=w < W, other=0.0).to(tl.float32)
        out_kw += tl.load(res_TNN + (t * N + j) * N + k, mask=k < N, other=0.0).to(tl.float32)[:, None] * x_w
    tl.store(out_TNW + (t * N + k[:, None]) * W + w, out_kw, mask=(k[:, None] < N) & (w < W))


@triton.jit
def _streams_out_backward(grad_TNW, X_TNW, y_TW, post_TN, res_TNN, X_grad_TNW, y_grad_TW, post_grad_TN, res_grad_TNN, W, N: tl.constexpr,
                          PAD: tl.constexpr, TILE_W: tl.constexpr):
    """X_grad_j = sum_k res[j, k] grad_k, y_grad = sum_k post_k grad_k, post_grad_k = grad_k . y and res_grad[j, k] = X_j . grad_k, for one token."""
    t, j = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    post_grad_j, res_grad_jk = tl.zeros((PAD,), tl.float32), tl.zeros((PAD, PAD), tl.float32)
    for start in range(0, W, TILE_W):
        w = start + tl.arange(0, TILE_W)
        place_jw, real_jw = (t * N + j[:, None]) * W + w, (j[:, None] < N) & (w < W)
        x_jw = tl.load(X_TNW + place_jw, mask=real_jw, other=0.0).to(tl.float32)
        y_w = tl.load(y_TW + t * W + w, mask=w < W, other=0.0).to(tl.float32)
        x_grad_jw, y_grad_w = tl.zeros((PAD, TILE_W), tl.float32), tl.zeros((TILE_W,), tl.float32)
        for k in tl.static_range(N):
            grad_w = tl.load(grad_TNW + (t * N + k) * W + w, mask=w < W, other=0.0).to(tl.float32)
            x_grad_jw += tl.load(res_TNN + (t * N + j) * N + k, mask=j < N, other=0.0).to(tl.float32)[:, None] * grad_w
            y_grad_w += tl.load(post_TN + t * N + k).to(tl.float32) * grad_w
            post_grad_j += tl.where(j == k, tl.sum(y_w * grad_w, 0), 0.0)
            res_grad_jk += tl.where(j == k, tl.sum(x_jw * grad_w, 1)[:, None], 0.0)
        tl.store(X_grad_TNW + place_jw, x_grad_jw, mask=real_jw)
        tl.store(y_grad_TW + t * W + w, y_grad_w, mask=w < W)
    tl.store(post_grad_TN + t * N + j, post_grad_j, mask=j < N)
    tl.store(res_grad_TNN + (t * N + j[:, None]) * N + j, res_grad_jk, mask=(j[:, None] < N) & (j < N))


def _tokens_first(x: Tensor) -> Tensor:
    """[B, S, ...] as contiguous [T, ...]."""
    return x.contiguous().flatten(0, 1)


def _balanced(logits_TNN: Tensor, iterations: int, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    """Doubly stochastic matrices [T, N, N], and the divisors [2 iterations - 1, T, N] where they are to be kept."""
    T, N, _ = logits_TNN.shape
    matrix_TNN = torch.empty_like(logits_TNN)
    divisors_LTN = logits_TNN.new_empty(2 * iterations - 1, T, N) if keep else matrix_TNN
    _sinkhorn[triton.cdiv(T, _TILE_T),](logits_TNN, matrix_TNN, divisors_LTN, T, iterations, eps, N, _pad(N), keep, _TILE_T,
                                          num_warps=_pad(N) // 4)
    return matrix_TNN, divisors_LTN


def _balanced_backward(grad_TNN: Tensor, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Gradient of the logits [T, N, N]; the divisors are computed anew."""
    T, N, _ = logits_TNN.shape
    logits_grad_TNN = torch.empty_like(logits_TNN)
    _sinkhorn_backward[triton.cdiv(T, _TILE_T),](
        grad_TNN.contiguous(), logits_TNN, *_balanced(logits_TNN, iterations, eps, True), logits_grad_TNN, T, iterations, N, _pad(N), _TILE_T,
        num_warps=_pad(N) // 4)
    return logits_grad_TNN


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits_TNN)
        ctx.iterations, ctx.eps = iterations, eps
        return _balanced(logits_TNN, iterations, eps, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TNN: Tensor) -> tuple[Tensor, None, None]:
        return _balanced_backward(grad_TNN, *ctx.saved_tensors, ctx.iterations, ctx.eps), None, None


class _Coefficients(torch.autograd.Function):
    """pre [T, N], post [T, N] and res [T, N, N] where fn has (2 + N) N rows, else pre alone."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, fn: Tensor, base: Tensor, scale: Tensor, N: int, iterations: int, eps: float,
                norm_eps: float) -> tuple[Tensor, ...]:
        T, (R, I), streams = len(x_TI), fn.shape, len(scale) == 3
        mix_TR, inverse_rms_T = x_TI.new_empty(T, R, dtype=torch.float32), x_TI.new_empty(T, dtype=torch.float32)
        outputs = [mix_TR.new_empty(T, *shape) for shape in ([(N,), (N,), (N, N)] if streams else [(N,)])]
        tiles, chunks = triton.cdiv(T, _TILE_T), triton.cdiv(I, _CHUNK_I)
        product_CTR, square_CT = mix_TR.new_empty(chunks, T, R), mix_TR.new_empty(chunks, T)
        _products[tiles, chunks](x_TI, fn, product_CTR, square_CT, T, I, R, _pad_rows(R), _CHUNK_I, _TILE_T, _TILE_I)
        _coefficients[tiles,](
            product_CTR, square_CT, base, scale, mix_TR, inverse_rms_T, *(outputs if streams else outputs * 3), chunks, T, I, R, iterations, eps,
            norm_eps, N, _pad(N), streams, _TILE_T)
        ctx.save_for_backward(x_TI, fn, base, scale, mix_TR, inverse_rms_T)
        ctx.N, ctx.iterations, ctx.eps = N, iterations, eps
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, pre_grad_TN: Tensor, *post_and_res: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, fn, base, scale, mix_TR, inverse_rms_T = ctx.saved_tensors
        N, T, (R, I) = ctx.N, len(x_TI), fn.shape
        sizes = [N, N, N * N][:len(scale)]
        scale_R = torch.cat([x.expand(size) for x, size in zip(scale.float().split(1), sizes, strict=True)])
        logits_TR = torch.addcmul(base.float(), mix_TR, scale_R)
        gates = len(sizes[:2]) * N
        gate_TR = logits_TR[:, :gates].sigmoid()
        logits_grad_TR = torch.cat([pre_grad_TN, *(2 * x for x in post_and_res[:1])], 1) * gate_TR * (1 - gate_TR)
        if post_and_res:
            res_TNN = logits_TR[:, gates:].contiguous().view(-1, N, N)
            res_grad_TNN = _balanced_backward(post_and_res[1], res_TNN, ctx.iterations, ctx.eps)
            logits_grad_TR = torch.cat([logits_grad_TR, res_grad_TNN.flatten(1)], 1)
        along_mix_TR = logits_grad_TR * mix_TR
        # The RMS divides after the product, so its gradient is a multiple of x for each token.
        radial_T = (along_mix_TR * scale_R).sum(1) * inverse_rms_T.square() / -I
        product_grad_TR = logits_grad_TR * scale_R * inverse_rms_T[:, None]
        chunks = triton.cdiv(T, _CHUNK_T)
        x_grad_TI, fn_grad_CRI = torch.empty_like(x_TI), mix_TR.new_empty(chunks, R, I)
        _product_backward[triton.cdiv(I, _TILE_I), chunks](
            product_grad_TR, radial_T, x_TI, fn, x_grad_TI, fn_grad_CRI, T, I, R, _pad_rows(R), _CHUNK_T, _TILE_T, _TILE_I, num_warps=8)
        scale_grad = torch.stack([x.sum() for x in along_mix_TR.sum(0).split(sizes)])
        return (x_grad_TI, fn_grad_CRI.sum(0).to(fn.dtype), logits_grad_TR.sum(0).to(base.dtype), scale_grad.to(scale.dtype), *[None] * 4)


class _StreamsIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X_TNW: Tensor, pre_TN: Tensor) -> Tensor:
        ctx.save_for_backward(X_TNW, pre_TN)
        T, N, W = X_TNW.shape
        tile, out_TW = _tile_channels(N, W), X_TNW.new_empty(T, W)
        _streams_in[T, triton.cdiv(W, tile)](X_TNW, pre_TN, out_TW, W, N, tile)
        return out_TW

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TW: Tensor) -> tuple[Tensor, Tensor]:
        X_TNW, pre_TN = ctx.saved_tensors
        T, N, W = X_TNW.shape
        grads = torch.empty_like(X_TNW), torch.empty_like(pre_TN)
        _streams_in_backward[T,](grad_TW.contiguous(), X_TNW, pre_TN, *grads, W, N, power_of_two(N), _tile_channels(N, W))
        return grads


class _StreamsOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X_TNW: Tensor, y_TW: Tensor, post_TN: Tensor, res_TNN: Tensor) -> Tensor:
        ctx.save_for_backward(X_TNW, y_TW, post_TN, res_TNN)
        T, N, W = X_TNW.shape
        tile, out_TNW = _tile_channels(N, W), torch.empty_like(X_TNW)
        _streams_out[T, triton.cdiv(W, tile)](X_TNW, y_TW, post_TN, res_TNN, out_TNW, W, N, power_of_two(N), tile)
        return out_TNW

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TNW: Tensor) -> tuple[Tensor, ...]:
        T, N, W = grad_TNW.shape
        grads = tuple(map(torch.empty_like, ctx.saved_tensors))
        _streams_out_backward[T,](grad_TNW.contiguous(), *ctx.saved_tensors, *grads, W, N, power_of_two(N), _tile_channels(N, W))
        return grads


@sinkhorn.register(NAME, supports=lambda logits_BSNN, iterations, eps: (
    eps > 0 and logits_BSNN.dtype == torch.float32 and logits_BSNN.shape[-1] <= _LARGEST_N and runs(logits_BSNN)))
def sinkhorn_triton(logits_BSNN: Tensor, iterations: int, eps: float) -> Tensor:
    """`sinkhorn` for float32 and eps > 0, which keeps every entry away from zero."""
    return _Sinkhorn.apply(_tokens_first(logits_BSNN), iterations, eps).unflatten(0, logits_BSNN.shape[:2])


@stream_coefficients.register(NAME, supports=lambda X_BSNW, fn, base, scale_3, iterations, eps, norm_eps: (
    eps > 0 and X_BSNW.shape[2] <= _LARGEST_N and runs(X_BSNW, fn, base, scale_3)))
def stream_coefficients_triton(X_BSNW: Tensor, fn: Tensor, base: Tensor, scale_3: Tensor, iterations: int, eps: float,
                               norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`stream_coefficients` for eps > 0."""
    coefficients = _Coefficients.apply(
        _tokens_first(X_BSNW).flatten(1), fn.contiguous(), base.contiguous(), scale_3.contiguous(), X_BSNW.shape[2], iterations, eps, norm_eps)
    return tuple(x.unflatten(0, X_BSNW.shape[:2]) for x in coefficients)


@collapse_coefficients.register(NAME, supports=lambda X_BSNW, fn_NI, base_N, scale_1, eps, norm_eps: (
    X_BSNW.shape[2] <= _LARGEST_N and runs(X_BSNW, fn_NI, base_N, scale_1)))
def collapse_coefficients_triton(X_BSNW: Tensor, fn_NI: Tensor, base_N: Tensor, scale_1: Tensor, eps: float, norm_eps: float) -> Tensor:
    """`collapse_coefficients`."""
    return _Coefficients.apply(_tokens_first(X_BSNW).flatten(1), fn_NI.contiguous(), base_N.contiguous(), scale_1.contiguous(),
                               X_BSNW.shape[2], 0, eps, norm_eps)[0].unflatten(0, X_BSNW.shape[:2])


@streams_in.register(NAME, supports=lambda X_BSNW, pre_BSN: X_BSNW.shape[2] <= _LARGEST_N and runs(X_BSNW, pre_BSN))
def streams_in_triton(X_BSNW: Tensor, pre_BSN: Tensor) -> Tensor:
    """`streams_in`."""
    return _StreamsIn.apply(*map(_tokens_first, (X_BSNW, pre_BSN))).unflatten(0, X_BSNW.shape[:2])


@streams_out.register(NAME, supports=lambda X_BSNW, y_BSW, post_BSN, res_BSNN: (
    X_BSNW.shape[2] <= _LARGEST_N and runs(X_BSNW, y_BSW, post_BSN, res_BSNN)))
def streams_out_triton(X_BSNW: Tensor, y_BSW: Tensor, post_BSN: Tensor, res_BSNN: Tensor) -> Tensor:
    """`streams_out`."""
    return _StreamsOut.apply(*map(_tokens_first, (X_BSNW, y_BSW, post_BSN, res_BSNN))).unflatten(0, X_BSNW.shape[:2])
