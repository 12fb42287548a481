"""What a training step minimises: next tokens, MTP, router balance, the indexer (report 2.1, 4.2.2; V3.2 for the last).

Also the one update without a gradient: moving the routers' selection bias against the load.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fathom import ops
from fathom.data.packing import Batch
from fathom.errors import RecipeError
from fathom.model.attention import Phase
from fathom.model.block import Observation
from fathom.model.transformer import Transformer


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses beside the next token's; the MTP weight belongs to the schedule."""

    balance: float = 1e-4
    indexer: float = 1.0

    def __post_init__(self):
        if self.balance < 0 or self.indexer < 0:
            raise RecipeError(f"loss weights must not be negative: balance {self.balance}, indexer {self.indexer}")


@dataclass(frozen=True)
class Losses:
    """`total` to minimise, its parts as numbers for the log, and what the blocks observed."""

    total: Tensor
    parts: dict[str, float]
    observations: list[Observation]


def objective(model: Transformer, batch: Batch, weights: LossWeights, mtp_weight: float, phase: Phase) -> Losses:
    """The training loss of a batch; every part is a mean over its own positions. In the phase "warmup" the indexer's divergence is all
    there is to minimise (inside `phases.attending`), and the other parts are numbers for the log.
    """
    mtp_weight = 0.0 if phase == "warmup" else mtp_weight
    depths = len(model.mtp) if mtp_weight > 0 else 0
    targets_DBS = _shifted_targets(batch, depths)
    features = model.features(batch.tokens_BS, batch.positions_BS, _next_tokens(batch, depths), phase)
    total = loss = _mean_cross_entropy(features.hidden_BSW, model.head.weight, batch.targets_BS)
    parts = {"loss": loss}
    if depths:
        mtp = sum(_mean_cross_entropy(hidden_BSW, model.mtp_ends(depth)[1].weight, target_BS)
                  for depth, (hidden_BSW, target_BS) in enumerate(
                      zip(features.mtp_hidden, targets_DBS, strict=True))) / depths
        total, parts["mtp_loss"] = total + mtp_weight * mtp, mtp
    warmup = phase == "warmup"
    auxiliary, more = auxiliary_losses(features.observations, replace(weights, balance=0.0) if warmup else weights)
    parts |= more
    total = auxiliary if warmup else total + auxiliary
    return Losses(total, {name: float(part.detach()) for name, part in parts.items()}, features.observations)


def auxiliary_losses(observations: list[Observation], weights: LossWeights) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The weighted sum of the routers' balance and the indexers' divergence, and the mean of each by name."""
    total, parts = 0.0, {}
    balance = [seen.routing.balance for seen in observations if seen.routing.balance is not None]
    if balance:
        parts["balance_loss"] = torch.stack(balance).mean()
        total = total + weights.balance * torch.stack(balance).sum()
    index = [seen.index_loss for seen in observations if seen.index_loss is not None]
    if index:
        parts["indexer_loss"] = torch.stack(index).mean()
        total = total + weights.indexer * torch.stack(index).sum()
    return total, parts


@torch.no_grad()
def move_router_biases(model: Transformer, observations: list[Observation], speed: float) -> dict[str, float]:
    """Move each learned router's bias by speed * sign(mean load - load); returns the load of the fullest experts.

    `fullest_expert` is the largest load over the mean load, averaged over layers (1 when balanced).
    """
    fullest = []
    for router, seen in zip((block.moe.router for block in [*model.blocks, *model.mtp]), observations, strict=False):
        load_E = seen.routing.load_E.float()
        fullest.append(float(load_E.max() / load_E.mean()))
        if not router.by_hash:
            router.bias += speed * (load_E.mean() - load_E).sign()
    return {"fullest_expert": sum(fullest) / len(fullest)}


def _mean_cross_entropy(hidden_BSW: Tensor, head_VW: Tensor, target_BS: Tensor) -> Tensor:
    count = (target_BS != ops.IGNORE).sum().clamp(min=1)
    return ops.cross_entropy(hidden_BSW.flatten(0, 1), head_VW, target_BS.flatten()) / count


def _next_tokens(batch: Batch, depths: int) -> list[Tensor]:
    """For each MTP depth d, the token d + 1 places on [B, S]; where a document ends, what it is does not matter."""
    known_BS = _shift(batch.tokens_BS, 0)
    nexts = [torch.where(batch.targets_BS != ops.IGNORE, batch.targets_BS, known_BS)]
    while len(nexts) < depths:
        nexts.append(_shift(nexts[-1], 0))
    return nexts[:depths]


def _shifted_targets(batch: Batch, depths: int) -> list[Tensor]:
    """For each MTP depth d, the target d + 1 places after the next token, in the same document, or IGNORE."""
    targets, same_BS = [batch.targets_BS], _shift(batch.positions_BS, 0) == batch.positions_BS + 1
    for _ in range(depths):
        targets.append(_shift(targets[-1], ops.IGNORE).where(same_BS, ops.IGNORE))
    return targets[1:]


def _shift(x_BS: Tensor, fill: int) -> Tensor:
    return torch.cat([x_BS[:, 1:], torch.full_like(x_BS[:, :1], fill)], 1)
