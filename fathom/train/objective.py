"""What a training step minimises: next tokens, MTP, router balance, the indexer (report 2.1, 4.2.2; V3.2 for the last).

Also the one update without a gradient: moving the routers' selection bias against the load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fathom import ops
from fathom.data.packing import Batch
from fathom.errors import RecipeError
from fathom.model.attention import Phase
from fathom.model.block import Observation
from fathom.model.cache import Cache
from fathom.model.layout import Layout
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


@dataclass(frozen=True)
class Counts:
    """Over how many places each part of the loss is a mean."""

    targets: list[Tensor]  # of the next token, then of each MTP depth; int64 scalars
    rows: int
    readers: dict[int, int]  # by compression ratio: queries that see an entry


@dataclass(frozen=True)
class Share:
    """What one forward pass computes of a step: rows, or parts of rows, and the `counts` of the whole step, so that the losses and
    gradients of all shares add up to the step's. `layout` and `cache` are for parts of rows (Transformer.features).
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    targets: list[Tensor]  # [B, S] each, of the next token and then of each MTP depth
    next_tokens: list[Tensor]  # [B, S] each, that MTP depths see
    own: Counts
    counts: Counts
    layout: Layout | None = None
    cache: Cache | None = None


def whole_share(model: Transformer, batch: Batch) -> Share:
    """A batch that is the whole step."""
    depths = len(model.mtp)
    targets = [batch.targets_BS, *_shifted_targets(batch, depths)]
    counts = count_places(model, targets, batch.positions_BS, len(batch.tokens_BS))
    return Share(batch.tokens_BS, batch.positions_BS, targets, _next_tokens(batch, depths), counts, counts)


def count_places(model: Transformer, targets: list[Tensor], positions_BS: Tensor, rows: int) -> Counts:
    """The places of some rows, from their targets [B, S] for each depth and their positions."""
    ratios = {block.attention.ratio for block in [*model.blocks, *model.mtp] if block.attention.indexer is not None}
    return Counts([(target_BS != ops.IGNORE).sum() for target_BS in targets], rows,
                  {ratio: int((positions_BS + 1 >= ratio).sum()) for ratio in sorted(ratios)})


def objective(model: Transformer, batch: Batch | Share, weights: LossWeights, mtp_weight: float, phase: Phase) -> Losses:
    """The training loss of a batch; every part is a mean over its own positions. Of a Share: what it adds to the step's loss. In the phase
    "warmup" the indexer's divergence is all there is to minimise (inside `phases.attending`), and the other parts are numbers for the log.
    """
    mtp_weight = 0.0 if phase == "warmup" else mtp_weight
    share = batch if isinstance(batch, Share) else whole_share(model, batch.to(model.head.weight.device))
    depths = len(model.mtp) if mtp_weight > 0 else 0
    features = model.features(share.tokens_BS, share.positions_BS, share.next_tokens[:depths], phase, share.layout, share.cache)
    total = loss = _cross_entropy(features.hidden_BSW, model.head.weight, share, 0)
    parts = {"loss": loss}
    if depths:
        mtp = sum(_cross_entropy(hidden_BSW, model.mtp_ends(depth)[1].weight, share, depth + 1)
                  for depth, hidden_BSW in enumerate(features.mtp_hidden)) / depths
        total, parts["mtp_loss"] = total + mtp_weight * mtp, mtp
    warmup = phase == "warmup"
    readers = [share.own.readers.get(block.attention.ratio, 0) / max(share.counts.readers.get(block.attention.ratio, 0), 1)
               for block in [*model.blocks, *model.mtp]]
    auxiliary, more = auxiliary_losses(features.observations, replace(weights, balance=0.0) if warmup else weights,
                                       share.own.rows / max(share.counts.rows, 1), readers)
    parts |= more
    total = auxiliary if warmup else total + auxiliary
    return Losses(total, {name: float(part.detach()) for name, part in parts.items()}, features.observations)


def auxiliary_losses(observations: list[Observation], weights: LossWeights, rows: float = 1.0,
                     readers: Sequence[float] = ()) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The weighted sum of the routers' balance and the indexers' divergence, and the mean of each by name.

    `rows` and, by layer, `readers`: which part of the step's rows and of its queries that see an entry were observed; by default all.
    """
    total, parts = 0.0, {}
    balance = [seen.routing.balance * rows for seen in observations if seen.routing.balance is not None]
    if balance:
        parts["balance_loss"] = torch.stack(balance).mean()
        total = total + weights.balance * torch.stack(balance).sum()
    index = [seen.index_loss * (readers[layer] if readers else 1.0) for layer, seen in enumerate(observations)
             if seen.index_loss is not None]
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


def _cross_entropy(hidden_BSW: Tensor, head_VW: Tensor, share: Share, depth: int) -> Tensor:
    """The sum over the share's own targets over the step's number of them."""
    return ops.cross_entropy(hidden_BSW.flatten(0, 1), head_VW, share.targets[depth].flatten()) / share.counts.targets[depth].clamp(min=1)


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
