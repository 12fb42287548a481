"""CSA's overlapping blocks, each pooling the block before it too, against blocks alone (report 2.3.1)."""

import torch
from torch import Tensor

from fathom import ops
from fathom.lab.experiment import Experiment, Variant, lower, swapped

_overlapping = ops.pool_blocks


def alone(value_BJC: Tensor, score_BJC: Tensor, current_NR: Tensor, previous_NR: Tensor | None, has_previous_N: Tensor | None) -> Tensor:
    """As `ops.pool_blocks`, as if no block had one before it -> [N, D]."""
    none_N = None if has_previous_N is None else torch.zeros_like(has_previous_N)
    return _overlapping(value_BJC, score_BJC, current_NR, previous_NR, none_N)


EXPERIMENT = Experiment(
    "overlap", "Entries that also pool the block before theirs are better than disjoint ones.", "report 2.3.1",
    "Bits per byte with overlap are below those without by more than the noise.",
    (Variant("overlap"), Variant("disjoint", swap=lambda: swapped((ops, "pool_blocks", alone)))),
    lambda numbers: lower(numbers, "overlap", "disjoint"))
