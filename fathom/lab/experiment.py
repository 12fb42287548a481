"""What an experiment of the lab is: a claim, variants of one small run, numbers, and a rule that turns numbers into a verdict.

A variant changes the recipe, the model's config, or swaps a module or operator from outside while it trains and is measured. Nothing here
adds a switch to the model.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fathom.data.packing import Batch
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer
from fathom.train.pretrain import Pretrain

Outcome = Literal["reproduced", "partly", "not", "too big for here"]
Numbers = dict[str, list[dict[str, float]]]  # by variant, one for each seed
UNKNOWN_NOISE = 0.005  # of a value, where one seed cannot tell


@dataclass(frozen=True)
class Variant:
    """One way to run: recipe changes as of --set, config fields, and a context that swaps parts from outside."""

    name: str
    set: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    swap: Callable[[], AbstractContextManager] = nullcontext

    @property
    def changes_nothing(self) -> bool:
        """Whether it is the base recipe as it stands, which several experiments compare with."""
        return not self.set and not self.model and self.swap is nullcontext


class Trained(NamedTuple):
    """A finished run, to measure: `held_out` batches, and the UTF-8 bytes of each token id [V]."""

    model: Transformer
    tokenizer: Tokenizer
    held_out: list[Batch]
    byte_lengths_V: Any
    recipe: Pretrain
    run: Path


class Verdict(NamedTuple):
    """An outcome and the numbers it rests on, in one sentence."""

    outcome: Outcome
    ours: str


@dataclass(frozen=True)
class Experiment:
    """One claim. `judge` follows `rule` and sees numbers only; `metric` is the one that is plotted."""

    name: str
    claim: str
    source: str
    rule: str
    variants: tuple[Variant, ...]
    judge: Callable[[Numbers], Verdict]
    measure: Callable[[Trained], dict[str, float]] = lambda trained: {}
    metric: str = "bits"
    seeds: tuple[int, ...] = (0, 1, 2)


def mean(numbers: Numbers, variant: str, metric: str = "bits") -> float:
    """Of a metric over a variant's seeds."""
    return statistics.fmean(run[metric] for run in numbers[variant])


def noise(numbers: Numbers, variants: tuple[str, ...], metric: str = "bits") -> float:
    """Two standard errors of the difference of two variants' means; with one seed half a percent of the mean."""
    if min(len(numbers[variant]) for variant in variants) < 2:
        return UNKNOWN_NOISE * abs(mean(numbers, variants[0], metric))
    return 2 * math.sqrt(sum(statistics.variance(run[metric] for run in numbers[variant]) / len(numbers[variant]) for variant in variants))


def lower(numbers: Numbers, claimed: str, other: str, metric: str = "bits") -> Verdict:
    """Whether `claimed` is below `other` by more than the noise (reproduced), by less (partly), or is not (not)."""
    gain, margin = mean(numbers, other, metric) - mean(numbers, claimed, metric), noise(numbers, (claimed, other), metric)
    outcome: Outcome = "reproduced" if gain > margin else "partly" if gain > 0 else "not"
    return Verdict(outcome, f"{metric.replace('_', ' ')} {mean(numbers, claimed, metric):.4f} with {claimed}, "
                            f"{mean(numbers, other, metric):.4f} with {other} (noise {margin:.4f})")


def harmless(numbers: Numbers, claimed: str, other: str) -> Verdict:
    """Whether bits per byte with `claimed` are at most half a percent and the noise above those with `other`."""
    margin = noise(numbers, (claimed, other)) + 0.005 * mean(numbers, other)
    cost = mean(numbers, claimed) - mean(numbers, other)
    return Verdict("reproduced" if cost <= margin else "not", f"bits {mean(numbers, claimed):.4f} with {claimed}, {mean(numbers, other):.4f} with {other}")


def worst(*verdicts: Verdict) -> Verdict:
    """All verdicts as one: reproduced where all are, not where none is, else partly."""
    outcomes = {verdict.outcome for verdict in verdicts}
    outcome: Outcome = "partly" if len(outcomes) > 1 else outcomes.pop()
    return Verdict(outcome, "; ".join(verdict.ours for verdict in verdicts))


@contextmanager
def swapped(*parts: tuple[object, str, object]) -> Iterator[None]:
    """Inside, each (owner, name) is another object: a class of a module, an operator of `fathom.ops`."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for owner, name, other in parts:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)
