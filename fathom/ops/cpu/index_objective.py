"""The indexer's objective on CPU (report 2.3.1): a block of queries at a time, whose gradients are made on the way.

The objective is a mean over queries, so its backward pass only scales what the forward pass found; scores of all queries never exist at once.
float32 only: anything else is left to the definition.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.attention import Entries, Window, attended_entries
from fathom.ops.cpu.attention import probabilities, supports
from fathom.ops.cpu.products import batch_times
from fathom.ops.index_objective import apply_objective, block_divergence, index_objective


class _IndexObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, attention: tuple, wants_grad: bool) -> Tensor:
        H, D = index_q_BSHD.shape[2:]
        weight_BSH = weight_BSH * (D * H) ** -0.5
        gradients = [torch.zeros_like(x) for x in (index_q_BSHD, weight_BSH, keys_BMD)] if wants_grad else []
        total, queries = torch.zeros(()), 0
        for block, _, probability_BRJ in probabilities(*attention):
            near, count = block.places.stop - block.places.start, block.slots.stop - block.slots.start
            if not count:
                continue
            q_BCHD, weight_BCH, keys_BmD = index_q_BSHD[:, block.queries], weight_BSH[:, block.queries], keys_BMD[:, block.slots]
            product_BCHM = batch_times(q_BCHD.flatten(1, 2), keys_BmD).relu_().unflatten(1, (-1, H))
            divergence_BC, reads_BC, *found = block_divergence(
                probability_BRJ, near, product_BCHM, weight_BCH, attended_entries(attention[2].part(block.queries, block.slots)), wants_grad)
            total += divergence_BC.sum()
            queries += int(reads_BC.sum())
            if wants_grad:
                product_grad_BRM = found[0].flatten(1, 2)
                gradients[0][:, block.queries] = batch_times(product_grad_BRM, keys_BmD.mT).view_as(q_BCHD)
                gradients[1][:, block.queries] = found[1]
                gradients[2][:, block.slots] += batch_times(product_grad_BRM.mT, q_BCHD.flatten(1, 2).mT)
        queries = max(queries, 1)
        if wants_grad:
            gradients[1].mul_((D * H) ** -0.5)
            ctx.save_for_backward(*(x.div_(queries) for x in gradients))
        return total / queries

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(x * grad for x in ctx.saved_tensors), None, None


def _supports(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
              sink_H: Tensor) -> bool:
    tensors = index_q_BSHD, weight_BSH, keys_BMD, q_BSHD
    return all(x.dtype == torch.float32 for x in tensors) and supports(q_BSHD, window, entries, sink_H)


@index_objective.register("cpu", supports=_supports)
def index_objective_cpu(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
                        sink_H: Tensor) -> Tensor:
    """`index_objective` for float32."""
    return apply_objective(_IndexObjective, index_q_BSHD, weight_BSH, keys_BMD, q_BSHD, window, entries, sink_H)
