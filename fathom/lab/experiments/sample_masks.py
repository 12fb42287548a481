"""Packed documents that see only themselves against rows in which everything is seen (report 4.1)."""

from dataclasses import replace

import torch

from fathom.data.packing import Batch, PackedData
from fathom.lab.experiment import Experiment, Variant, lower, swapped
from fathom.train import pretrain


# Pieces of 256 bytes, of which so many are held out that few neighbours are left to join.
SHORT = ("data.piece_bytes=256", "data.held_out=0.4")


class OneDocument(PackedData):
    """Rows whose positions never restart: no mask between documents."""

    def rows(self, first: int, count: int) -> Batch:
        """As the other's [B, S], each row one document."""
        batch = super().rows(first, count)
        return replace(batch, positions_BS=torch.arange(batch.tokens_BS.shape[1]).expand_as(batch.tokens_BS).contiguous())


EXPERIMENT = Experiment(
    "sample-masks", "Masking packed documents from each other is better than letting them see each other.", "report 4.1",
    "Bits per byte of documents alone are lower by more than the noise where training masked documents from each other. Documents are cut to a "
    "few hundred bytes, so that rows hold many.",
    (Variant("masked", SHORT),
     Variant("unmasked", SHORT, swap=lambda: swapped((pretrain, "PackedData", OneDocument)))),
    lambda numbers: lower(numbers, "masked", "unmasked"))
