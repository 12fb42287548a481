"""Attention over tokens kept as they are, with keys and values of their own in groups of heads: what V4's attention is compared with.

GQA (Ainslie et al., 2023), and MLA and DSA (DeepSeek-V2, -V3.2) in both their forms. What a query may see is described by integers, as in
attention.py: `count` keys from `first` on, or only the `selected` among them.
"""

import torch
from torch import Tensor

from fathom.ops.attention import Entries, attended_entries
from fathom.ops.dispatch import op
from fathom.ops.precision import wide


@op
def grouped_attention(q_BSHD: Tensor, key_BMGD: Tensor, value_BMGC: Tensor, first_BS: Tensor, count_BS: Tensor,
                      selected_BSK: Tensor | None, scale: float) -> Tensor:
    """Softmax attention [B, S, H, C]; head h reads key/value head h // (H / G). A query that sees nothing gets zeros."""
    probability_BSGRM = _probabilities(q_BSHD, key_BMGD, first_BS, count_BS, selected_BSK, scale)
    out_BSGRC = torch.einsum("bsgrm,bmgc->bsgrc", probability_BSGRM.to(value_BMGC.dtype), value_BMGC)
    return out_BSGRC.flatten(2, 3)


@op
def key_mass(q_BSHD: Tensor, key_BMGD: Tensor, first_BS: Tensor, count_BS: Tensor, selected_BSK: Tensor | None,
             scale: float) -> Tensor:
    """Attention [B, S, M] that each key gets from all heads together: the target of DeepSeek-V3.2's indexer."""
    return _probabilities(q_BSHD, key_BMGD, first_BS, count_BS, selected_BSK, scale).sum((2, 3))


def seen_keys(key_BMGD: Tensor, first_BS: Tensor, count_BS: Tensor, selected_BSK: Tensor | None) -> Tensor:
    """Mask [B, S, M] of the keys that each query reads."""
    return attended_entries(Entries(key_BMGD, first_BS, count_BS, selected_BSK))


def _probabilities(q_BSHD: Tensor, key_BMGD: Tensor, first_BS: Tensor, count_BS: Tensor, selected_BSK: Tensor | None,
                   scale: float) -> Tensor:
    q_BSGRD = q_BSHD.unflatten(2, (key_BMGD.shape[2], -1))
    seen_BSM = seen_keys(key_BMGD, first_BS, count_BS, selected_BSK)[:, :, None, None]
    score_BSGRM = wide(torch.einsum("bsgrd,bmgd->bsgrm", q_BSGRD, key_BMGD)) * scale
    lowest = torch.finfo(score_BSGRM.dtype).min  # finite, so that padding, which sees nothing, makes no NaN
    return score_BSGRM.masked_fill(~seen_BSM, lowest).softmax(-1) * seen_BSM
