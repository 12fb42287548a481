"""SwiGLU experts with clamps, alone and grouped over routed tokens (report 2.1; clamps: 4.2.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.ops.precision import wide


@op
def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), [..., F] -> [..., F] in float32."""
    return F.silu(wide(gate).clamp(max=limit)) * wide(up).clamp(-limit, limit)


@op
def routed_experts(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Tensor, up_EFW: Tensor,
                   down_EWF: Tensor, limit: float) -> Tensor:
    """Sum over each token's K experts of down(weight * swiglu(gate x, up x)) -> [N, W] in float32.

    The routing weight multiplies the activation before the down projection, as released.
    """
    N, K = expert_NK.shape
    order_P = expert_NK.flatten().argsort(stable=True)  # P = N K pairs of token and expert, sorted by expert
    sizes = expert_NK.flatten().bincount(minlength=gate_EFW.shape[0]).tolist()
    x_PW, weight_P1 = x_NW.index_select(0, order_P // K), weight_NK.flatten()[order_P, None]
    outputs = []
    for x_nW, weight_n1, gate_FW, up_FW, down_WF in zip(
            x_PW.split(sizes), weight_P1.split(sizes), gate_EFW.unbind(), up_EFW.unbind(), down_EWF.unbind(), strict=True):
        if len(x_nW):
            hidden_nF = clamped_swiglu(F.linear(x_nW, gate_FW), F.linear(x_nW, up_FW), limit)
            outputs.append(wide(F.linear((hidden_nF * weight_n1).to(x_nW.dtype), down_WF)))
    back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(N * K, device=order_P.device))
    return torch.cat(outputs).index_select(0, back_P).unflatten(0, (N, K)).sum(1)
