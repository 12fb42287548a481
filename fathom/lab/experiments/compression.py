"""Learned, per-channel weights of a block's tokens against their mean (report 2.3.1, 2.3.2)."""

import torch
from torch import Tensor

from fathom import ops
from fathom.lab.experiment import Experiment, Variant, lower, swapped

_learned = ops.pool_blocks


def mean_pooling(value_BJC: Tensor, score_BJC: Tensor, *blocks: Tensor | None) -> Tensor:
    """As `ops.pool_blocks`, every token of a block with the same weight -> [N, D]."""
    return _learned(value_BJC, torch.zeros_like(score_BJC), *blocks)


EXPERIMENT = Experiment(
    "compression", "Entries pooled with learned weights per channel are better than means.", "report 2.3.1, eq. 9-12",
    "Bits per byte with learned weights are below those with means by more than the noise.",
    (Variant("learned"), Variant("mean", swap=lambda: swapped((ops, "pool_blocks", mean_pooling)))),
    lambda numbers: lower(numbers, "learned", "mean"))
