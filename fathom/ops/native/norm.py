"""RMS normalisation of a few rows in one call."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, ready, runs
from fathom.ops.norm import rms_normalise

_NUMBERS = 1 << 17


def _supports(x: Tensor, eps: float, weight: Tensor | None = None) -> bool:
    return 0 < x.numel() <= _NUMBERS and (runs(x) if weight is None else runs(x, weight))


@rms_normalise.register("native", supports=_supports)
def rms_normalise_native(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """`rms_normalise` for few numbers."""
    x_ND, D, weight = ready(x), x.shape[-1], None if weight is None else ready(weight)
    out_ND = torch.empty(x.shape)
    library().fathom_rms_normalise(x_ND.data_ptr(), None if weight is None else weight.data_ptr(), x.numel() // D, D, eps, out_ND.data_ptr())
    return out_ND.to(x.dtype)
