"""SwiGLU experts with clamps, alone and grouped over routed tokens (report 2.1; clamps: 4.2.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import composed, op, product
from fathom.ops.linear import Layer, Matrix, linear
from fathom.ops.precision import wide
from fathom.ops.rounding import EXACT, Rounding


@op
def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), [..., F] -> [..., F] in float32."""
    return F.silu(wide(gate).clamp(max=limit)) * wide(up).clamp(-limit, limit)


@composed
def swiglu_expert(x: Tensor, gate: Layer, up: Layer, down: Layer, limit: float) -> Tensor:
    """One expert for every token, x [..., W] -> [..., W]."""
    return down(clamped_swiglu(gate(x), up(x), limit).to(x.dtype))


@product(0, 3, 4, 5)
def routed_experts(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix,
                   down_EWF: Matrix, limit: float, rounding: Rounding = EXACT) -> Tensor:
    """Sum over each token's K experts of down(weight * swiglu(gate x, up x)) -> [N, W] in float32.

    The routing weight multiplies the activation before the down projection, as released. `rounding` rounds the inputs of all
    three products.
    """
    N, K = expert_NK.shape
    order_P = expert_NK.flatten().argsort(stable=True)  # P = N K pairs of token and expert, sorted by expert
    sizes = expert_NK.flatten().bincount(minlength=gate_EFW.shape[0]).tolist()
    x_PW, weight_P1 = rounding.inputs(x_NW).index_select(0, order_P // K), weight_NK.flatten()[order_P, None]
    outputs = []
    for expert, (x_nW, weight_n1) in enumerate(zip(x_PW.split(sizes), weight_P1.split(sizes), strict=True)):
        if len(x_nW):
            hidden_nF = clamped_swiglu(linear(x_nW, gate_EFW[expert]), linear(x_nW, up_EFW[expert]), limit)
            hidden_nF = rounding.inputs((hidden_nF * weight_n1).to(x_nW.dtype))
            outputs.append(wide(linear(hidden_nF, down_EWF[expert])))
    back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(N * K, device=order_P.device))
    return torch.cat(outputs).index_select(0, back_P).unflatten(0, (N, K)).sum(1)
