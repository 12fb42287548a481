"""What GRPO minimises, with its corrections (report 5.1); the exact reverse KL of distillation is an operator (fathom/ops/losses.py).

Pure functions of hidden states, heads and per-token numbers. N counts the learned positions of a batch, U its samples. Logits
over the vocabulary exist for one chunk of positions at a time, in both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fathom import ops
from fathom.errors import RecipeError

CHUNK_LOGITS = 1 << 21  # 8 MB of float32


class Kept(NamedTuple):
    """Which tokens sampling left to choose from at each of N positions: ids int32 [total], and how many of them each has [N]."""

    ids: Tensor
    count_N: Tensor

    def mask(self, first: int, last: int, vocabulary: int) -> Tensor:
        """Positions `first` to `last` as bool [n, V]."""
        ends_N = self.count_N.cumsum(0)
        count_n = self.count_N[first:last]
        begin = int(ends_N[first] - self.count_N[first]) if last > first else 0
        ids = self.ids[begin:begin + int(count_n.sum())].long()
        mask_nV = torch.zeros(last - first, vocabulary, dtype=torch.bool, device=ids.device)
        mask_nV[torch.repeat_interleave(torch.arange(last - first, device=ids.device), count_n), ids] = True
        return mask_nV


@dataclass(frozen=True)
class Policy:
    """Settings of the policy's loss. `clip`: how far a ratio may move from 1 and still be rewarded; `kl`: weight of the divergence from
    the reference; `drift`: mean log-ratio per token beyond which a sample with negative advantage is left out.
    """

    clip: float = 0.2
    kl: float = 0.001
    drift: float = 1.0

    def __post_init__(self):
        if self.clip <= 0 or self.kl < 0 or self.drift <= 0:
            raise RecipeError(f"policy: clip is {self.clip}, kl {self.kl}, drift {self.drift}; allowed: above 0, from 0, above 0")


def token_log_probabilities(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor, temperature: float = 1.0,
                            kept: Kept | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of each target [N] under softmax(head hidden / temperature), of the kept tokens only; and entropies [N].

    Float32 or wider, in mixed precision too: a ratio of probabilities has no room for rounded logits. Entropies carry no gradient.
    """
    def chunk(hidden_nW: Tensor, head_VW: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        logits_nV = ops.linear.exactly(ops.wide(hidden_nW), ops.wide(head_VW)) / temperature
        if kept is not None:
            logits_nV = logits_nV.masked_fill(~kept.mask(first, last, len(head_VW)), -torch.inf)
        logs_nV = logits_nV.log_softmax(-1)
        chosen_n = logs_nV.gather(1, target_N[first:last, None])[:, 0]
        return chosen_n, torch.special.entr(logs_nV.detach().exp()).sum(-1)

    return _in_chunks(chunk, hidden_NW, head_VW)


def advantages(rewards_PG: Tensor, floor: float = 0.0) -> Tensor:
    """(reward - mean) / max(standard deviation, floor) within each group, [P, G] -> [P, G]; 0 where all rewards are equal.

    The deviation is that of the group itself (divided by G), as in GRPO.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    deviation_P1 = rewards_PG.std(1, correction=0, keepdim=True)
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    return (centred_PG / deviation_P1.clamp(min=max(floor, 1e-12))).masked_fill(equal_P1, 0.0)


class PolicyLoss(NamedTuple):
    """The loss to minimise, and numbers for the log."""

    total: Tensor
    parts: dict[str, float]


def policy_loss(logs_N: Tensor, old_logs_N: Tensor, reference_logs_N: Tensor | None, advantage_U: Tensor, weight_U: Tensor,
                sample_N: Tensor, settings: Policy) -> PolicyLoss:
    """GRPO with DeepSeek-V3.2's corrections, to be minimised.

    `logs_N` are the policy's log-probabilities of what was sampled, `old_logs_N` those of the policy that sampled, `reference_logs_N`
    the reference's. `sample_N` names each position's sample, which has an advantage and a weight. With r = exp(log - old):
    - sum_u weight_u mean_t [ M_u min(r A, clip(r) A) - kl r (exp(ref - log) - (ref - log) - 1) ], where M_u = 0 for A < 0 with
    mean_t (old - log) above `drift`. The divergence is weighted by r, so that its gradient is unbiased off policy too.
    """
    length_U = torch.zeros_like(weight_U).index_add_(0, sample_N, torch.ones_like(logs_N))
    share_N = (weight_U / length_U.clamp(min=1))[sample_N]
    advantage_N, ratio_N = advantage_U[sample_N], (logs_N - old_logs_N).exp()
    clipped_N = ratio_N.clamp(1 - settings.clip, 1 + settings.clip)
    drift_U = torch.zeros_like(weight_U).index_add_(0, sample_N, (old_logs_N - logs_N).detach()) / length_U.clamp(min=1)
    kept_U = ~((advantage_U < 0) & (drift_U > settings.drift))
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N) * kept_U[sample_N]
    total = -(share_N * gain_N).sum()
    mass = weight_U.sum().clamp(min=1e-12)
    clips_N = (ratio_N * advantage_N > clipped_N * advantage_N) & kept_U[sample_N]
    parts = {"clip_share": float((share_N * clips_N).sum() / mass), "drifted_share": float((weight_U * ~kept_U).sum() / mass)}
    if reference_logs_N is not None:
        ahead_N = reference_logs_N - logs_N
        divergence_N = ratio_N * (ahead_N.exp() - ahead_N - 1)
        total = total + settings.kl * (share_N * divergence_N).sum()
        parts["kl"] = float(((share_N * divergence_N).sum() / mass).detach())
    return PolicyLoss(total, parts)


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], hidden_NW: Tensor, head_VW: Tensor) -> tuple[Tensor, ...]:
    """`function` of runs of positions, each computed again in the backward pass, its results joined."""
    size = max(1, CHUNK_LOGITS // len(head_VW))
    starts = range(0, max(len(hidden_NW), 1), size)
    parts = [checkpoint(function, hidden_NW[first:first + size], head_VW, first, min(first + size, len(hidden_NW)),
                        use_reentrant=False, preserve_rng_state=False) for first in starts]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))
