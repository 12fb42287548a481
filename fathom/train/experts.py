"""Expert parallelism: each rank keeps a part of the experts; tokens travel to their experts and back (report 3.1, without its waves).

The model calls its `Experts` as ever; `ShardedExperts` takes that place from outside and answers with the same sums.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fathom import ops
from fathom.model.moe import Experts
from fathom.train.ranks import Group


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: the first sent[0] to rank 0 of the group, and so on. Gradients go back the same way."""

    @staticmethod
    def forward(ctx, x_PW: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x_PW, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_QW: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad_QW, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x_PW: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out_QW = x_PW.new_empty(sum(received), *x_PW.shape[1:])
    dist.all_to_all_single(out_QW, x_PW.contiguous(), received, sent, group=group)
    return out_QW


class ShardedExperts(Experts):
    """One rank's part of the experts, numbers begin to begin + E of all; takes the place of `experts`, all of them."""

    def __init__(self, experts: Experts, index: int, ranks: int, group: Group):
        nn.Module.__init__(self)
        self.group, self.ranks = group, ranks
        E = len(experts.gate) // ranks
        for name in ("gate", "up", "down"):
            part = getattr(experts, name).detach()[index * E:(index + 1) * E].clone()
            setattr(self, name, nn.Parameter(part))
            self.register_buffer(f"{name}_scale", None)

    def forward(self, x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, limit: float) -> Tensor:
        """The weighted sum of each token's K experts [N, W] in float32, wherever they are."""
        (N, K), E = expert_NK.shape, len(self.gate)
        order_P = expert_NK.flatten().argsort(stable=True)  # P = N K pairs of token and expert, by expert and so by rank
        out_RE = expert_NK.flatten().bincount(minlength=self.ranks * E).view(self.ranks, E)
        in_RE = torch.empty_like(out_RE)
        dist.all_to_all_single(in_RE, out_RE, group=self.group)
        sent, received = out_RE.sum(1).tolist(), in_RE.sum(1).tolist()
        x_QW = _Exchange.apply(x_NW.index_select(0, order_P // K), sent, received, self.group)
        weight_Q1 = _Exchange.apply(weight_NK.flatten()[order_P, None], sent, received, self.group)
        expert_Q1 = torch.arange(E, device=in_RE.device).repeat(self.ranks).repeat_interleave(in_RE.flatten())[:, None]
        if not len(x_QW):  # a row that counts for nothing, so that the graph is the same on every rank
            x_QW, weight_Q1, expert_Q1 = (torch.cat([x, x.new_zeros(1, x.shape[1])]) for x in (x_QW, weight_Q1, expert_Q1))
        out_QW = ops.routed_experts(x_QW, expert_Q1, weight_Q1, *self.matrices(), limit, self.rounding)[:sum(received)]
        out_PW = _Exchange.apply(out_QW, received, sent, self.group)
        back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(N * K, device=order_P.device))
        return out_PW.index_select(0, back_P).unflatten(0, (N, K)).sum(1)
