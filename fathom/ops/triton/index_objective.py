"""The indexer's objective on GPUs (report 2.3.1): some queries at a time, whose gradients are made on the way.

The objective is a mean over queries, so its backward pass only scales what the forward pass found, and scores and masses [B, S, M] of all
queries never exist at once: at 131,072 tokens they would take 17 GB each. The kernels are those of `entry_mass` and `index_scores`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.attention import Entries, Window, attended_entries, entry_mass
from fathom.ops.index_objective import apply_objective, index_objective
from fathom.ops.index_topk import index_scores
from fathom.ops.losses import index_divergence
from fathom.ops.triton.launch import NAME, runs

_CHUNK_SCORES = 1 << 26  # of the queries taken together: 256 MB


class _IndexObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, attention: tuple, wants_grad: bool) -> Tensor:
        q_BSHD, window, entries, sink_H = attention
        B, S, M = *index_q_BSHD.shape[:2], keys_BMD.shape[1]
        size = max(1, _CHUNK_SCORES // max(1, B * M))
        keys_BMD = keys_BMD.detach().requires_grad_(wants_grad)
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (index_q_BSHD, weight_BSH, keys_BMD)] if wants_grad else []
        total = queries = torch.zeros((), device=keys_BMD.device)
        for begin in range(0, S, size):
            chunk = slice(begin, begin + size)
            near = window._replace(query_place_BS=window.query_place_BS[:, chunk], reach_BS=window.reach_BS[:, chunk])
            far = Entries(entries.kv_BMD, *(None if x is None else x[:, chunk] for x in entries[1:]))
            mass_BCM, attended_BCM = entry_mass(q_BSHD[:, chunk], near, far, sink_H), attended_entries(far)
            count = (mass_BCM.masked_fill(~attended_BCM, 0).sum(-1) > 0).sum()
            leaves = *(x[:, chunk].detach().requires_grad_(wants_grad) for x in (index_q_BSHD, weight_BSH)), keys_BMD
            with torch.set_grad_enabled(wants_grad):
                divergence = index_divergence(index_scores(*leaves), mass_BCM, attended_BCM) * count  # their sum
            total, queries = total + divergence.detach(), queries + count
            if wants_grad:
                q_grad, weight_grad, keys_grad = torch.autograd.grad(divergence, leaves)
                gradients[0][:, chunk], gradients[1][:, chunk] = q_grad, weight_grad
                gradients[2] += keys_grad
        queries = queries.clamp(min=1)
        if wants_grad:
            ctx.save_for_backward(*((x / queries).to(of.dtype) for x, of in zip(gradients, (index_q_BSHD, weight_BSH, keys_BMD), strict=True)))
        return total / queries

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(x * grad for x in ctx.saved_tensors), None, None


def _supports(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
              sink_H: Tensor) -> bool:
    return runs(index_q_BSHD, weight_BSH, keys_BMD, q_BSHD)


@index_objective.register(NAME, supports=_supports)
def index_objective_triton(index_q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, q_BSHD: Tensor, window: Window, entries: Entries,
                           sink_H: Tensor) -> Tensor:
    """`index_objective` for float32 and bfloat16."""
    return apply_objective(_IndexObjective, index_q_BSHD, weight_BSH, keys_BMD, q_BSHD, window, entries, sink_H)
