"""Cross-entropy on CPU: chunks of tokens whose logits stay in cache, and both gradients made on the way.

The loss is a sum, so its backward pass only scales what the forward pass found; all [N, V] logits never exist at once.
float32 only: anything else is left to the definition.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu.products import times
from fathom.ops.losses import IGNORE, cross_entropy

_CHUNK_LOGITS = 1 << 20  # 4 MB; on 2 cores of Zen 4 a quarter was at most 3% faster and 4 times as much 10% slower
_MIN_TOKENS = 64  # below this the head is read too often for too few tokens


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor, wants_grad: bool) -> Tensor:
        loss = hidden_NW.new_zeros(())
        hidden_grad_NW = torch.zeros_like(hidden_NW) if wants_grad and ctx.needs_input_grad[0] else None
        head_grad_WV = head_VW.new_zeros(head_VW.T.shape) if wants_grad and ctx.needs_input_grad[1] else None
        kept_N = (target_N != IGNORE).nonzero().squeeze(1)
        for kept_n in kept_N.split(max(_MIN_TOKENS, _CHUNK_LOGITS // len(head_VW))):
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
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *(None if x is None else x * grad for x in ctx.saved_tensors), None, None


def _supports(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (hidden_NW, head_VW))


@cross_entropy.register("cpu", supports=_supports)
def cross_entropy_cpu(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor) -> Tensor:
    """`cross_entropy` for float32; the gradients are only computed where autograd will ask for them."""
    wants_grad = torch.is_grad_enabled() and (hidden_NW.requires_grad or head_VW.requires_grad)
    return _CrossEntropy.apply(hidden_NW, head_VW, target_N, wants_grad)
