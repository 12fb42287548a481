"""Rollouts as they are played, and Samples as they are trained on: token ids, what the model wrote of them, and weights.

A Rollout is one episode on one task; a Group all rollouts of one prompt; a Sample what a training step takes from a rollout. Samples
are packed into rows like documents, with the numbers of every learned position beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fathom.align.environments.base import EFFORTS, Score, Task
from fathom.data.packing import Batch, best_fit
from fathom.errors import DataError, RecipeError
from fathom.ops import IGNORE
from fathom.text import chat
from fathom.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Mode:
    """A reasoning effort as it is trained or measured (report 5.1.1, table 2).

    `tokens` bounds all that is written in an episode. `length_penalty` is the share of the reward that an answer of full length loses;
    weaker for "max". `thinking_budget`, if given, ends the reasoning of a turn after so many tokens by writing its closing tag.
    """

    effort: str = "high"
    tokens: int = 256
    length_penalty: float = 0.0
    thinking_budget: int | None = None

    def __post_init__(self):
        if self.effort not in EFFORTS:
            raise RecipeError(f"effort is {self.effort!r}; allowed: {', '.join(EFFORTS)}")
        if self.tokens < 1 or not 0 <= self.length_penalty <= 1 or (self.thinking_budget or 0) < 0:
            raise RecipeError(f"mode {self.effort}: tokens is {self.tokens}, length_penalty {self.length_penalty}, thinking_budget "
                              f"{self.thinking_budget}; allowed: at least 1, from 0 to 1, at least 0")

    @property
    def thinking(self) -> bool:
        """Whether the model reasons before it answers."""
        return EFFORTS[self.effort][0] == "thinking"


@dataclass(eq=False)
class Rollout:
    """An episode while it is played, and afterwards. `written` marks the tokens that the model chose itself.

    `finish`: "stop", "length" (tokens or context ran out) or None. `turns` are the messages after the task's own.
    """

    task: Task
    mode: Mode
    group: int
    member: int
    tokens: list[int]
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of written tokens, in the engine
    turns: list[dict] = field(default_factory=list)
    turn_start: int = 0  # the first token of the answer that is being written
    finish: str | None = None
    score: Score | None = None

    def __post_init__(self):
        self.written = [False] * len(self.tokens)
        self.turn_start = len(self.tokens)

    @property
    def count(self) -> int:
        """Tokens that the model wrote."""
        return len(self.logprobs)

    def write(self, token: int, logprob: float) -> None:
        """Take a token that the model chose."""
        self.tokens.append(token)
        self.written.append(True)
        self.logprobs.append(logprob)

    def give(self, tokens: Sequence[int]) -> None:
        """Take tokens that the model did not choose."""
        self.tokens += tokens
        self.written += [False] * len(tokens)

    def reward(self, invalid: float) -> float:
        """The score less the length penalty, which touches right answers only, and less `invalid` for a broken answer or tool call."""
        shortened = self.score.reward * (1 - self.mode.length_penalty * min(1.0, self.count / self.mode.tokens))
        return shortened - invalid * self.is_invalid

    @property
    def is_invalid(self) -> bool:
        """Whether the last answer, or any tool call, broke the format."""
        return not self.score.valid or self.score.valid_calls < self.score.calls


def prompt_ids(task: Task, effort: str, turns: list[dict], tokenizer: Tokenizer) -> list[int]:
    """Token ids of the task's messages and `turns`, with all reasoning kept."""
    mode, reasoning_effort = EFFORTS[effort]
    return chat.tokenize(task.messages + turns, tokenizer, mode, reasoning_effort, drop_thinking=False)


def following_ids(task: Task, effort: str, turns: list[dict], results: list[dict], tokenizer: Tokenizer) -> list[int]:
    """Token ids that `results` add after the turns, up to where the model goes on."""
    mode, reasoning_effort = EFFORTS[effort]
    before, after = (chat.segments(messages, mode, reasoning_effort, drop_thinking=False)
                     for messages in (task.messages + turns, task.messages + turns + results))
    return tokenizer.encode_segments(after[len(before):])


@dataclass(frozen=True)
class Sample:
    """What a step learns from one rollout. `learned` marks the tokens that are targets; `advantage` and `weight` hold for all of them.

    `teacher` is the number of the teacher whose distribution is learned, in distillation.
    """

    tokens: list[int]
    learned: list[bool]
    advantage: float = 0.0
    weight: float = 1.0
    teacher: int = 0


@dataclass(frozen=True)
class SampleBatch(Batch):
    """Packed samples. N counts targets in the order of rows; `sample_N` int64 names each one's sample.

    `numbers` holds what belongs to targets, samples or positions by name (old_logs_N, advantage_U, ...), `metrics` is for the log.
    """

    sample_N: Tensor
    numbers: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> Self:
        """The same on a device, its numbers too."""
        return replace(super().to(device), numbers={name: tensor.to(device) for name, tensor in self.numbers.items()})

    @property
    def learned_BS(self) -> Tensor:
        """Whether a position predicts a target, bool [B, S]."""
        return self.targets_BS != IGNORE


def pack_samples(samples: Sequence[Sample], row_tokens: int, pad_id: int) -> SampleBatch:
    """Samples in rows of `row_tokens` (or of the longest sample), best fit; every learned token but a first one is a target once.

    DataError for a sample that has nothing to learn.
    """
    if not samples:
        raise DataError("there are no samples to learn from")
    for number, sample in enumerate(samples):
        if len(sample.tokens) != len(sample.learned) or not any(sample.learned[1:]):
            raise DataError(f"sample {number} has {len(sample.tokens)} tokens, {len(sample.learned)} flags and nothing to learn")
    inputs = np.array([len(sample.tokens) - 1 for sample in samples])
    S = max(row_tokens, int(inputs.max()))
    order, row_ends = best_fit(inputs, S)
    shape = len(row_ends), S
    tokens, targets, positions, owner = (np.full(shape, fill, dtype=np.int64) for fill in (pad_id, IGNORE, 0, -1))
    for row, pieces in enumerate(np.split(order, row_ends[:-1])):
        at = 0
        for number in pieces.tolist():
            ids, end = np.array(samples[number].tokens), at + inputs[number]
            learned = np.array(samples[number].learned[1:])
            tokens[row, at:end], positions[row, at:end], owner[row, at:end] = ids[:-1], np.arange(inputs[number]), number
            targets[row, at:end] = np.where(learned, ids[1:], IGNORE)
            at = end
    arrays = [torch.from_numpy(array) for array in (tokens, targets, positions, owner)]
    sample_N = arrays[3][arrays[1] != IGNORE]
    numbers = {"advantage_U": torch.tensor([sample.advantage for sample in samples]),
               "weight_U": torch.tensor([sample.weight for sample in samples]),
               "teacher_U": torch.tensor([sample.teacher for sample in samples])}
    return SampleBatch(*arrays[:3], sample_N, numbers)


def join_batches(batches: Sequence[SampleBatch]) -> SampleBatch:
    """Batches with rows of one length below each other, samples and numbers of targets and samples in the same order."""
    before = np.cumsum([0, *(len(batch.numbers["weight_U"]) for batch in batches)])[:-1]
    return SampleBatch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens_BS", "targets_BS", "positions_BS")),
                       torch.cat([batch.sample_N + int(first) for batch, first in zip(batches, before, strict=True)]),
                       {name: torch.cat([batch.numbers[name] for batch in batches]) for name in batches[0].numbers})
