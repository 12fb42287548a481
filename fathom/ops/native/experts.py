"""Routed experts for a few pairs of token and expert: an expert's three matrices are read once for all its tokens."""

import torch
from torch import Tensor

from fathom.ops.experts import routed_experts
from fathom.ops.linear import Matrix
from fathom.ops.native.library import library, ready, runs, threads
from fathom.quant.rounding import EXACT, Rounding

_PAIRS, _SHARE = 512, 16  # pairs, and pairs for each expert there is: above either, products of many rows are faster


def _supports(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
              rounding: Rounding = EXACT) -> bool:
    matrices = gate_EFW, up_EFW, down_EWF
    return (rounding is EXACT and 0 < expert_NK.numel() <= min(_PAIRS, _SHARE * gate_EFW.shape[0]) and all(isinstance(x, Tensor) for x in matrices)
            and runs(x_NW, weight_NK, *matrices) and all(x.is_contiguous() and x.dtype is gate_EFW.dtype for x in matrices))


@routed_experts.register("native", supports=_supports)
def routed_experts_native(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Tensor, up_EFW: Tensor, down_EWF: Tensor, limit: float,
                          rounding: Rounding = EXACT) -> Tensor:
    """`routed_experts` for plain matrices; sums and activations in float32 whatever the dtypes."""
    (N, K), (E, F, W) = expert_NK.shape, gate_EFW.shape
    x_NW, weight_NK, expert_NK = ready(x_NW), ready(weight_NK), expert_NK.contiguous()
    order_P = torch.empty(N * K, dtype=torch.int64)
    own_PW, hidden_PF, part_PW, out_NW = torch.empty(N * K, W), torch.empty(N * K, F), torch.empty(N * K, W), torch.empty(N, W)
    unknown = library().fathom_experts(
        x_NW.data_ptr(), expert_NK.data_ptr(), weight_NK.data_ptr(), gate_EFW.data_ptr(), up_EFW.data_ptr(), down_EWF.data_ptr(),
        gate_EFW.dtype is torch.bfloat16, N, K, E, F, W, limit, order_P.data_ptr(), own_PW.data_ptr(), hidden_PF.data_ptr(), part_PW.data_ptr(),
        out_NW.data_ptr(), threads(F * W))
    if unknown:
        raise IndexError(f"an expert is none of the {E}: {sorted(set(expert_NK.flatten().tolist()))}")
    return out_NW
