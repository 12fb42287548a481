"""Routed experts on CPU (report 2.1): tokens sorted by expert, so that each expert's matrices are read once.

Everything between the products runs once over all P = N K pairs of token and expert. The gradients are written out by hand: autograd would make
a zero matrix of all E experts for each expert that a token chose.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu.products import rounded_rows, times, times_into
from fathom.ops.experts import expert_hidden, expert_hidden_gradients, routed_experts, sum_rows
from fathom.ops.linear import Matrix
from fathom.ops.native.tiles import grouped_outer, grouped_product, suits_groups
from fathom.ops.rounding import EXACT, Rounding

_FEW_PAIRS = 64


class _Groups:
    """The pairs in the order of their experts, and products with one matrix for each expert."""

    def __init__(self, expert_NK: Tensor, experts: int):
        N, K = expert_NK.shape
        self.chosen, self.experts, self.end_E = K, experts, None
        if N * K <= _FEW_PAIRS:  # plain Python is faster than that many small operations
            expert_P = expert_NK.flatten().tolist()
            order = sorted(range(N * K), key=expert_P.__getitem__)
            begins = [place for place, pair in enumerate(order) if not place or expert_P[pair] != expert_P[order[place - 1]]]
            self.present = [(expert_P[order[begin]], begin, end) for begin, end in zip(begins, [*begins[1:], N * K], strict=True)]
            self.order_P, self.token_P = torch.tensor(order), torch.tensor([pair // K for pair in order])
        else:
            expert_P = expert_NK.flatten()
            self.order_P = expert_P.argsort(stable=True)
            self.token_P = self.order_P // K
            self.end_E = expert_P.bincount(minlength=experts).cumsum(0)
            ends = self.end_E.tolist()
            self.present = [(expert, begin, end) for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > begin]

    def times(self, x_PI: Tensor, matrix_EOI: Tensor) -> Tensor:
        """Each pair's row times its expert's transposed matrix [P, O]."""
        if self.end_E is not None and suits_groups(x_PI, matrix_EOI):
            return grouped_product(x_PI, matrix_EOI, self.end_E)
        out_PO = x_PI.new_empty(len(x_PI), matrix_EOI.shape[1])
        for expert, begin, end in self.present:  # what is written behind an expert's pairs is the next one's to overwrite
            rows = rounded_rows(x_PI, begin, end)
            times_into(x_PI[rows], matrix_EOI[expert], out_PO[rows])
        return out_PO

    def outer(self, y_PO: Tensor, x_PI: Tensor) -> Tensor:
        """Sum of y x^T over each expert's pairs [E, O, I]."""
        if self.end_E is not None and suits_groups(x_PI, y_PO[None].mT):
            return grouped_outer(y_PO, x_PI, self.end_E)
        out_EOI = x_PI.new_empty(self.experts, y_PO.shape[1], x_PI.shape[1])
        for expert in set(range(self.experts)) - {expert for expert, _, _ in self.present}:
            out_EOI[expert] = 0
        for expert, begin, end in self.present:
            times_into(y_PO[begin:end].T, x_PI[begin:end].T, out_EOI[expert])
        return out_EOI

    def sum_by_token(self, y_PW: Tensor) -> Tensor:
        """Sum of each token's pairs [N, W] in float32 or wider, always in the same order."""
        back_P = torch.empty_like(self.order_P).scatter_(
            0, self.order_P, torch.arange(len(self.order_P), device=self.order_P.device))
        return sum_rows(y_PW, back_P.view(-1, self.chosen))


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NW: Tensor, weight_NK: Tensor, gate_EFW: Tensor, up_EFW: Tensor, down_EWF: Tensor, expert_NK: Tensor,
                limit: float) -> Tensor:
        groups = _Groups(expert_NK, len(gate_EFW))
        x_PW = x_NW.index_select(0, groups.token_P)
        gate_PF, up_PF = groups.times(x_PW, gate_EFW), groups.times(x_PW, up_EFW)
        ctx.save_for_backward(x_NW, weight_NK, gate_EFW, up_EFW, down_EWF, gate_PF, up_PF)
        ctx.groups, ctx.limit = groups, limit
        hidden_PF = expert_hidden(gate_PF, up_PF, weight_NK.flatten()[groups.order_P, None], limit, x_NW.dtype)
        return groups.sum_by_token(groups.times(hidden_PF, down_EWF))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NW: Tensor) -> tuple[Tensor | None, ...]:
        x_NW, weight_NK, gate_EFW, up_EFW, down_EWF, gate_PF, up_PF = ctx.saved_tensors
        groups, limit = ctx.groups, ctx.limit
        weight_P1 = weight_NK.flatten()[groups.order_P, None]
        grad_PW = grad_NW.to(x_NW.dtype).index_select(0, groups.token_P)
        hidden_PF, gate_grad_PF, up_grad_PF, weight_grad_P = expert_hidden_gradients(
            gate_PF, up_PF, weight_P1, groups.times(grad_PW, down_EWF.mT), limit)
        down_grad_EWF = groups.outer(grad_PW, hidden_PF)
        del grad_PW, hidden_PF  # what is large goes as soon as it has served
        x_grad_PW = groups.times(gate_grad_PF, gate_EFW.mT).add_(groups.times(up_grad_PF, up_EFW.mT))
        x_grad_NW = groups.sum_by_token(x_grad_PW).to(x_NW.dtype)
        del x_grad_PW
        x_PW = x_NW.index_select(0, groups.token_P)
        weight_grad_NK = torch.empty_like(weight_NK).view(-1).index_copy_(0, groups.order_P, weight_grad_P).view_as(weight_NK)
        return (x_grad_NW, weight_grad_NK, groups.outer(gate_grad_PF, x_PW),
                groups.outer(up_grad_PF, x_PW), down_grad_EWF, None, None)


