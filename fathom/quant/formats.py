"""FP8 (e4m3) and FP4 (e2m1) numbers with power-of-two block scales, as the release stores them (report 2.3.4, 5.2.1).

Everything here is exact or rounds once, to nearest with ties to even, from float32 (float64 is rounded to that first). Knows tensors
only: no names, no model, no files.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 ... 7; bit 3 is the sign
TILE = 128  # an FP8 weight has one scale for each tile of 128 x 128
ACTIVATION_BLOCK = 128  # channels of an FP8 activation that share a scale
ENTRY_BLOCK = 64  # channels of an FP8 cache entry that share a scale
FP4_BLOCK = 32  # inputs of an FP4 row that share a scale
SMALLEST_ACTIVATION = 1e-4  # below this largest value an activation block's scale stops shrinking
_SMALLEST_SCALE = 2.0**-126  # of a weight block, so that a block of zeros has a scale too
_SHIFT = 64  # an FP4 tile's largest scale over the FP8 scale that its values move to: 6 * 64 <= 448


@dataclass(frozen=True)
class Packed:
    """A quantised matrix [..., O, I], or a stack of them.

    FP8: `codes` [..., O, I] in e4m3, `scale` [..., ceil(O / 128), ceil(I / 128)]. FP4: `codes` [..., O, I / 2] in int8, two e2m1
    values a byte, the even input in the low nibble, `scale` [..., O, ceil(I / 32)]. Scales are e8m0, or float32 (Base).
    """

    codes: Tensor
    scale: Tensor

    @property
    def is_fp4(self) -> bool:
        """Whether the codes are FP4."""
        return self.codes.dtype == torch.int8

    @property
    def shape(self) -> torch.Size:
        """Of the matrix that the codes stand for."""
        return torch.Size([*self.codes.shape[:-1], self.codes.shape[-1] * (2 if self.is_fp4 else 1)])

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, index: int) -> "Packed":
        return Packed(self.codes[index], self.scale[index])


def block_scale(largest: Tensor, limit: float) -> Tensor:
    """The smallest powers of two s with largest <= limit * s, in float32; `largest` [...] from limit * 2^-126."""
    mantissa, exponent = torch.frexp(largest.float())
    limit_mantissa, limit_exponent = math.frexp(limit)
    exponent = exponent - limit_exponent + (mantissa > limit_mantissa).int()
    return (exponent + 127 << 23).view(torch.float32)  # the exponent's bits: exact where 2 ** x need not be


def quantise_fp8(weight: Tensor, scale_dtype: torch.dtype = E8M0) -> Packed:
    """A matrix [..., O, I] in FP8 with one scale for each tile of 128 x 128; the last tiles may be short."""
    tiles = _tiles(weight.float())  # [..., o, 128, i, 128]
    scale = block_scale(tiles.abs().amax((-3, -1)).clamp(min=E4M3_MAX * _SMALLEST_SCALE), E4M3_MAX)
    codes = (tiles / scale[..., :, None, :, None]).to(E4M3)
    return Packed(_untiled(codes, weight.shape), scale.to(scale_dtype))


def quantise_fp4(weight: Tensor) -> Packed:
    """A matrix [..., O, I], I even, in MXFP4: one scale for each 32 inputs of a row; the last block may be short."""
    blocks = _blocks(weight.float(), FP4_BLOCK)
    scale = _fp4_scale(blocks)
    codes = encode_e2m1(blocks / scale[..., None]).flatten(-2)[..., :weight.shape[-1]]
    return Packed(pack_nibbles(codes), scale.to(E8M0))


def dequantise(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [..., O, I]: code times scale, exact in float32, and in bfloat16, for powers of two from 2^-124."""
    shape, scale = packed.shape, packed.scale.float()
    if packed.is_fp4:
        blocks = _blocks(decode_e2m1(unpack_nibbles(packed.codes)), FP4_BLOCK)
        return (blocks * scale[..., None]).flatten(-2)[..., :shape[-1]].to(dtype)
    return _untiled(_tiles(packed.codes.float()) * scale[..., :, None, :, None], shape).to(dtype)


