"""Cross-entropy and distillation's divergence on CPU: chunks of tokens whose logits stay in cache; all [N, V] never exist at once.

Cross-entropy is a sum, so its gradients are made on the way forward and only scaled on the way back. The divergence has a gradient for each
token, so its logits are computed anew there. float32 only, or bfloat16 that is widened first: anything else is left to the definitions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu.products import times
from fathom.ops.losses import IGNORE, cross_entropy, reverse_kl

_CHUNK_LOGITS = 1 << 21  # 8 MB: for each chunk tiles pack the head anew; of half as many tokens it took a fifth more time, of twice as many no less
_MIN_TOKENS = 64  # below this the head is read too often for too few tokens


def _chunk(head_VW: Tensor) -> int:
    """Tokens whose logits exist at once."""
    return max(_MIN_TOKENS, _CHUNK_LOGITS // len(head_VW))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor, wants_grad: bool) -> Tensor:
        dtypes, hidden_NW, head_VW = (hidden_NW.dtype, head_VW.dtype), hidden_NW.float(), head_VW.float()
        loss = hidden_NW.new_zeros(())
        hidden_grad_NW = torch.zeros_like(hidden_NW) if wants_grad and ctx.needs_input_grad[0] else None
        head_grad_WV = head_VW.new_zeros(head_VW.T.shape) if wants_grad and ctx.needs_input_grad[1] else None
        kept_N = (target_N != IGNORE).nonzero().squeeze(1)
        for kept_n in kept_N.split(_chunk(head_VW)):
            hidden_nW, target_n1 = hidden_NW.index_select(0, kept_n), target_N.index_select(0, kept_n)[:, None]
            logits_nV = times(hidden_nW, head_VW)
            share_nV = logits_nV.softmax(-1)
            # The log-sum-exp is the largest logit less the log of its share, which is never near zero.
            behind_n = logits_nV.amax(-1) - logits_nV.gather(1, target_n1)[:, 0]
            loss += (behind_n - share_nV.amax(-1).log()).sum()
            if wants_grad:
                logits_grad_nV = share_nV.scatter_add_(1, target_n1, hidden_nW.new_full(target_n1.shape, -1))
            if hidden_grad_NW is not None:
                hidden_grad_NW.index_copy_(0, kept_n, times(logits_grad_nV, head_VW.T))
            if head_grad_WV is not None:
                head_grad_WV += times(hidden_nW.T, logits_grad_nV.T)
        ctx.save_for_backward(hidden_grad_NW, None if head_grad_WV is None else head_grad_WV.T.contiguous())
        ctx.dtypes = dtypes
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *(None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None, None


class _ReverseKl(torch.autograd.Function):
    """By student's and teacher's logits; d KL / d logit_v = p_v (log p_v - log q_v - KL)."""

    @staticmethod
    def forward(ctx, hidden_NW: Tensor, head_VW: Tensor, teacher_hidden_NU: Tensor, teacher_head_VU: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NW, head_VW, teacher_hidden_NU, teacher_head_VU)
        parts = [_divergence(hidden_nW, head_VW, teacher_nU, teacher_head_VU)[2]
                 for hidden_nW, teacher_nU in _chunks(head_VW, hidden_NW, teacher_hidden_NU)]
        return torch.cat(parts) if parts else hidden_NW.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NW, head_VW, teacher_hidden_NU, teacher_head_VU = ctx.saved_tensors
        hidden_grad_NW = torch.zeros_like(hidden_NW) if ctx.needs_input_grad[0] else None
        head_grad_WV = head_VW.new_zeros(head_VW.T.shape) if ctx.needs_input_grad[1] else None
        first = 0
        for hidden_nW, teacher_nU, grad_n in _chunks(head_VW, hidden_NW, teacher_hidden_NU, grad_N):
            p_nV, ahead_nV, divergence_n = _divergence(hidden_nW, head_VW, teacher_nU, teacher_head_VU)
            logits_grad_nV = p_nV.mul_(ahead_nV.sub_(divergence_n[:, None])).mul_(grad_n[:, None])
            if hidden_grad_NW is not None:
                hidden_grad_NW[first:first + len(hidden_nW)] = times(logits_grad_nV, head_VW.T)
            if head_grad_WV is not None:
                head_grad_WV += times(hidden_nW.T, logits_grad_nV.T)
            first += len(hidden_nW)
        return hidden_grad_NW, None if head_grad_WV is None else head_grad_WV.T.contiguous(), None, None


def _chunks(head_VW: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Runs of tokens of tensors [N, ...], each as many as `_chunk` says."""
    size = _chunk(head_VW)
    for first in range(0, len(tensors[0]), size):
        yield tuple(x[first:first + size] for x in tensors)


def _divergence(hidden_nW: Tensor, head_VW: Tensor, teacher_nU: Tensor, teacher_head_VU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and log p - log q [n, V], and their product's sum [n]."""
    log_p_nV = times(hidden_nW, head_VW).log_softmax(-1)
    ahead_nV = log_p_nV - times(teacher_nU, teacher_head_VU).log_softmax(-1)
    p_nV = log_p_nV.exp_()
    return p_nV, ahead_nV, (p_nV * ahead_nV).sum(-1)


def _supports(*floats: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in floats)


@cross_entropy.register("cpu", supports=lambda hidden_NW, head_VW, target_N: (
    all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in (hidden_NW, head_VW))))
def cross_entropy_cpu(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor) -> Tensor:
    """`cross_entropy` in float32, of bfloat16 too; the gradients are only computed where autograd will ask for them."""
    wants_grad = torch.is_grad_enabled() and (hidden_NW.requires_grad or head_VW.requires_grad)
    return _CrossEntropy.apply(hidden_NW, head_VW, target_N, wants_grad)


@reverse_kl.register("cpu", supports=_supports)
def reverse_kl_cpu(hidden_NW: Tensor, head_VW: Tensor, teacher_hidden_NU: Tensor, teacher_head_VU: Tensor) -> Tensor:
    """`reverse_kl` for float32; the logits of a chunk of tokens are computed again in the backward pass."""
    return _ReverseKl.apply(hidden_NW, head_VW, teacher_hidden_NU.detach(), teacher_head_VU.detach())