def _supports(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
              rounding: Rounding = EXACT) -> bool:
    matrices = gate_EFW, up_EFW, down_EWF
    if rounding is not EXACT or not all(isinstance(x, Tensor) and x.dtype == x_NW.dtype for x in matrices):
        return False
    weights = torch.float32 if x_NW.dtype == torch.bfloat16 else x_NW.dtype
    return (x_NW.device.type == "cpu" and len(x_NW) > 0 and x_NW.dtype in (torch.bfloat16, torch.float32, torch.float64)
            and weight_NK.dtype == weights)


@routed_experts.register("cpu", supports=_supports)
def routed_experts_cpu(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Tensor, up_EFW: Tensor, down_EWF: Tensor, limit: float,
                       rounding: Rounding = EXACT) -> Tensor:
    """`routed_experts` for plain matrices in the inputs' dtype; between products of bfloat16, float32."""
    arguments = x_NW, weight_NK, gate_EFW, up_EFW, down_EWF
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments):
        return _RoutedExperts.apply(*arguments, expert_NK, limit)
    groups = _Groups(expert_NK, len(gate_EFW))
    x_PW, weight_P1 = x_NW.index_select(0, groups.token_P), weight_NK.flatten()[groups.order_P, None]
    if len(x_PW) <= _FEW_PAIRS:
        gate_PF, up_PF = (torch.cat([times(x_PW[begin:end], matrix_EFW[expert]) for expert, begin, end in groups.present])
                          for matrix_EFW in (gate_EFW, up_EFW))
        hidden_PF = expert_hidden(gate_PF, up_PF, weight_P1, limit, x_NW.dtype)
        return groups.sum_by_token(torch.cat([times(hidden_PF[begin:end], down_EWF[expert]) for expert, begin, end in groups.present]))
    out_PW = torch.empty_like(x_PW)
    for expert, begin, end in groups.present:  # an expert's activations stay in cache
        rows = rounded_rows(x_PW, begin, end)
        gate_nF, up_nF = (times(x_PW[rows], matrix_EFW[expert]) for matrix_EFW in (gate_EFW, up_EFW))
        hidden_nF = expert_hidden(gate_nF, up_nF, weight_P1[rows], limit, x_NW.dtype)
        out_PW[begin:end] = times(hidden_nF, down_EWF[expert])[:end - begin]
    return groups.sum_by_token(out_PW)
