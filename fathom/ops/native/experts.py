"""Routed experts for a few pairs of token and expert, plain or packed: an expert's three matrices are read once for all its tokens."""

import torch
from torch import Tensor

from fathom.ops.experts import routed_experts, swiglu_expert
from fathom.ops.linear import Layer, Matrix
from fathom.ops.native.library import ROUNDS, kind_of, known, library, places, plain, projects, reads, ready, runs, threads, used
from fathom.ops.native.linear import most_rows
from fathom.ops.rounding import EXACT, Rounding

_PAIRS, _SHARE = 512, 16  # pairs, and pairs for each expert there is: above either, products of many rows are faster


def _supports(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
              rounding: Rounding = EXACT) -> bool:
    E, F, W = gate_EFW.shape
    return ((*up_EFW.shape, *down_EWF.shape, x_NW.shape[1]) == (E, F, W, E, W, F, W) and expert_NK.shape == weight_NK.shape
            and 0 < expert_NK.numel() <= min(_PAIRS, _SHARE * E)
            and known(rounding) and runs(x_NW, weight_NK) and reads(gate_EFW, up_EFW, down_EWF))


@routed_experts.register("native", supports=_supports)
def routed_experts_native(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
                          rounding: Rounding = EXACT) -> Tensor:
    """`routed_experts` for few pairs; sums in float32 whatever the dtypes."""
    (N, K), (E, F, W), kind = expert_NK.shape, gate_EFW.shape, kind_of(gate_EFW)
    x, weight_NK, expert_NK = ready(x_NW), ready(weight_NK), expert_NK.contiguous()
    order_P, own_PW, hidden_PF = torch.empty(N * K, dtype=torch.int64), torch.empty(N * K, W), torch.empty(N * K, F)
    unknown = library().fathom_experts_in(
        x.data_ptr(), expert_NK.data_ptr(), weight_NK.data_ptr(), *places(gate_EFW), *places(up_EFW), kind if rounding is EXACT else kind | ROUNDS, x_NW.dtype is torch.bfloat16, N, K,
        E, F, W, limit, order_P.data_ptr(), own_PW.data_ptr(), hidden_PF.data_ptr(), threads(F * W))
    if unknown:
        raise IndexError(f"an expert is none of the {E}: {sorted(set(expert_NK.flatten().tolist()))}")
    own_PF, part_PW, out_NW = torch.empty_like(hidden_PF), torch.empty(N * K, W), torch.empty(N, W)
    library().fathom_experts_out(
        hidden_PF.data_ptr(), expert_NK.data_ptr(), order_P.data_ptr(), *places(down_EWF), kind, N, K, F, W, own_PF.data_ptr(), part_PW.data_ptr(),
        out_NW.data_ptr(), threads(F * W))
    return out_NW


def _one(x: Tensor, gate: Layer, up: Layer, down: Layer, limit: float) -> bool:
    if (layers := plain(gate, up, down)) is None:
        return False
    F, W = layers[0].matrix.shape
    return (x.shape[-1] == W and layers[1].matrix.shape == (F, W) and layers[2].matrix.shape == (W, F)
            and 0 < x.numel() <= most_rows(layers[0].matrix) * W and projects(x, *layers))


@swiglu_expert.register("native", supports=_one)
def swiglu_expert_native(x: Tensor, gate: Layer, up: Layer, down: Layer, limit: float) -> Tensor:
    """`swiglu_expert` for few tokens."""
    gates, ups, downs = plain(gate, up, down)
    (F, W), x = gates.matrix.shape, x.contiguous()
    out = torch.empty_like(x)
    library().fathom_swiglu_expert(x.data_ptr(), x.dtype is torch.bfloat16, *used(gates), *used(ups), *used(downs), x.numel() // W, W, F, limit,
                                   out.data_ptr(), torch.get_num_threads())
    return out
