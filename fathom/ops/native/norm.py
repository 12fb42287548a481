"""RMS normalisation in one pass, in the dtype that the numbers have, where torch makes seven."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, ready, runs, threads
from fathom.ops.norm import rms_normalise


def _supports(x: Tensor, eps: float, weight: Tensor | None = None) -> bool:
    return x.numel() > 0 and (runs(x) if weight is None else weight.shape == x.shape[-1:] and runs(x, weight))


@rms_normalise.register("native", supports=_supports)
def rms_normalise_native(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """`rms_normalise` without gradients."""
    x, D, weight = x.contiguous(), x.shape[-1], None if weight is None else ready(weight)
    out = torch.empty_like(x)
    library().fathom_rms_normalise(x.data_ptr(), x.dtype is torch.bfloat16, None if weight is None else weight.data_ptr(), x.numel() // D, D, eps,
                                   out.data_ptr(), threads(x.numel()))
    return out
