"""A step's gradients from many forward passes: micro-batches of one rank, rows on many, parts of rows on ranks that share their context.

Every share's loss is its part of the whole step's loss (train/objective.py), so gradients and numbers only have to be added up.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fathom.data.packing import Batch
from fathom.model.block import Observation
from fathom.model.layout import Layout
from fathom.model.moe import Routing
from fathom.model.transformer import Transformer
from fathom.ops import IGNORE
from fathom.train.context import PartCache, PartLayout
from fathom.train.objective import Counts, Losses, Share, count_places, whole_share
from fathom.train.parallel import sum_gradients
from fathom.train.ranks import Ranks


@dataclass(frozen=True)
class RankRows(Batch):
    """One rank's rows of a step; those from `real` on only fill up, so that all ranks have as many."""

    real: int


class Rows(Protocol):
    """Where rows come from: data/packing.py's PackedData."""

    sequence_length: int
    pad_id: int

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows from row `first` on."""


def rank_rows(data: Rows, first: int, count: int, ranks: Ranks) -> Batch:
    """This rank's rows of the batch of `count` rows from row `first` on."""
    if ranks.batch_ranks == 1:
        return data.rows(first, count)
    each = -(-count // ranks.batch_ranks)
    begin = min(count, ranks.batch_index * each)
    real = min(each, count - begin)
    filler = [torch.full((each - real, data.sequence_length), fill) for fill in (data.pad_id, IGNORE, 0)]
    if not real:
        return RankRows(*filler, real=0)
    batch = data.rows(first + begin, real)
    return RankRows(*(torch.cat(pair) for pair in zip((batch.tokens_BS, batch.targets_BS, batch.positions_BS), filler, strict=True)),
                    real=real)


def deal(batches: list[Batch], ranks: Ranks) -> list[Batch]:
    """This rank's share of some batches, filled up with ones that predict nothing so that all ranks have as many."""
    own = batches[ranks.batch_index::ranks.batch_ranks] if ranks.context_index == 0 else []
    missing = -(-len(batches) // ranks.batch_ranks) - len(own)
    blank = Batch(batches[0].tokens_BS, torch.full_like(batches[0].targets_BS, IGNORE), batches[0].positions_BS)
    return [_on(batch, ranks) for batch in own + [blank] * missing]


def gradients(model: Transformer, loss: Callable[[Batch | Share, int], Losses], batch: Batch, step: int, ranks: Ranks,
              around: Callable[[], AbstractContextManager] = nullcontext) -> Losses:
    """Run the step's forward and backward passes, so that every parameter's `grad` is the whole step's; returns its losses.

    `batch` holds this rank's rows; each forward pass, not its backward pass, runs inside `around`. The observations of the result carry
    the loads of all tokens; its `total` has no graph.
    """
    if ranks.one_pass:
        with around():
            losses = loss(batch, step)
        losses.total.backward()
        return losses
    found = []
    for share in cut(model, batch, ranks):
        with around():
            losses = loss(share, step)
        losses.total.backward()
        found.append(Losses(losses.total.detach(), losses.parts, losses.observations))
    sum_gradients(model, ranks)
    return _added(found, ranks)


def cut(model: Transformer, batch: Batch, ranks: Ranks) -> list[Share]:
    """The forward passes that this rank owes the step, each with the counts of all of them."""
    B, size = len(batch.tokens_BS), -(-len(batch.tokens_BS) // ranks.parallel.accumulate)
    shares, real_rows = [], []
    for begin in range(0, B, size):
        rows = slice(begin, begin + size)
        whole = whole_share(model, _on(Batch(batch.tokens_BS[rows], batch.targets_BS[rows], batch.positions_BS[rows]), ranks))
        real_rows.append(min(max(_real(batch) - begin, 0), len(whole.tokens_BS)))
        shares.append(_part(model, whole, real_rows[-1], ranks))
    counts = _counts([share.own for share in shares], sum(real_rows), ranks)
    return [replace(share, counts=counts) for share in shares]


def _part(model: Transformer, whole: Share, real: int, ranks: Ranks) -> Share:
    """Of whole rows, the first `real` of which count, this rank's part."""
    B, S = whole.tokens_BS.shape
    count_B = torch.where(torch.arange(B, device=whole.tokens_BS.device) < real, S, 0)
    if ranks.context_ranks == 1:
        layout = None if real == B else Layout(model.config, whole.positions_BS, count_B, None)
        return Share(whole.tokens_BS, whole.positions_BS, whole.targets, whole.next_tokens, whole.own, whole.counts, layout)
    layout = PartLayout(model.config, whole.positions_BS, count_B, ranks)
    part = layout.part
    targets = [target_BS[:, part] for target_BS in whole.targets]
    own = count_places(model, targets, whole.positions_BS[:, part], B)
    return Share(whole.tokens_BS[:, part], whole.positions_BS[:, part], targets, [next_BS[:, part] for next_BS in whole.next_tokens],
                 own, own, layout, PartCache(model.config, layout, ranks))


def _counts(own: list[Counts], rows: int, ranks: Ranks) -> Counts:
    """The step's counts from those of this rank's shares, which have so many real rows; ranks that share rows count them once."""
    depths, ratios = len(own[0].targets), list(own[0].readers)
    numbers = torch.stack([torch.stack([*(target.cpu() for target in counts.targets), *map(torch.tensor, counts.readers.values())]) for counts in own]).sum(0)
    total = ranks.sum(torch.cat([numbers, torch.tensor([rows if ranks.context_index == 0 else 0])]))
    readers, rows = total[depths:-1].tolist(), int(total[-1])
    return Counts(list(total[:depths].to(ranks.device)), rows, dict(zip(ratios, readers, strict=True)))


def _added(found: list[Losses], ranks: Ranks) -> Losses:
    names = list(found[0].parts)
    layers = [seen.routing.load_E for seen in found[0].observations]
    parts = ranks.sum(torch.tensor([[losses.parts[name] for name in names] for losses in found], dtype=torch.float64).sum(0))
    loads = torch.stack([torch.cat([seen.routing.load_E for seen in losses.observations]) for losses in found]).sum(0)
    loads = ranks.sum(loads).split([len(load_E) for load_E in layers])
    return Losses(sum(losses.total for losses in found), dict(zip(names, parts.tolist(), strict=True)),
                  [Observation(None, Routing(load_E, None)) for load_E in loads])


def tokens_of(batch: Batch, ranks: Ranks) -> int:
    """Tokens of a step, of which this rank has `batch`."""
    own = _real(batch) * batch.tokens_BS.shape[1]
    return int(ranks.sum(torch.tensor(own if ranks.context_index == 0 else 0)))


def _real(batch: Batch) -> int:
    return batch.real if isinstance(batch, RankRows) else len(batch.tokens_BS)


def _on(batch: Batch, ranks: Ranks) -> Batch:
    """The batch on the rank's device."""
    return Batch(batch.tokens_BS, batch.targets_BS, batch.positions_BS).to(ranks.device)
