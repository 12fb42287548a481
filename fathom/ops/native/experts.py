"""Routed experts for a few pairs of token and expert, plain or packed: an expert's three matrices are read once for all its tokens."""

import torch
from torch import Tensor

from fathom.ops.experts import routed_experts
from fathom.ops.linear import Matrix
from fathom.ops.native.library import kind_of, library, places, reads, ready, runs, threads
from fathom.quant.rounding import EXACT, Rounding

_PAIRS, _SHARE = 512, 16  # pairs, and pairs for each expert there is: above either, products of many rows are faster


def _supports(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
              rounding: Rounding = EXACT) -> bool:
    E, F, W = gate_EFW.shape
    return ((*up_EFW.shape, *down_EWF.shape, x_NW.shape[1]) == (E, F, W, E, W, F, W) and expert_NK.shape == weight_NK.shape
            and 0 < expert_NK.numel() <= min(_PAIRS, _SHARE * E)
            and runs(x_NW, weight_NK) and reads(gate_EFW, up_EFW, down_EWF))


@routed_experts.register("native", supports=_supports)
def routed_experts_native(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
                          rounding: Rounding = EXACT) -> Tensor:
    """`routed_experts` for few pairs; sums in float32 whatever the dtypes."""
    (N, K), (E, F, W), kind = expert_NK.shape, gate_EFW.shape, kind_of(gate_EFW)
    x, weight_NK, expert_NK = ready(rounding.inputs(x_NW)), ready(weight_NK), expert_NK.contiguous()
    order_P, own_PW, hidden_PF = torch.empty(N * K, dtype=torch.int64), torch.empty(N * K, W), torch.empty(N * K, F)
    unknown = library().fathom_experts_in(
        x.data_ptr(), expert_NK.data_ptr(), weight_NK.data_ptr(), *places(gate_EFW), *places(up_EFW), kind, x_NW.dtype is torch.bfloat16, N, K,
        E, F, W, limit, order_P.data_ptr(), own_PW.data_ptr(), hidden_PF.data_ptr(), threads(F * W))
    if unknown:
        raise IndexError(f"an expert is none of the {E}: {sorted(set(expert_NK.flatten().tolist()))}")
    if rounding is not EXACT:
        hidden_PF = ready(rounding.inputs(hidden_PF.to(x_NW.dtype)))
    own_PF, part_PW, out_NW = torch.empty_like(hidden_PF), torch.empty(N * K, W), torch.empty(N, W)
    library().fathom_experts_out(
        hidden_PF.data_ptr(), expert_NK.data_ptr(), order_P.data_ptr(), *places(down_EWF), kind, N, K, F, W, own_PF.data_ptr(), part_PW.data_ptr(),
        out_NW.data_ptr(), threads(F * W))
    return out_NW
