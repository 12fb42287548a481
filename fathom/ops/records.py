"""Cached vectors packed into the records of a cache, and unpacked (report 2.3.4; fathom/quant/records.py)."""

from torch import Tensor

from fathom.ops.dispatch import op
from fathom.quant.records import PlainRecord


@op
def pack(x: Tensor, record: PlainRecord) -> Tensor:
    """Vectors [..., D] as records [..., width]."""
    return record.pack(x)


@op
def unpack(records: Tensor, record: PlainRecord) -> Tensor:
    """Records [..., width] as vectors [..., D]."""
    return record.unpack(records)
