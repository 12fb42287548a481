"""Newton-Schulz (report 2.4, Algorithm 1): a thread takes a matrix through all steps, and computes half of what is symmetric.

Of matrices that are wider than high several steps are made at once, on X X^T alone. What rounding adds to it grows twelvefold a step where
X has next to nothing, and from about 1 on without bound, so X X^T is computed anew in time: after two steps in bfloat16, four in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.ops.native.library import library
from fathom.ops.native.tiles import in_tiles
from fathom.ops.orthogonalize import HYBRID, normalised, orthogonalize

_ROOM = 1 << 26  # words that a thread's space may have: matrices of 4,096 x 4,096 in bfloat16
_TOGETHER = {torch.float32: 4, torch.bfloat16: 2}  # steps, at most
_NUMBERS = 1 << 22  # of the matrices of a group, which exists in float32 beside the result


def _words(matrices_BNM: Tensor, dtype: torch.dtype) -> int:
    """Of a thread's space, for matrices [B, N, M] whose steps run in this dtype."""
    N, M = sorted(-(-length // 16) * 16 for length in matrices_BNM.shape[1:])
    return (4 * N * N + N * M + max(2 * N * N, N * M)) // (2 if dtype is torch.bfloat16 else 1) + 64


def _supports(matrices_BNM: Tensor, steps: Sequence[tuple[float, float, float]] = HYBRID, dtype: torch.dtype | None = None) -> bool:
    dtype = dtype or torch.promote_types(matrices_BNM.dtype, torch.float32)
    even = dtype is not torch.bfloat16 or all(length % 2 == 0 for length in matrices_BNM.shape[1:])
    return (matrices_BNM.is_cpu and matrices_BNM.numel() > 0 and even and in_tiles(dtype) and len(matrices_BNM) >= torch.get_num_threads()
            and _words(matrices_BNM, dtype) <= _ROOM)


@orthogonalize.register("native", supports=_supports)
def orthogonalize_native(matrices_BNM: Tensor, steps: Sequence[tuple[float, float, float]] = HYBRID, dtype: torch.dtype | None = None) -> Tensor:
    """`orthogonalize` of enough matrices for all threads; sums in float32, what is between products in the steps' dtype."""
    tall, threads = matrices_BNM.shape[1] > matrices_BNM.shape[2], torch.get_num_threads()
    wide_BNM = matrices_BNM.mT if tall else matrices_BNM
    out_BNM = torch.empty(wide_BNM.shape, dtype=torch.promote_types(matrices_BNM.dtype, torch.float32))
    dtype, coefficients = dtype or out_BNM.dtype, torch.tensor(steps, dtype=torch.float32)
    room, (N, M) = _words(matrices_BNM, dtype), wide_BNM.shape[1:]
    space = torch.empty(threads, room, dtype=torch.int32)
    parts = -(-len(steps) // _TOGETHER[dtype]) if 2 * M >= 3 * N else len(steps)
    for group, out in zip(*(x.split(max(8 * threads, _NUMBERS // (N * M))) for x in (wide_BNM, out_BNM)), strict=True):
        X = normalised(group).to(dtype).contiguous()
        library().fathom_newton_schulz(X.data_ptr(), dtype is torch.bfloat16, len(X), N, M, coefficients.data_ptr(), len(steps), parts,
                                       space.data_ptr(), room, threads)
        out.copy_(X)
    return out_BNM.mT if tall else out_BNM
