"""The precision that statistics, softmaxes and mixing coefficients are computed in: float32 or wider."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` [...] in float32, or unchanged where it is float64 (gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()
