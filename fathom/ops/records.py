"""Cached vectors packed into the records of a cache, and unpacked (report 2.3.4; fathom/quant/records.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.quant.records import KeyRecord, PlainRecord


@op
def pack(x: Tensor, record: PlainRecord) -> Tensor:
    """Vectors [..., D] as records [..., width]."""
    return record.pack(x)


@op
def unpack(records: Tensor, record: PlainRecord) -> Tensor:
    """Records [..., width] as vectors [..., D]."""
    return record.unpack(records)


class Recorded(NamedTuple):
    """Vectors [B, M, D] that still lie in their records [B, M, width]."""

    records_BMC: Tensor
    record: KeyRecord

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the vectors."""
        return *self.records_BMC.shape[:2], self.record.channels

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.record.unpacked

    def vectors(self) -> Tensor:
        """The vectors [B, M, D] themselves."""
        return unpack(self.records_BMC, self.record)
