"""Rounding to FP8 and FP4 on GPUs, and the records of the released cache (report 2.3.4, 5.2.1): one pass where torch makes ten.

Every result has the bits of the definitions in fathom/quant. Scales are powers of two, so they are made and applied as exponents, exactly.
A number is rounded by adding one so large that the sum's last bit is the step, and taking it away again: to nearest, ties to even.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.records import pack, unpack
from fathom.ops.rounding import round_entries, round_index, round_inputs
from fathom.ops.triton.launch import DTYPES, NAME, here, power_of_two, runs
from fathom.ops.triton.linear import fp4_numbers, fp8_numbers, scale_numbers
from fathom.quant.formats import ACTIVATION_BLOCK, E2M1_MAX, ENTRY_BLOCK, FP4_BLOCK, SMALLEST_ACTIVATION
from fathom.quant.records import EntryRecord, KeyRecord, PlainRecord

_SMALLEST_FP4 = E2M1_MAX * 2.0**-126  # so that a block of zeros has a scale too
_TILE = 4096  # numbers that a program turns and rounds at once
_WIDE = 4096  # channels from which a row has twice as many threads


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _scale_exponent(largest, LIMIT_EXPONENT: tl.constexpr, LIMIT_FRACTION: tl.constexpr):
    """Exponent's bits of the smallest power of two s with largest <= limit * s, limit = (1 + fraction / 2^23) 2^exponent."""
    bits = _bits(largest)
    return (bits >> 23) - LIMIT_EXPONENT + ((bits & 0x7FFFFF) > LIMIT_FRACTION).to(tl.int32)


