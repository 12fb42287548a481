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
def expert_hidden(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float, dtype: torch.dtype) -> Tensor:
    """What an expert's down projection reads [..., F], in `dtype`: the activation, times a weight [..., 1] if given."""
    hidden = clamped_swiglu(gate, up, limit)
    return (hidden if weight is None else hidden * weight).to(dtype)


@op
def expert_hidden_gradients(gate_PF: Tensor, up_PF: Tensor, weight_P1: Tensor, grad_PF: Tensor, limit: float) -> tuple[Tensor, ...]:
    """`expert_hidden` [P, F] again and, from its gradient, those of gate and up [P, F], all in their dtype, and of the weights [P] in float32."""
    gate, up, grad = (wide(x) for x in (gate_PF, up_PF, grad_PF))
    bounded, silu = up.clamp(-limit, limit), gate.clamp(max=limit)
    sigmoid = silu.sigmoid()
    plain = silu.mul_(sigmoid) * bounded
    weight_grad_P, weighted_grad = (grad * plain).sum(-1), grad * weight_P1
    # d silu = sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid); nothing passes a clamp that acts.
    slope = torch.rsub(sigmoid, 1).mul_(silu).add_(sigmoid)
    gate_grad = slope.mul_(bounded).mul_(weighted_grad).masked_fill_(gate > limit, 0)
    up_grad = silu.mul_(weighted_grad).masked_fill_(up.abs() > limit, 0)
    return *(x.to(gate_PF.dtype) for x in (plain.mul_(weight_P1), gate_grad, up_grad)), weight_grad_P


@op
def sum_rows(y_PW: Tensor, place_NK: Tensor) -> Tensor:
    """Sums [N, W] in float32 or wider of those K rows each that stand in these places, always in the same order."""
    return wide(y_PW.index_select(0, place_NK.flatten())).unflatten(0, place_NK.shape).sum(1)


@composed
def swiglu_expert(x: Tensor, gate: Layer, up: Layer, down: Layer, limit: float) -> Tensor:
    """One expert for every token, x [..., W] -> [..., W]."""
    return down(expert_hidden(gate(x), up(x), None, limit, x.dtype))


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
            hidden_nF = expert_hidden(linear(x_nW, gate_EFW[expert]), linear(x_nW, up_EFW[expert]), weight_n1, limit, x_nW.dtype)
            outputs.append(wide(linear(rounding.inputs(hidden_nF), down_EWF[expert])))
    back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(N * K, device=order_P.device))
    return sum_rows(torch.cat(outputs), back_P.view(N, K))
