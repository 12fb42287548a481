"""Products with packed matrices on GPUs (report 5.2.1): codes are read packed and become numbers inside the tile, never in memory.

A tile of numbers is what `dequantise` gives: code times scale in float32, rounded to the inputs' dtype. It is the left factor of a product,
from registers, and inputs are the right one, so that few rows make narrow tiles. Each row's sum runs over the same tiles of the weight in
the same order, whatever rows are beside it. Kernels tell a weight's format by the dtype of its codes: see `stored`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.linear import Matrix, linear
from fathom.ops.triton.launch import NAME, runs
from fathom.quant.formats import E4M3, E8M0, Packed

_TILE_O, _TILE_I = 64, 128  # within one tile of FP8 scales, 128 x 128
_FEW_ROWS, _MANY_ROWS = 16, 64  # of x in a tile


def stored(weight: Matrix) -> tuple[Tensor, Tensor]:
    """Codes and scales [..., O, I] as kernels read them: FP8 and e8m0 as uint8, FP4 as int8; a plain matrix stands for both."""
    if not isinstance(weight, Packed):
        return weight.contiguous(), weight.detach()
    codes, scale = weight.codes.contiguous(), weight.scale.contiguous()
    return codes if weight.is_fp4 else codes.view(torch.uint8), scale.view(torch.uint8) if scale.dtype == E8M0 else scale


def warps(x: Tensor) -> int:
    """Of a program that multiplies tiles of x [...]: float32 ones need the registers of more."""
    return 8 if x.dtype == torch.float32 else 4


def reads(weight: Packed, device: torch.device) -> bool:
    """Whether kernels know the formats of a matrix [..., O, I], and it is there."""
    return weight.codes.device == device and weight.codes.dtype in (E4M3, torch.int8) and weight.scale.dtype in (E8M0, torch.float32)


@triton.jit
def scale_numbers(raw):
    """Scales in float32: of e8m0's exponents they are the exponent's bits, but for 2^-127, which has none."""
    if raw.dtype == tl.uint8:
        exponent = raw.to(tl.int32)
        return tl.where(exponent == 255, 0x7FC00000, tl.where(exponent == 0, 1 << 22, exponent << 23)).to(tl.float32, bitcast=True)
    else:
        return raw


@triton.jit
def fp8_numbers(code):
    """E4M3 in float32: its bits are those of a float16 of 2^-8 the size, subnormal ones too; 127 is no number."""
    code = code.to(tl.int16)
    half = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def fp4_numbers(code):
    """E2M1 in float32: its bits are those of a float16 of 2^-14 the size, subnormal ones too."""
    code = code.to(tl.int16)
    return ((code & 8) << 12 | (code & 7) << 9).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def weight_tile(codes, scale, first_o, first_i, O, I, DTYPE: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr):
    """Numbers [o, i] of a matrix [O, I] from a corner on, multiples of the tile's sides, in DTYPE; zero outside of the matrix."""
    o, i = first_o + tl.arange(0, TILE_O), first_i + tl.arange(0, TILE_I)
    if codes.dtype.element_ty == tl.uint8:
        # code * scale[o // 128, i // 128]: one scale, since the tile's sides divide 128
        code_oi = tl.load(codes + o[:, None] * I + i[None, :], mask=(o[:, None] < O) & (i[None, :] < I), other=0)
        tile_oi = fp8_numbers(code_oi) * scale_numbers(tl.load(scale + first_o // 128 * ((I + 127) // 128) + first_i // 128))
    elif codes.dtype.element_ty == tl.int8:
        # code * scale[o, i // 32], the even input in the low nibble
        byte, block = first_i // 2 + tl.arange(0, TILE_I // 2), first_i // 32 + tl.arange(0, TILE_I // 32)
        byte_ob = tl.load(codes + o[:, None] * (I // 2) + byte[None, :], mask=(o[:, None] < O) & (byte[None, :] < I // 2), other=0)
        blocks = (I + 31) // 32
        scale_ob = tl.load(scale + o[:, None] * blocks + block[None, :], mask=(o[:, None] < O) & (block[None, :] < blocks), other=0)
        number_oi = fp4_numbers(tl.interleave(byte_ob & 15, byte_ob >> 4 & 15))
        number_obi = tl.reshape(number_oi, [TILE_O, TILE_I // 32, 32]) * scale_numbers(scale_ob)[:, :, None]
        tile_oi = tl.reshape(number_obi, [TILE_O, TILE_I])
    else:
        tile_oi = tl.load(codes + o[:, None] * I + i[None, :], mask=(o[:, None] < O) & (i[None, :] < I), other=0.0)
    return tile_oi.to(DTYPE)


@triton.jit(do_not_specialize=["N"])
def _product(x_NC, codes, scale, out_NR, N, O, I, TRANSPOSED: tl.constexpr, TILE_N: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr):
    """out[n, o] = sum_i x[n, i] weight[o, i], R results and C columns; `TRANSPOSED`: out[n, i] = sum_o x[n, o] weight[o, i]."""
    TILE_R: tl.constexpr = TILE_I if TRANSPOSED else TILE_O
    TILE_C: tl.constexpr = TILE_O if TRANSPOSED else TILE_I
    R = I if TRANSPOSED else O
    C = O if TRANSPOSED else I
    n = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    first_r = tl.program_id(0) * TILE_R
    r = first_r + tl.arange(0, TILE_R)
    out_rn = tl.zeros([TILE_R, TILE_N], tl.float32)
    for first_c in range(0, C, TILE_C):
        c = first_c + tl.arange(0, TILE_C)
        x_cn = tl.load(x_NC + n[None, :] * C + c[:, None], mask=(n[None, :] < N) & (c[:, None] < C), other=0.0)
        if TRANSPOSED:
            weight_rc = tl.trans(weight_tile(codes, scale, first_c, first_r, O, I, x_cn.dtype, TILE_O, TILE_I))
        else:
            weight_rc = weight_tile(codes, scale, first_r, first_c, O, I, x_cn.dtype, TILE_O, TILE_I)
        out_rn = tl.dot(weight_rc, x_cn, out_rn, input_precision="ieee")
    tl.store(out_NR + n[None, :] * R + r[:, None], out_rn.to(out_NR.dtype.element_ty), mask=(n[None, :] < N) & (r[:, None] < R))


def _multiply(x: Tensor, codes: Tensor, scale: Tensor, transposed: bool) -> Tensor:
    """x [..., I] times the transposed matrix -> [..., O], or x [..., O] times the matrix -> [..., I]."""
    O, I = codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.int8 else 1)
    results, tile = (I, _TILE_I) if transposed else (O, _TILE_O)
    x_NC = x.reshape(-1, x.shape[-1]).contiguous()
    N = len(x_NC)
    out_NR, rows = x.new_empty(N, results), _FEW_ROWS if N <= _FEW_ROWS else _MANY_ROWS
    if N:
        _product[triton.cdiv(results, tile), triton.cdiv(N, rows)](
            x_NC, codes, scale, out_NR, N, O, I, TRANSPOSED=transposed, TILE_N=rows, TILE_O=_TILE_O, TILE_I=_TILE_I,
            num_warps=warps(x))
    return out_NR.view(*x.shape[:-1], results)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return _multiply(x, codes, scale, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(grad, *ctx.saved_tensors, True), None, None


@linear.register(NAME, supports=lambda x, weight: (
    isinstance(weight, Packed) and len(weight.shape) == 2 and reads(weight, x.device) and runs(x)))
def linear_triton(x: Tensor, weight: Packed) -> Tensor:
    """`linear` for packed matrices; plain ones are torch's."""
    return _Linear.apply(x, *stored(weight))
