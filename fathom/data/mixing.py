"""Which documents of all parts go where: duplicates out, held-out ones aside, the rest in the shares the recipe asks for.

Report section 4.1. Decided from digests, sizes and signatures alone: the same parts give the same choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fathom.data.duplicates import first_of_each, near_duplicates
from fathom.data.reading import Losses, Part
from fathom.data.sources import Source
from fathom.errors import DataError

EACH_SOURCE = 10  # documents from which on a source has at least one held out


@dataclass(frozen=True)
class Choice:
    """For one part: how often each document is trained on, and whether it is held out; both [documents]."""

    copies: np.ndarray  # int64
    held_out: np.ndarray  # bool
    lost: Losses


def choose(sources: Sequence[Source], parts: Sequence[Part], *, near: float, held_out: float, repeat: float,
           train_bytes: int | None) -> list[Choice]:
    """A Choice for every part. `near`: the likeness from which on a document is a copy, 0 to not look.

    Of equal and of alike documents the first stays. A document is kept from training by the hash of its text, whatever
    else the corpus holds, but at least one of every source of EACH_SOURCE documents; where sources have weights, as many
    of these are held out as have the same shares. DataError if nothing is left to train on.
    """
    borders = np.cumsum([len(part.digests) for part in parts])[:-1]
    digests = np.concatenate([part.digests for part in parts])
    exact = ~first_of_each(digests)
    alike = np.zeros(len(digests), dtype=bool)
    if near:
        compared = np.flatnonzero(np.concatenate([np.full(len(part.digests), not source.synthetic)
                                                  for source, part in zip(sources, parts, strict=True)]) & ~exact)
        alike[compared] = near_duplicates(np.concatenate([part.signatures for part in parts])[compared], near) >= 0
    kept = [~(one | other) for one, other in zip(np.split(exact, borders), np.split(alike, borders), strict=True)]
    held = [_held_out(part.digests, keep, held_out) for part, keep in zip(parts, kept, strict=True)]
    if not any(map(np.any, held)) and sum(map(np.sum, kept)) > 1:
        whole = np.flatnonzero(np.concatenate(kept))
        alone = np.arange(len(digests)) == whole[np.argmin(digests[whole])]
        held = np.split(alone, borders)
    trained = [keep & ~mask for keep, mask in zip(kept, held, strict=True)]
    copies = _copies(sources, parts, trained, repeat, train_bytes)
    tested = _tested(sources, parts, held)
    choices = []
    for part, gone, twin, train, count, aside, mask in zip(parts, np.split(exact, borders), np.split(alike, borders), trained, copies, held,
                                                           tested, strict=True):
        lost = Losses()
        for reason, which in (("exact duplicate", gone), ("near duplicate", twin), ("beyond its share of the mix", train & (count == 0)),
                              ("held out beyond its share", aside & ~mask)):
            for size in part.sizes[which].tolist():
                lost.add(reason, size)
        choices.append(Choice(count, mask, lost))
    if not any(choice.copies.any() for choice in choices) or not any(map(np.any, held)):
        raise DataError("too little text to train on and to hold out; add sources, or change the held-out share")
    return choices


def _held_out(digests: np.ndarray, kept: np.ndarray, share: float) -> np.ndarray:
    mask = kept & (digests < share * 2.0**64)
    if kept.sum() >= EACH_SOURCE and not mask.any():
        mask[np.flatnonzero(kept)[np.argmin(digests[kept])]] = True
    return mask


def _copies(sources: Sequence[Source], parts: Sequence[Part], trained: list[np.ndarray], repeat: float,
            train_bytes: int | None) -> list[np.ndarray]:
    """How often each document is trained on: once without weights; else so that sources have their shares in bytes."""
    if sources[0].weight is None:
        return [mask.astype(np.int64) for mask in trained]
    have = [int(part.sizes[mask].sum()) for part, mask in zip(parts, trained, strict=True)]
    shares = [source.weight / sum(source.weight for source in sources) for source in sources]
    most = [repeat * size / share for size, share in zip(have, shares, strict=True)]
    total = min(most) if train_bytes is None else train_bytes
    if total > min(most):
        scarce = int(np.argmin(most))
        raise DataError(f"{sources[scarce].path} has {have[scarce]:,} bytes to train on; its share of {total:,} would repeat it more "
                        f"than {repeat:g} times: lower its weight or train_bytes, or raise repeat")
    return [_part_copies(part, mask, size, share * total) for part, mask, size, share in zip(parts, trained, have, shares, strict=True)]


def _tested(sources: Sequence[Source], parts: Sequence[Part], held: list[np.ndarray]) -> list[np.ndarray]:
    """The documents kept from training that are stored as held out: all, or as many as have the shares of the mix."""
    have = [int(part.sizes[mask].sum()) for part, mask in zip(parts, held, strict=True)]
    if sources[0].weight is None or not any(have):
        return held
    total = min(size / source.weight for source, size in zip(sources, have, strict=True) if size)
    tested = []
    for source, part, mask in zip(sources, parts, held, strict=True):
        order = _by_chance(part, mask)
        sizes = part.sizes[order]
        wanted = np.cumsum(sizes) - sizes // 2 <= source.weight * total
        wanted[:1] = True
        tested.append(np.isin(np.arange(len(mask)), order[wanted]))
    return tested


def _by_chance(part: Part, chosen: np.ndarray) -> np.ndarray:
    """The chosen documents in an order that depends on their texts alone."""
    order = np.argsort(part.digests * np.uint64(0x9E3779B97F4A7C15), kind="stable")
    return order[chosen[order]]


def _part_copies(part: Part, trained: np.ndarray, have: int, wanted: float) -> np.ndarray:
    """Whole copies of all documents, and one more of as many, in an order by digest, as come nearest to `wanted` bytes."""
    whole, rest = (int(amount) for amount in divmod(wanted, have))
    copies = trained * whole
    order = _by_chance(part, trained)
    sizes = part.sizes[order]
    copies[order[np.cumsum(sizes) - sizes // 2 <= rest]] += 1
    return copies
