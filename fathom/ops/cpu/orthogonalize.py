"""Newton-Schulz on CPU (report 2.4, Algorithm 1): a few matrices at a time, whose iterates stay in cache and are written over each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.ops.orthogonalize import HYBRID, normalised, orthogonalize

_NUMBERS = 1 << 20  # of the matrices of one group; at 256 x 512 these are 8 matrices, 2 MB in bfloat16


@orthogonalize.register("cpu", supports=lambda matrices_BNM, *_, **__: matrices_BNM.device.type == "cpu" and matrices_BNM.numel() > 0)
def orthogonalize_cpu(matrices_BNM: Tensor, steps: Sequence[tuple[float, float, float]] = HYBRID,
                      dtype: torch.dtype | None = None) -> Tensor:
    """`orthogonalize`, group by group."""
    tall = matrices_BNM.shape[-2] > matrices_BNM.shape[-1]
    wide_BNM = matrices_BNM.mT if tall else matrices_BNM
    out_BNM = torch.empty(wide_BNM.shape, dtype=torch.promote_types(matrices_BNM.dtype, torch.float32))
    for group, out in zip(*(x.split(max(1, _NUMBERS // matrices_BNM[0].numel())) for x in (wide_BNM, out_BNM)), strict=True):
        X = normalised(group)
        X = X.contiguous() if dtype is None else X.to(dtype, memory_format=torch.contiguous_format)
        other, gram, inner = torch.empty_like(X), X.new_empty(*X.shape[:2], X.shape[1]), X.new_empty(*X.shape[:2], X.shape[1])
        for a, b, c in steps:
            torch.bmm(X, X.mT, out=gram)
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=inner)
            torch.baddbmm(X, inner, X, beta=a, out=other)
            X, other = other, X
        out.copy_(X)
    return out_BNM.mT if tall else out_BNM