@triton.jit
def _times_power(x, exponent):
    """x * 2^(exponent - 127)."""
    return x * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, step_exponent):
    """x as a multiple of 2^(step_exponent - 127), its sign kept where it is zero."""
    large = ((step_exponent + 23) << 23 | 0x400000).to(tl.float32, bitcast=True)  # 1.5 * 2^23 steps
    size = (tl.abs(x) + large) - large
    return (_bits(size) | (_bits(x) >> 31 << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """x within +-448, in float32, rounded to e4m3: steps of an eighth of its power of two, 2^-9 at least."""
    return _rounded(x, tl.maximum((_bits(x) >> 23 & 255) - 3, 118))


@triton.jit
def _e4m3_code(x):
    """The byte of an e4m3 value."""
    bits = _bits(x)
    exponent = bits >> 23 & 255
    size = tl.where(exponent > 120, exponent - 120 << 3 | (bits >> 20 & 7), (tl.abs(x) * 512).to(tl.int32))
    return size | (bits >> 24 & 128)


@triton.jit
def _e2m1(x):
    """x within +-6, in float32, rounded to e2m1: steps of a half below 2, of 1 below 4, of 2 above."""
    return _rounded(x, tl.maximum(_bits(x) >> 23 & 255, 127) - 1)


@triton.jit
def _e2m1_code(x):
    """The four bits of an e2m1 value."""
    size = tl.abs(x)
    code = tl.where(size <= 2, size * 2, tl.where(size <= 4, size + 2, 7.0)).to(tl.int32)
    return code | (_bits(x) >> 28 & 8)


@triton.jit
def _fp8_blocks(x_ND, n, D, plain, smallest, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Of row n: channels [b, c] in blocks, those numbers over their scales in e4m3, and the scales' exponents [b]."""
    channel_bc = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x_bc = tl.load(x_ND + n * D + channel_bc, mask=channel_bc < plain, other=0.0).to(tl.float32)
    exponent_b = _scale_exponent(tl.maximum(tl.max(tl.abs(x_bc), 1), smallest), 8, 0x600000)  # 448
    return channel_bc, _e4m3(_times_power(x_bc, 254 - exponent_b[:, None])), exponent_b


@triton.jit
def _round_fp8(x_ND, out_ND, D, plain, smallest, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, REST: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    channel_bc, value_bc, exponent_b = _fp8_blocks(x_ND, n, D, plain, smallest, BLOCK, BLOCKS)
    tl.store(out_ND + n * D + channel_bc, _times_power(value_bc, exponent_b[:, None]), mask=channel_bc < plain)
    rest = plain + tl.arange(0, REST)
    tl.store(out_ND + n * D + rest, tl.load(x_ND + n * D + rest, mask=rest < D, other=0.0), mask=rest < D)


@triton.jit
def _pack_entries(x_ND, out_NW, D, plain, width, smallest, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, REST: tl.constexpr, TAIL: tl.constexpr):
    """FP8 codes, rotary channels in bfloat16, a scale for each block, zeros."""
    n = tl.program_id(0).to(tl.int64)
    channel_bc, value_bc, exponent_b = _fp8_blocks(x_ND, n, D, plain, smallest, BLOCK, BLOCKS)
    out = out_NW + n * width
    tl.store(out + channel_bc, _e4m3_code(value_bc).to(tl.uint8), mask=channel_bc < plain)
    rest = tl.arange(0, REST)
    rotary = tl.load(x_ND + n * D + plain + rest, mask=plain + rest < D, other=0.0).to(tl.bfloat16).to(tl.int16, bitcast=True)
    tl.store(out + plain + 2 * rest, (rotary & 255).to(tl.uint8), mask=plain + rest < D)
    tl.store(out + plain + 2 * rest + 1, (rotary >> 8 & 255).to(tl.uint8), mask=plain + rest < D)
    scales, block, used = plain + 2 * (D - plain), tl.arange(0, BLOCKS), tl.cdiv(plain, BLOCK)
    tl.store(out + scales + block, exponent_b.to(tl.uint8), mask=block < used)
    tail = scales + used + tl.arange(0, TAIL)
    tl.store(out + tail, tl.zeros([TAIL], tl.uint8), mask=tail < width)


@triton.jit
def _unpack_entries(records, out_ND, M, stride_b, D, plain, width, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, REST: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    record = records + n // M * stride_b + n % M * width
    channel, rest = tl.arange(0, CHANNELS), tl.arange(0, REST)
    scale = scale_numbers(tl.load(record + plain + 2 * (D - plain) + channel // BLOCK, mask=channel < plain, other=0))
    number = fp8_numbers(tl.load(record + channel, mask=channel < plain, other=0)) * scale
    tl.store(out_ND + n * D + channel, number, mask=channel < plain)
    low = tl.load(record + plain + 2 * rest, mask=plain + rest < D, other=0).to(tl.int32)
    high = tl.load(record + plain + 2 * rest + 1, mask=plain + rest < D, other=0).to(tl.int32)
    tl.store(out_ND + n * D + plain + rest, (high << 24 | low << 16).to(tl.float32, bitcast=True), mask=plain + rest < D)


@triton.jit
def _pack_keys(x_ND, out_NW, D, width, smallest, PAIRS: tl.constexpr, BLOCKS: tl.constexpr):
    """Two FP4 codes a byte, the even channel's low; a scale for each block of `PAIRS` pairs."""
    n, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    pair_bp = block[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    even_bp = tl.load(x_ND + n * D + 2 * pair_bp, mask=2 * pair_bp < D, other=0.0).to(tl.float32)
    odd_bp = tl.load(x_ND + n * D + 2 * pair_bp + 1, mask=2 * pair_bp + 1 < D, other=0.0).to(tl.float32)
    largest_b = tl.max(tl.maximum(tl.abs(even_bp), tl.abs(odd_bp)), 1)
    exponent_b = _scale_exponent(tl.maximum(largest_b, smallest), 2, 0x400000)  # 6
    even_bp = _e2m1_code(_e2m1(_times_power(even_bp, 254 - exponent_b[:, None])))
    odd_bp = _e2m1_code(_e2m1(_times_power(odd_bp, 254 - exponent_b[:, None])))
    codes = (D + 1) // 2
    tl.store(out_NW + n * width + pair_bp, (even_bp | odd_bp << 4).to(tl.uint8), mask=pair_bp < codes)
    tl.store(out_NW + n * width + codes + block, exponent_b.to(tl.uint8), mask=codes + block < width)


@triton.jit
def _unpack_keys(records, out_ND, M, stride_b, D, width, PAIRS: tl.constexpr, TILE_P: tl.constexpr):
    n, pair = tl.program_id(0).to(tl.int64), tl.arange(0, TILE_P)
    record = records + n // M * stride_b + n % M * width
    code = tl.load(record + pair, mask=2 * pair < D, other=0)
    scale = scale_numbers(tl.load(record + (D + 1) // 2 + pair // PAIRS, mask=2 * pair < D, other=0))
    tl.store(out_ND + n * D + 2 * pair, fp4_numbers(code & 15) * scale, mask=2 * pair < D)
    tl.store(out_ND + n * D + 2 * pair + 1, fp4_numbers(code >> 4 & 15) * scale, mask=2 * pair + 1 < D)


@triton.jit
def _turn_and_round(x_NC, out_NC, N, root, smallest, STAGES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE_N: tl.constexpr):
    """Rows of C = 2^STAGES numbers times the Hadamard matrix, sums and differences of pairs as the definition takes them; then MXFP4."""
    n, c = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N), tl.arange(0, C)
    x_nc = tl.load(x_NC + n[:, None] * C + c[None, :], mask=n[:, None] < N, other=0.0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        one, other = tl.split(tl.permute(tl.reshape(x_nc, [TILE_N * (C >> (stage + 1)), 2, 1 << stage]), [0, 2, 1]))
        x_nc = tl.reshape(tl.permute(tl.join(one + other, one - other), [0, 2, 1]), [TILE_N, C])
    x_nc = (x_nc * root).to(out_NC.dtype.element_ty).to(tl.float32)
    x_bc = tl.reshape(x_nc, [TILE_N * (C // BLOCK), BLOCK])
    exponent_b = _scale_exponent(tl.maximum(tl.max(tl.abs(x_bc), 1), smallest), 2, 0x400000)  # 6
    x_bc = _times_power(_e2m1(_times_power(x_bc, 254 - exponent_b[:, None])), exponent_b[:, None])
    tl.store(out_NC + n[:, None] * C + c[None, :], tl.reshape(x_bc, [TILE_N, C]), mask=n[:, None] < N)


def _fp8(x: Tensor, plain: int, block: int) -> Tensor:
    """x [..., D] with its first `plain` channels in FP8."""
    x, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _round_fp8[x.numel() // D,](x, out, D, plain, SMALLEST_ACTIVATION, block, power_of_two(triton.cdiv(plain, block)),
                                power_of_two(max(1, D - plain)), num_warps=8 if D >= _WIDE else 4)
    return out


@round_inputs.register(NAME, supports=lambda x: x.numel() > 0 and runs(x))
def round_inputs_triton(x: Tensor) -> Tensor:
    """`round_inputs` of x [..., C]."""
    return _fp8(x, x.shape[-1], ACTIVATION_BLOCK)


@round_entries.register(NAME, supports=lambda kv, rotary_channels: kv.numel() > 0 and kv.shape[-1] > rotary_channels and runs(kv))
def round_entries_triton(kv: Tensor, rotary_channels: int) -> Tensor:
    """`round_entries` of kv [..., D]."""
    return _fp8(kv, kv.shape[-1] - rotary_channels, ENTRY_BLOCK)


def _turned(x: Tensor) -> int:
    """Channels of x [..., D] that are turned together: the largest power of two in D."""
    return x.shape[-1] & -x.shape[-1]


@round_index.register(NAME, supports=lambda x: x.numel() > 0 and _turned(x) >= FP4_BLOCK and runs(x))
def round_index_triton(x: Tensor) -> Tensor:
    """`round_index` of x [..., D], D a multiple of 32."""
    x, C = x.contiguous(), _turned(x)
    N, rows, out = x.numel() // C, max(1, _TILE // C), torch.empty_like(x)
    _turn_and_round[triton.cdiv(N, rows),](x, out, N, C**-0.5, _SMALLEST_FP4, C.bit_length() - 1, C, FP4_BLOCK, rows)
    return out


def _released(record: PlainRecord) -> bool:
    """Whether a record is one of the release's, with channels to round."""
    return type(record) is KeyRecord or type(record) is EntryRecord and record.plain > 0


@pack.register(NAME, supports=lambda x, record: _released(record) and x.numel() > 0 and runs(x))
def pack_triton(x: Tensor, record: EntryRecord | KeyRecord) -> Tensor:
    """`pack` for records in the bytes of the release."""
    x, D = x.contiguous(), record.channels
    out, N = x.new_empty(*x.shape[:-1], record.width, dtype=torch.uint8), x.numel() // D
    if type(record) is EntryRecord:
        _pack_entries[N,](x, out, D, record.plain, record.width, SMALLEST_ACTIVATION, ENTRY_BLOCK, power_of_two(record.blocks),
                          power_of_two(max(1, record.rotary)), 8)
    else:
        _pack_keys[N,](x, out, D, record.width, _SMALLEST_FP4, FP4_BLOCK // 2, power_of_two(triton.cdiv(D, FP4_BLOCK)))
    return out


@unpack.register(NAME, supports=lambda records, record: (
    _released(record) and record.unpacked in DTYPES and records.numel() > 0 and here(records)))
def unpack_triton(records: Tensor, record: EntryRecord | KeyRecord) -> Tensor:
    """`unpack` [..., width] -> [..., D] for records in the bytes of the release; rows of a [B, M, width] may lie apart."""
    if records.dim() != 3 or records.stride()[1:] != (record.width, 1):
        records = records.contiguous()
    M, stride_b = (records.shape[1], records.stride(0)) if records.dim() == 3 else (1, record.width)
    out, D = records.new_empty(*records.shape[:-1], record.channels, dtype=record.unpacked), record.channels
    N = out.numel() // D
    if type(record) is EntryRecord:
        _unpack_entries[N,](records, out, M, stride_b, D, record.plain, record.width, ENTRY_BLOCK, power_of_two(record.plain),
                            power_of_two(max(1, record.rotary)))
    else:
        _unpack_keys[N,](records, out, M, stride_b, D, record.width, FP4_BLOCK // 2, power_of_two(triton.cdiv(D, 2)))
    return out
