"""Hybrid Newton-Schulz (report 2.4, Algorithm 1): the nearest matrix whose singular values are all 1.

Eight steep steps lift every singular value to about 1, two flat ones settle it there. Knows no optimiser.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.ops.precision import wide

HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2  # (a, b, c) of each step
_PLAIN = 1e-12, 1e12  # norms between these are the same from squares in float32, which take a fortieth of the time


@op
def orthogonalize(matrices_BNM: Tensor, steps: Sequence[tuple[float, float, float]] = HYBRID,
                  dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of each matrix's singular value decomposition, to about 1%: [B, N, M] -> [B, N, M], float32 or wider.

    X <- a X + b (X X^T) X + c (X X^T)^2 X for each (a, b, c), from X = M / ||M||_F. A zero matrix stays zero. The steps run in
    `dtype`, by default float32 or wider; bfloat16 is enough for training (report 2.4).
    """
    tall = matrices_BNM.shape[-2] > matrices_BNM.shape[-1]
    X = normalised(matrices_BNM.mT if tall else matrices_BNM)  # X X^T is then of the smaller side
    result, X = X.dtype, X if dtype is None else X.to(dtype)
    for a, b, c in steps:
        gram_BNN = X @ X.mT
        inner_BNN = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)  # b X X^T + c (X X^T)^2
        X = torch.baddbmm(X, inner_BNN, X, beta=a)
    return (X.mT if tall else X).to(result)


def normalised(matrices_BNM: Tensor) -> Tensor:
    """Matrices [B, N, M] over their Frobenius norms, in float32 or wider."""
    X = wide(matrices_BNM)
    norm_B11 = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    if X.device.type != "cpu" or not ((norm_B11 > _PLAIN[0]) & (norm_B11 < _PLAIN[1])).all():
        # The squares of gradients around 1e-20 need the exponents of float64.
        norm_B11 = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return X / norm_B11.clamp(min=torch.finfo(X.dtype).tiny).to(X.dtype)
