"""Grouped attention on CPU: PyTorch's fused kernel over blocks of queries, and gathered keys where far more are visible than selected."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.grouped_attention import grouped_attention, seen_keys

_BLOCK = 256  # queries; bounds the mask, which is all that grows with S * M
_MANY = 8  # visible keys for each selected one, from which on gathering is cheaper than masking
_GATHERED = 1 << 24  # numbers that are gathered at a time


def _on_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


@grouped_attention.register("fused", supports=lambda q, key, value, *_: _on_cpu(q, key, value) and q.shape[1] > 0)
def grouped_attention_fused(q_BSHD: Tensor, key_BMGD: Tensor, value_BMGC: Tensor, first_BS: Tensor, count_BS: Tensor,
                            selected_BSK: Tensor | None, scale: float) -> Tensor:
    """Blocks of queries through scaled_dot_product_attention, each over the keys up to its last one."""
    key_BGMD, value_BGMC, out = key_BMGD.transpose(1, 2), value_BMGC.transpose(1, 2), []
    for begin in range(0, q_BSHD.shape[1], _BLOCK):
        part = slice(begin, begin + _BLOCK)
        first_BC, count_BC = first_BS[:, part], count_BS[:, part]
        last = max(int((first_BC + count_BC).max()), 1)
        selected_BCK = None if selected_BSK is None else selected_BSK[:, part]
        seen_BCM = seen_keys(key_BMGD, first_BC, count_BC, selected_BCK)[..., :last]
        blind_BC = count_BC == 0
        seen_BCM = seen_BCM | blind_BC[..., None]  # padding reads something, and its result is dropped
        out_BHCC = F.scaled_dot_product_attention(
            q_BSHD[:, part].transpose(1, 2), key_BGMD[:, :, :last], value_BGMC[:, :, :last], attn_mask=seen_BCM[:, None], scale=scale,
            enable_gqa=True)
        out.append(out_BHCC.transpose(1, 2).masked_fill(blind_BC[..., None, None], 0))
    return torch.cat(out, 1)


def _far_more_visible(q: Tensor, key: Tensor, value: Tensor, first: Tensor, count: Tensor, selected: Tensor | None, scale: float) -> bool:
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, key, value))
    return selected is not None and not gradients and _on_cpu(q, key, value) and key.shape[1] >= _MANY * selected.shape[2]


@grouped_attention.register("gathered", supports=_far_more_visible)
def grouped_attention_gathered(q_BSHD: Tensor, key_BMGD: Tensor, value_BMGC: Tensor, first_BS: Tensor, count_BS: Tensor,
                               selected_BSK: Tensor, scale: float) -> Tensor:
    """For a selection and no gradients: each query's keys side by side, so that cost does not grow with context."""
    B, S, K = selected_BSK.shape
    M, size = key_BMGD.shape[1], K * (key_BMGD[0, 0].numel() + value_BMGC[0, 0].numel())
    queries = max(1, _GATHERED // (B * size))
    row_B11 = torch.arange(B, device=key_BMGD.device)[:, None, None] * M
    out = []
    for begin in range(0, S, queries):
        part = slice(begin, begin + queries)
        index_N = (selected_BSK[:, part].clamp(min=0) + row_B11).flatten()
        C = len(index_N) // (B * K)
        near_key, near_value = (x.flatten(0, 1)[index_N].view(B * C, K, *x.shape[2:]) for x in (key_BMGD, value_BMGC))
        read_N1 = (selected_BSK[:, part] >= 0).sum(-1).view(B * C, 1)  # none stand last
        out_N1HC = grouped_attention_fused(q_BSHD[:, part].flatten(0, 1)[:, None], near_key, near_value, torch.zeros_like(read_N1),
                                           read_N1, None, scale)
        out.append(out_N1HC.view(B, C, *out_N1HC.shape[2:]))
    return torch.cat(out, 1)
