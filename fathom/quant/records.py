"""How one cached vector lies in memory: plainly, or in the bytes of the release (report 2.3.4).

An entry's record: its plain channels in FP8, its rotary channels in BF16, one scale byte for each 64 plain channels, filled up to
a multiple of eight (448 + 128 + 8 = 584 bytes for 512 channels). An index key's: two FP4 codes a byte, one scale byte for each 32
(64 + 4 = 68 bytes for 128 channels).
"""

import torch
from torch import Tensor

from fathom.quant.formats import (
    E4M3,
    E8M0,
    ENTRY_BLOCK,
    FP4_BLOCK,
    Packed,
    dequantise,
    fp8_blocks,
    quantise_fp4,
)


class PlainRecord:
    """`channels` numbers of one dtype."""

    def __init__(self, channels: int, dtype: torch.dtype):
        self.width, self.dtype = channels, dtype

    def pack(self, x: Tensor) -> Tensor:
        """Vectors [..., D] as records [..., width]."""
        return x.to(self.dtype)

    def unpack(self, records: Tensor) -> Tensor:
        """Records [..., width] as vectors [..., D]."""
        return records


class EntryRecord(PlainRecord):
    """An FP8 entry with BF16 rotary channels; `dtype` is what it unpacks to."""

    def __init__(self, channels: int, rotary_channels: int, dtype: torch.dtype):
        self.channels, self.plain, self.rotary, self.unpacked = channels, channels - rotary_channels, rotary_channels, dtype
        self.blocks = -(-self.plain // ENTRY_BLOCK)
        self.width, self.dtype = entry_bytes(channels, rotary_channels), torch.uint8

    def pack(self, x: Tensor) -> Tensor:
        """Entries [..., D] as bytes [..., width]; rounding is idempotent, so rounded entries are kept exactly."""
        plain, rotary = x.split([self.plain, self.rotary], -1)
        codes, scale = fp8_blocks(plain, ENTRY_BLOCK)
        used = self.plain + 2 * self.rotary + self.blocks
        return torch.cat([codes.flatten(-2)[..., :self.plain].view(torch.uint8),
                          rotary.to(torch.bfloat16).contiguous().view(torch.uint8), scale.to(E8M0).view(torch.uint8),
                          torch.zeros(*x.shape[:-1], self.width - used, dtype=torch.uint8, device=x.device)], -1)

    def unpack(self, records: Tensor) -> Tensor:
        """Bytes [..., width] as entries [..., D]."""
        codes, rotary, scale, _ = records.split(
            [self.plain, 2 * self.rotary, self.blocks, self.width - self.plain - 2 * self.rotary - self.blocks], -1)
        scale = scale.contiguous().view(E8M0).float().repeat_interleave(ENTRY_BLOCK, -1)[..., :self.plain]
        plain = codes.contiguous().view(E4M3).float() * scale
        return torch.cat([plain.to(self.unpacked), rotary.contiguous().view(torch.bfloat16).to(self.unpacked)], -1)


class KeyRecord(PlainRecord):
    """An MXFP4 index key; `dtype` is what it unpacks to."""

    def __init__(self, channels: int, dtype: torch.dtype):
        self.codes, self.unpacked = -(-channels // 2), dtype
        self.channels, self.width, self.dtype = channels, key_bytes(channels), torch.uint8

    def pack(self, x: Tensor) -> Tensor:
        """Keys [..., D] as bytes [..., width]."""
        packed = quantise_fp4(torch.nn.functional.pad(x, (0, x.shape[-1] % 2)))
        return torch.cat([packed.codes.view(torch.uint8), packed.scale.view(torch.uint8)], -1)

    def unpack(self, records: Tensor) -> Tensor:
        """Bytes [..., width] as keys [..., D]."""
        codes, scale = records.split([self.codes, self.width - self.codes], -1)
        packed = Packed(codes.contiguous().view(torch.int8), scale.contiguous().view(E8M0))
        return dequantise(packed, self.unpacked)[..., :self.channels]


def entry_bytes(channels: int, rotary_channels: int) -> int:
    """Bytes of one entry's record: 584 for 512 channels of which 64 are rotary."""
    plain = channels - rotary_channels
    return plain + 2 * rotary_channels + -(-plain // ENTRY_BLOCK // 8) * 8


def key_bytes(channels: int) -> int:
    """Bytes of one index key's record: 68 for 128 channels."""
    return -(-channels // 2) + -(-channels // FP4_BLOCK)
