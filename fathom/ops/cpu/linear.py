"""Dequantisation on CPU by table, and products tile by tile, so that a packed matrix never exists in full beside its codes.

Torch converts float8 one number at a time (0.2e9 a second on 2 cores of Zen 4); looking pairs of FP8 codes and quadruples of FP4
codes up in tables of 65,536 rows is 5 to 15 times as fast, and as exact.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.cpu.products import Times, times
from fathom.ops.linear import Matrix, dense, linear
from fathom.quant.formats import E4M3, E8M0, FP4_BLOCK, TILE, Packed, decode_e2m1

_TILE_NUMBERS = 1 << 20  # of a dequantised tile: 2 MB in bfloat16, which stays in the cache of a core


@lru_cache
@torch.inference_mode(False)
def _table(fp4: bool, dtype: torch.dtype) -> Tensor:
    """What two bytes stand for, as one integer each [65536]: four FP4 or two FP8 numbers in `dtype`."""
    low, high = torch.arange(1 << 16) & 255, torch.arange(1 << 16) >> 8
    if fp4:
        columns = [decode_e2m1((byte >> shift & 15).to(torch.uint8)) for byte in (low, high) for shift in (0, 4)]
    else:
        columns = [byte.to(torch.uint8).view(E4M3).float() for byte in (low, high)]
    return torch.stack(columns, 1).to(dtype)


def _lookup(codes: Tensor, fp4: bool, dtype: torch.dtype) -> Tensor:
    """The numbers [R, C] of contiguous codes [R, bytes], an even number of bytes a row."""
    pairs = codes.view(torch.uint8).view(torch.uint16).to(torch.int32).flatten()
    table = _table(fp4, dtype)
    item = {4: torch.int32, 8: torch.int64}.get(table.shape[1] * table.element_size())
    if item is None:
        return table.index_select(0, pairs).view(len(codes), -1)
    return table.view(item).flatten().index_select(0, pairs).view(dtype).view(len(codes), -1)


def _dense_rows(weight: Packed, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows first ... last of a packed matrix [O, I]; for FP8 `first` is a multiple of 128."""
    rows = _lookup(weight.codes[first:last].contiguous(), weight.is_fp4, dtype)
    columns = rows.shape[1]
    if weight.is_fp4:
        scale = _scale_numbers(weight.scale[first:last], dtype)
        whole = columns // FP4_BLOCK
        rows[:, :whole * FP4_BLOCK].unflatten(1, (whole, FP4_BLOCK)).mul_(scale[:, :whole, None])
        if columns % FP4_BLOCK:
            rows[:, whole * FP4_BLOCK:].mul_(scale[:, whole:])
        return rows
    scale = _scale_numbers(weight.scale[first // TILE:-(-last // TILE)], dtype)
    scale = scale.repeat_interleave(TILE, 1)[:, None, :columns] if columns > TILE else scale[:, None]
    whole = len(rows) // TILE
    rows[:whole * TILE].unflatten(0, (whole, TILE)).mul_(scale[:whole])
    if len(rows) % TILE:
        rows[whole * TILE:].mul_(scale[-1])
    return rows


@lru_cache
@torch.inference_mode(False)
def _exponents(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E8M0).to(dtype)


def _scale_numbers(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [R, C] in `dtype`, by table where they are e8m0."""
    if scale.dtype != E8M0:
        return scale.to(dtype)
    return _exponents(dtype).index_select(0, scale.contiguous().view(torch.uint8).flatten().int()).view(scale.shape)


def _tile_rows(columns: int) -> int:
    return max(1, _TILE_NUMBERS // columns // TILE) * TILE


def _packed_on_cpu(weight: Matrix, dtype: torch.dtype) -> bool:
    """Whether the tables serve: a packed matrix with an even number of bytes a row and scales exact in `dtype`."""
    return (isinstance(weight, Packed) and weight.codes.device.type == "cpu" and weight.codes.shape[-1] % 2 == 0
            and dtype in (torch.float32, torch.bfloat16)
            and (dtype == torch.float32 or weight.scale.dtype != torch.float32))


@dense.register("cpu", supports=_packed_on_cpu)
def dense_cpu(weight: Packed, dtype: torch.dtype) -> Tensor:
    """`dense` of packed matrices."""
    out = torch.empty(weight.shape, dtype=dtype)
    flat = out.view(-1, *out.shape[-2:])
    codes, scale = weight.codes.view(-1, *weight.codes.shape[-2:]), weight.scale.view(-1, *weight.scale.shape[-2:])
    step = _tile_rows(out.shape[-1])
    for index in range(len(flat)):
        for first in range(0, flat.shape[1], step):
            last = min(first + step, flat.shape[1])
            flat[index, first:last] = _dense_rows(Packed(codes[index], scale[index]), first, last, dtype)
    return out


@linear.register("oneDNN", supports=lambda x, weight: (
    isinstance(weight, Tensor) and x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"))
def linear_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` for plain float32 matrices."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return Times.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1]) if x.dim() > 1 else F.linear(x, weight)
    return times(x, weight)


def _supports(x: Tensor, weight: Matrix) -> bool:
    if isinstance(weight, Packed):
        return _packed_on_cpu(weight, x.dtype) and not (torch.is_grad_enabled() and x.requires_grad)
    narrow = weight.dtype == torch.bfloat16 and x.dtype == torch.float32 and weight.device.type == "cpu"
    return narrow and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


@linear.register("cpu", supports=_supports)
def linear_cpu(x: Tensor, weight: Matrix) -> Tensor:
    """`linear` for packed matrices, and for bfloat16 ones under float32 inputs, a tile of rows at a time."""
    rows, columns = weight.shape
    step = _tile_rows(columns)
    tiles = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        tile = (_dense_rows(weight, first, last, x.dtype) if isinstance(weight, Packed)
                else weight[first:last].to(x.dtype))
        tiles.append(times(x, tile))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)
