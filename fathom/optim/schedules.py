"""Everything that changes while training, as pure functions of the step (report 4.2.2). Steps count from 0.

Knows no optimiser and no data: a step is an int, so a resumed run sees what an unbroken one would have seen.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fathom.errors import RecipeError

# What a step does with attention: "dense" reads every visible entry and leaves the indexer alone, "warmup" does the same and
# trains nothing but the indexer, "sparse" reads what the indexer selects.
Attention = Literal["dense", "warmup", "sparse"]


@dataclass(frozen=True)
class Schedule:
    """How long to train, at which rates, on how many tokens per step, how long sequences, and with which attention.

    Rates, MTP weights and bias speed default to the Flash model's. The batch grows from `first_batch_tokens` over
    `batch_ramp_steps`; sequences have `lengths[i]` tokens from step `length_starts[i]` on. The first `dense_steps` attend to all
    visible entries, the next `indexer_warmup_steps` train the indexer alone, at `indexer_warmup_rate` (DeepSeek-V3.2's), and from
    then on the indexer selects. The rate decays over the last `decay_steps`. `bias_rest_steps` are the last steps, in which the
    routers' bias is not moved (DeepSeek-V3 had them, V4 names none). From step `quantise_from` on, if given, forward passes see the
    released number formats (report 5.2.1).
    """

    steps: int
    batch_tokens: int
    first_batch_tokens: int = 0
    batch_ramp_steps: int = 0
    lengths: tuple[int, ...] = (4096,)
    length_starts: tuple[int, ...] = (0,)
    dense_steps: int = 0
    indexer_warmup_steps: int = 0
    indexer_warmup_rate: float = 1e-3
    warmup_steps: int = 2000
    decay_steps: int = 0
    decay_shape: Literal["cosine", "linear"] = "cosine"
    peak_rate: float = 2.7e-4
    final_rate: float = 2.7e-5
    mtp_weight: float = 0.3
    mtp_weight_decayed: float = 0.1
    bias_speed: float = 0.001
    bias_rest_steps: int = 0
    quantise_from: int | None = None

    def __post_init__(self):
        for name, allowed, holds in (
            ("steps", "at least 1", self.steps >= 1),
            ("batch_tokens", "at least 1", self.batch_tokens >= 1),
            ("first_batch_tokens", "from 0 to batch_tokens", 0 <= self.first_batch_tokens <= self.batch_tokens),
            ("batch_ramp_steps", "at least 0", self.batch_ramp_steps >= 0),
            ("lengths", "one or more, growing, from 1", _grows((0, *self.lengths)) and self.lengths),
            ("length_starts", "one step for each of lengths, growing, the first 0",
             self.length_starts[:1] == (0,) and _grows(self.length_starts)
             and len(self.length_starts) == len(self.lengths)),
            ("dense_steps", "at least 0", self.dense_steps >= 0),
            ("indexer_warmup_steps", "at least 0, and 0 where dense_steps is 0",
             self.indexer_warmup_steps >= 0 and (self.dense_steps > 0 or not self.indexer_warmup_steps)),
            ("indexer_warmup_rate", "above 0", self.indexer_warmup_rate > 0),
            ("warmup_steps", "at least 0", self.warmup_steps >= 0),
            ("decay_steps", f"from 0 to steps - warmup_steps = {self.steps - self.warmup_steps}",
             0 <= self.decay_steps <= self.steps - self.warmup_steps),
            ("final_rate", "from 0 to peak_rate", 0 <= self.final_rate <= self.peak_rate),
            ("mtp_weight", "at least 0", self.mtp_weight >= 0),
            ("mtp_weight_decayed", "at least 0", self.mtp_weight_decayed >= 0),
            ("bias_speed", "at least 0", self.bias_speed >= 0),
            ("bias_rest_steps", "from 0 to steps", 0 <= self.bias_rest_steps <= self.steps),
            ("quantise_from", "a step, at least 0", self.quantise_from is None or self.quantise_from >= 0),
        ):
            if not holds:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: {allowed}")

    def scaled_to(self, steps: int) -> "Schedule":
        """The same shape over another number of steps: every count of steps keeps its share."""
        def share(count: int) -> int:
            return int(count * steps / self.steps)

        return replace(self, steps=steps, warmup_steps=share(self.warmup_steps), decay_steps=share(self.decay_steps),
                       batch_ramp_steps=share(self.batch_ramp_steps), bias_rest_steps=share(self.bias_rest_steps),
                       dense_steps=share(self.dense_steps), indexer_warmup_steps=share(self.indexer_warmup_steps),
                       length_starts=tuple(share(start) for start in self.length_starts),
                       quantise_from=None if self.quantise_from is None else share(self.quantise_from))

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, a decay that reaches `final_rate` at the last step; the indexer's own while it
        trains alone.
        """
        if self.attention_at(step) == "warmup":
            return self.indexer_warmup_rate
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        if not self._decays(step):
            return self.peak_rate
        progress = min(1.0, (step + 1 - (self.steps - self.decay_steps)) / self.decay_steps)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.decay_shape == "cosine" else 1 - progress
        return self.final_rate + (self.peak_rate - self.final_rate) * left

    def length_at(self, step: int) -> int:
        """Tokens in a sequence."""
        return self.lengths[self._stage(step)]

    def attention_at(self, step: int) -> Attention:
        """Whether attention is dense, dense with the indexer training alone, or sparse."""
        if step < self.dense_steps:
            return "dense"
        return "warmup" if step < self.dense_steps + self.indexer_warmup_steps else "sparse"

    def batch_rows_at(self, step: int) -> int:
        """Sequences in a batch: the token count that is due, in whole sequences, at least one."""
        stage = self._stage(step)
        return int(self._rows(stage, step, step + 1)[0])

    def first_row_at(self, step: int) -> int:
        """Sequences of this step's length that earlier steps have taken."""
        return self._taken(self._stage(step), step)

    @property
    def tokens(self) -> int:
        """Tokens of all steps together."""
        ends = (*self.length_starts[1:], self.steps)
        return sum(length * self._taken(stage, min(end, self.steps))
                   for stage, (length, end) in enumerate(zip(self.lengths, ends, strict=True)))

    def segments(self) -> list[tuple[int, int]]:
        """The steps [first, end) between two changes of length or attention, in order."""
        borders = {0, self.steps, *self.length_starts, self.dense_steps, self.dense_steps + self.indexer_warmup_steps}
        inside = sorted(border for border in borders if 0 <= border <= self.steps)
        return list(zip(inside, inside[1:], strict=False))

    def tokens_in(self, first: int, end: int) -> int:
        """Tokens of the steps [first, end), which all have one length."""
        stage = self._stage(first)
        return self.lengths[stage] * (self._taken(stage, end) - self._taken(stage, first))

    def mtp_weight_at(self, step: int) -> float:
        """Weight of the multi-token prediction loss: lower once the learning rate decays."""
        return self.mtp_weight_decayed if self._decays(step) else self.mtp_weight

    def bias_speed_at(self, step: int) -> float:
        """How far a router's selection bias moves after the step; not at all while the indexer trains alone."""
        rests = step >= self.steps - self.bias_rest_steps or self.attention_at(step) == "warmup"
        return 0.0 if rests else self.bias_speed

    def quantised_at(self, step: int) -> bool:
        """Whether the step's forward pass sees the released number formats."""
        return self.quantise_from is not None and step >= self.quantise_from

    def _decays(self, step: int) -> bool:
        return self.decay_steps > 0 and step >= self.steps - self.decay_steps

    def _stage(self, step: int) -> int:
        return sum(start <= step for start in self.length_starts) - 1

    def _rows(self, stage: int, first: int, end: int) -> np.ndarray:
        """Sequences of the steps [first, end) of a length stage, int64 [end - first]."""
        grown = np.minimum(1.0, np.arange(first, end) / self.batch_ramp_steps) if self.batch_ramp_steps else np.ones(end - first)
        tokens = self.first_batch_tokens + grown * (self.batch_tokens - self.first_batch_tokens)
        return np.maximum(1, tokens.astype(np.int64) // self.lengths[stage])

    def _taken(self, stage: int, step: int) -> int:
        """Sequences that the steps of a length stage have taken before `step`: a sum while the batch grows, then a product."""
        start = self.length_starts[stage]
        settled = min(step, max(start, self.batch_ramp_steps))
        return int(self._ramp_rows[stage][settled - start]) + (step - settled) * max(1, self.batch_tokens // self.lengths[stage])

    @cached_property
    def _ramp_rows(self) -> list[np.ndarray]:
        """For each length stage, the sequences taken before each of its steps until the batch has grown [steps + 1]."""
        ends = (*self.length_starts[1:], max(self.steps, self.batch_ramp_steps))
        return [np.concatenate([[0], np.cumsum(self._rows(stage, start, max(start, min(end, self.batch_ramp_steps))))])
                for stage, (start, end) in enumerate(zip(self.length_starts, ends, strict=True))]


def _grows(values: tuple[int, ...]) -> bool:
    return all(one < other for one, other in zip(values, values[1:], strict=False))
