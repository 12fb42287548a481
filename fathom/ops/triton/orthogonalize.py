"""Newton-Schulz on GPUs (report 2.4, Algorithm 1): two of a step's three products are of a matrix with its own transpose, so what lies
above their diagonal is not computed but mirrored. The third, with all of X, is torch's.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.orthogonalize import HYBRID, normalised, orthogonalize
from fathom.ops.triton.launch import DTYPES, NAME, runs

_TILES = {torch.float32: (64, 32, 4), torch.bfloat16: (128, 64, 8)}  # the side of a tile, the inputs that it reads at once, warps


@triton.jit
def _own_product(a_BNK, out_BNN, N, K, factor, own, OWN: tl.constexpr, TILE: tl.constexpr, INPUTS: tl.constexpr):
    """out = factor A A^T, a tile [i, j] on or below the diagonal; with OWN, A is symmetric and `own` times itself is added."""
    first_i, first_j, b = tl.program_id(0) * TILE, tl.program_id(1) * TILE, tl.program_id(2).to(tl.int64)
    if first_j <= first_i:
        i, j = first_i + tl.arange(0, TILE), first_j + tl.arange(0, TILE)
        a_NK, out_NN = a_BNK + b * N * K, out_BNN + b * N * N
        inside_ij = (i[:, None] < N) & (j[None, :] < N)
        product_ij = tl.zeros([TILE, TILE], tl.float32)
        for first_k in range(0, K, INPUTS):
            k = first_k + tl.arange(0, INPUTS)
            a_ik = tl.load(a_NK + i[:, None] * K + k[None, :], mask=(i[:, None] < N) & (k[None, :] < K), other=0.0)
            a_kj = tl.load(a_NK + j[None, :] * K + k[:, None], mask=(j[None, :] < N) & (k[:, None] < K), other=0.0)
            product_ij = tl.dot(a_ik, a_kj, product_ij, input_precision="ieee")
        product_ij *= factor
        if OWN:
            product_ij += own * tl.load(a_NK + i[:, None] * K + j[None, :], mask=inside_ij, other=0.0).to(tl.float32)
        result_ij = product_ij.to(out_BNN.dtype.element_ty)
        tl.store(out_NN + i[:, None] * N + j[None, :], result_ij, mask=inside_ij)
        if first_j < first_i:
            tl.store(out_NN + j[:, None] * N + i[None, :], tl.trans(result_ij), mask=tl.trans(inside_ij))


def own_product(a_BNK: Tensor, factor: float = 1.0, own: float | None = None) -> Tensor:
    """factor A A^T -> [B, N, N], and `own` A on top of it where A [B, N, N] is symmetric; sums in float32, the dtype of A."""
    (B, N, K), (tile, inputs, warps) = a_BNK.shape, _TILES[a_BNK.dtype]
    a_BNK, out_BNN = a_BNK.contiguous(), a_BNK.new_empty(B, N, N)
    tiles = triton.cdiv(N, tile)
    _own_product[tiles, tiles, B](a_BNK, out_BNN, N, K, factor, own or 0.0, OWN=own is not None, TILE=tile, INPUTS=inputs, num_warps=warps)
    return out_BNN


@orthogonalize.register(NAME, supports=lambda matrices_BNM, steps=HYBRID, dtype=None: (
    runs(matrices_BNM) and dtype in (None, *DTYPES) and matrices_BNM.numel() > 0))
def orthogonalize_triton(matrices_BNM: Tensor, steps: Sequence[tuple[float, float, float]] = HYBRID,
                         dtype: torch.dtype | None = None) -> Tensor:
    """`orthogonalize`, for float32 and bfloat16."""
    tall = matrices_BNM.shape[-2] > matrices_BNM.shape[-1]
    X = normalised(matrices_BNM.mT if tall else matrices_BNM)
    result, X = X.dtype, X.contiguous() if dtype is None else X.to(dtype, memory_format=torch.contiguous_format)
    for a, b, c in steps:
        inner_BNN = own_product(own_product(X), c, b)
        X = torch.baddbmm(X, inner_BNN, X, beta=a)
    return (X.mT if tall else X).to(result)
