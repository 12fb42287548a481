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
from fathom.ops.index_objective import apply_objective, index_objective


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
            hidden_BCM = ~attended_entries(attention[2].part(block.queries, block.slots))
            target_BCM = probability_BRJ[..., near:near + count].unflatten(1, (-1, attention[0].shape[2])).sum(2)
            mass_BC1 = target_BCM.sum(-1, keepdim=True)
            target_BCM.div_(mass_BC1.clamp_(min=torch.finfo(torch.float32).tiny))
            reads_BC1 = target_BCM.sum(-1, keepdim=True) > 0
            q_BCHD, weight_BCH, keys_BmD = index_q_BSHD[:, block.queries], weight_BSH[:, block.queries], keys_BMD[:, block.slots]
            product_BCHM = batch_times(q_BCHD.flatten(1, 2), keys_BmD).relu_().unflatten(1, (-1, H))
            score_BCM = (weight_BCH[:, :, None] @ product_BCHM)[:, :, 0]
            log_share_BCM = score_BCM.masked_fill_(hidden_BCM, torch.finfo(torch.float32).min).log_softmax(-1)
            total += (target_BCM.xlogy(target_BCM) - target_BCM * log_share_BCM).masked_fill_(~reads_BC1, 0).sum()
            queries += int(reads_BC1.sum())
            if wants_grad:
                score_grad_BCM = log_share_BCM.exp_().sub_(target_BCM).masked_fill_(hidden_BCM | ~reads_BC1, 0)
                _add_gradients(gradients, block, score_grad_BCM, product_BCHM, q_BCHD, weight_BCH, keys_BmD)
        queries = max(queries, 1)
        if wants_grad:
            gradients[1].mul_((D * H) ** -0.5)
            ctx.save_for_backward(*(x.div_(queries) for x in gradients))
        return total / queries

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(x * grad for x in ctx.saved_tensors), None, None


def _add_gradients(gradients: list[Tensor], block, score_grad_BCM: Tensor, product_BCHM: Tensor, q_BCHD: Tensor, weight_BCH: Tensor,
                   keys_BmD: Tensor) -> None:
    """Add what a block's score gradient gives its queries, their head weights and its keys."""
    q_grad_BSHD, weight_grad_BSH, keys_grad_BMD = gradients
    weight_grad_BSH[:, block.queries] = (product_BCHM @ score_grad_BCM[..., None])[..., 0]
    product_grad_BCHM = (weight_BCH[..., None] * score_grad_BCM[:, :, None]).masked_fill_(product_BCHM == 0, 0)
    product_grad_BRM = product_grad_BCHM.flatten(1, 2)
    q_grad_BSHD[:, block.queries] = batch_times(product_grad_BRM, keys_BmD.mT).view_as(q_BCHD)
    keys_grad_BMD[:, block.slots] += batch_times(product_grad_BRM.mT, q_BCHD.flatten(1, 2).mT)


def _supports(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
              sink_H: Tensor) -> bool:
    tensors = index_q_BSHD, weight_BSH, keys_BMD, q_BSHD
    return all(x.dtype == torch.float32 for x in tensors) and supports(q_BSHD, window, entries, sink_H)


@index_objective.register("cpu", supports=_supports)
def index_objective_cpu(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
                        sink_H: Tensor) -> Tensor:
    """`index_objective` for float32."""
    return apply_objective(_IndexObjective, index_q_BSHD, weight_BSH, keys_BMD, q_BSHD, window, entries, sink_H)
