"""Records of the released formats, packed and unpacked in one pass where torch makes ten, and converts float8 number by number."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, runs, threads
from fathom.ops.records import pack, unpack
from fathom.quant.records import EntryRecord, KeyRecord, PlainRecord

_NUMBERS = (torch.float32, torch.bfloat16)


def _unpacks(records: Tensor, record: PlainRecord) -> bool:
    """Whether these are rows of records side by side, for vectors that kernels write."""
    return (type(record) in (EntryRecord, KeyRecord) and records.dim() == 3 and records.numel() > 0 and records.shape[2] == record.width
            and type(records) is Tensor and records.is_cpu and records.stride()[1:] == (record.width, 1) and record.unpacked in _NUMBERS
            and not torch.is_grad_enabled() and library() is not None)


@pack.register("native", supports=lambda x, record: type(record) in (EntryRecord, KeyRecord) and x.numel() > 0 and x.shape[-1] == record.channels and runs(x))
def pack_native(x: Tensor, record: EntryRecord | KeyRecord) -> Tensor:
    """`pack` for records in the bytes of the release."""
    x, D, bf16 = x.contiguous(), record.channels, x.dtype is torch.bfloat16
    out = torch.empty(*x.shape[:-1], record.width, dtype=torch.uint8)
    if type(record) is EntryRecord:
        library().fathom_pack_entries(x.data_ptr(), bf16, x.numel() // D, D, record.rotary, record.width, out.data_ptr())
    else:
        library().fathom_pack_keys(x.data_ptr(), bf16, x.numel() // D, D, record.width, out.data_ptr())
    return out


@unpack.register("native", supports=_unpacks)
def unpack_native(records: Tensor, record: EntryRecord | KeyRecord) -> Tensor:
    """`unpack` [B, M, width] -> [B, M, D] for records in the bytes of the release."""
    (B, M, width), D, bf16 = records.shape, record.channels, record.unpacked is torch.bfloat16
    out = torch.empty(B, M, D, dtype=record.unpacked)
    ahead, behind = (records.data_ptr(), B, M, records.stride(0), D), (width, bf16, out.data_ptr(), threads(out.numel()))
    if type(record) is EntryRecord:
        library().fathom_unpack_entries(*ahead, record.rotary, *behind)
    else:
        library().fathom_unpack_keys(*ahead, *behind)
    return out