def fp4_to_fp8(packed: Packed, scale_dtype: torch.dtype = E8M0) -> tuple[Packed, Tensor]:
    """The same matrix in FP8, and the mask [..., o, i] of the tiles of 128 x 128 that could not be moved exactly.

    A tile's FP8 scale is its largest FP4 scale / 64. That is exact while the scales of its nonzero values lie within a factor of 2^14
    of that; every value is checked, and the codes of an inexact tile must not be used.
    """
    values = decode_e2m1(unpack_nibbles(packed.codes))
    tiles = _tiles(values)
    scale = _tiles(packed.scale.float().repeat_interleave(FP4_BLOCK, -1)[..., :values.shape[-1]])
    tile_scale = (scale.amax((-3, -1)) / _SHIFT).clamp(min=2.0**-127)
    moved = tiles * (scale / tile_scale[..., :, None, :, None])
    codes = moved.to(E4M3)
    inexact = ((codes.float() != moved) | ((moved == 0) & (tiles != 0))).any(-1).any(-2)
    return Packed(_untiled(codes, values.shape), tile_scale.to(scale_dtype)), inexact


def round_fp8(x: Tensor, block: int, smallest: float = SMALLEST_ACTIVATION) -> Tensor:
    """x [..., C] rounded to FP8 values with one scale for each `block` channels, in the dtype of x."""
    codes, scale = fp8_blocks(x, block, smallest)
    return (codes.float() * scale[..., None]).flatten(-2)[..., :x.shape[-1]].to(x.dtype)


def round_fp4(x: Tensor) -> Tensor:
    """x [..., C] rounded to MXFP4 values, one scale for each 32 channels, in the dtype of x."""
    blocks = _blocks(x.float(), FP4_BLOCK)
    scale = _fp4_scale(blocks)[..., None]
    return (round_e2m1(blocks / scale) * scale).flatten(-2)[..., :x.shape[-1]].to(x.dtype)


def fp8_blocks(x: Tensor, block: int, smallest: float = SMALLEST_ACTIVATION) -> tuple[Tensor, Tensor]:
    """Codes [..., n, block] in e4m3 and scales [..., n] in float32 of x [..., C], the last block filled up with zeros."""
    blocks = _blocks(x.float(), block)
    scale = block_scale(blocks.abs().amax(-1).clamp(min=smallest), E4M3_MAX)
    return (blocks / scale[..., None]).to(E4M3), scale


def round_e2m1(x: Tensor) -> Tensor:
    """Values [...] within +-6 rounded to the nearest e2m1 value, ties to the even code, the sign of zero kept."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / step).round() * step


def encode_e2m1(x: Tensor) -> Tensor:
    """Codes [...] (uint8, 0 ... 15) of values within +-6, rounded as round_e2m1 does."""
    size = round_e2m1(x.abs())
    # 0, .5, 1, 1.5, 2 are codes 0 ... 4 at twice the value; 3, 4, 6 are 5, 6, 7.
    code = torch.where(size <= 2, size * 2, torch.where(size <= 4, size + 2, 7.0))
    return code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Float32 values [...] of codes 0 ... 15."""
    return _e2m1_table(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


@lru_cache
@torch.inference_mode(False)
def _e2m1_table(device: torch.device) -> Tensor:
    """The values of codes 0 ... 15, kept on the device: no step has to bring them there."""
    return torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [..., C], C even, two a byte [..., C / 2] in int8, the even channel in the low nibble."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).view(torch.int8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The codes [..., C] in uint8 of bytes [..., C / 2]."""
    byte = packed.contiguous().view(torch.uint8)
    return torch.stack([byte & 15, byte >> 4], -1).flatten(-2)


def hadamard(x: Tensor) -> Tensor:
    """x [..., C] times the normalised Hadamard matrix (Sylvester's order), summed in float32, in the dtype of x; its own inverse.

    Where C is no power of two, each block of the largest power of two that divides C is turned on its own. Sums are taken
    in one fixed order, so that a vector's result does not depend on what it is computed with.
    """
    turned, size = x if x.dtype == torch.float64 else x.float(), x.shape[-1] & -x.shape[-1]
    half = 1
    while half < size:
        one, other = turned.unflatten(-1, (-1, 2, half)).unbind(-2)
        turned = torch.stack([one + other, one - other], -2).flatten(-3)
        half *= 2
    return (turned * size**-0.5).to(x.dtype)


def _fp4_scale(blocks: Tensor) -> Tensor:
    return block_scale(blocks.abs().amax(-1).clamp(min=E2M1_MAX * _SMALLEST_SCALE), E2M1_MAX)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., C] as [..., n, block], filled up with zeros."""
    short = -x.shape[-1] % block
    return (torch.nn.functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, block))


def _tiles(x: Tensor) -> Tensor:
    """[..., O, I] as [..., o, 128, i, 128], filled up with zeros."""
    short = (0, -x.shape[-1] % TILE, 0, -x.shape[-2] % TILE)
    filled = torch.nn.functional.pad(x, short) if any(short) else x
    return filled.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(-2).flatten(-3, -2)[..., :shape[-2], :shape[-1]].contiguous()
