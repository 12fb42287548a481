"""From logits to the next token: penalties, greedy or temperature with top-k, top-p and min-p, and a seed of the request's own."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fathom.errors import InputError

MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_BIASES = 16, 1024, 20, 1024


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop; temperature 0 is greedy, `seed` None draws a fresh one.

    `top_k` 0 and `min_p` 0 keep all tokens. Frequency and presence penalties are OpenAI's (over what was written), the repetition
    penalty is the CTRL paper's (over prompt and answer). `logprobs` asks for each token's log-probability and the
    so many most likely ones. `drawn` random numbers of the seed were used before: an answer that stopped after so many tokens goes on
    as if it had not. InputError names the field that is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    drawn: int = 0

    def __post_init__(self):
        for name, low, high, words in _RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InputError(f"{name} is {value}; allowed: {words}")
        if self.top_p == 0:
            raise InputError("top_p is 0; allowed: above 0, up to 1")
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty is 0; allowed: above 0, up to 10")
        if self.seed is not None and not -2**63 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; allowed: a 64-bit integer")
        if len(self.stop) > MOST_STOPS or any(not 0 < len(text) <= LONGEST_STOP for text in self.stop):
            raise InputError(f"stop: allowed are up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
        if len(self.logit_bias) > MOST_BIASES or not all(-100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise InputError(f"logit_bias: allowed are up to {MOST_BIASES} tokens with a bias from -100 to 100")

    def stopping_at(self, stop_ids: Sequence[int]) -> "Sampling":
        """The same, with these end tokens."""
        return replace(self, stop_ids=tuple(stop_ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < 1e-6

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def shapes_logits(self) -> bool:
        """Whether logits are changed before temperature."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1 or self.logit_bias)


_RANGES = (
    ("temperature", 0, 1e6, "0 (greedy) or above"), ("top_p", 0, 1, "above 0, up to 1"), ("max_tokens", 1, 2**40, "at least 1"),
    ("drawn", 0, 2**40, "0 or above"), ("top_k", 0, 2**31, "0 (all) or above"), ("min_p", 0, 1, "0 to 1"), ("frequency_penalty", -2, 2, "-2 to 2"),
    ("presence_penalty", -2, 2, "-2 to 2"), ("repetition_penalty", 0, 10, "above 0, up to 10"))


class Sampler:
    """Draws one answer's tokens; the same seed and logits give the same tokens whatever else runs."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), choice: int = 0):
        self.sampling = sampling
        self.written: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._random = random.Random() if sampling.seed is None else random.Random(f"{sampling.seed}/{choice}")
        for _ in range(sampling.drawn):
            self._random.random()

    def next_token(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> int:
        """A token id from logits [V], of those that `allowed_V` (bool) marks; it counts as written."""
        return choose([self], logits_V[None], [allowed_V])[0]

    def shaped(self, logits_V: Tensor) -> Tensor:
        """Logits after penalties and biases."""
        sampling = self.sampling
        logits_V = logits_V.clone()
        if sampling.repetition_penalty != 1 and (seen := [*self._seen | self.written.keys()]):
            seen_V = logits_V[seen]
            logits_V[seen] = torch.where(seen_V > 0, seen_V / sampling.repetition_penalty, seen_V * sampling.repetition_penalty)
        for token, count in self.written.items():
            logits_V[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        for token, bias in sampling.logit_bias.items():
            logits_V[token] += bias
        return logits_V

    def uniform(self) -> float:
        """The next random number of this answer, from 0 up to 1."""
        return self._random.random()


def choose(samplers: Sequence[Sampler], logits_BV: Tensor, allowed: Sequence[Tensor | None]) -> list[int]:
    """One token for each row of logits [B, V], by its own sampler; no row depends on another.

    A draw takes one random number and walks up the cumulative probabilities in the order of the vocabulary.
    """
    logits_BV = logits_BV.float().cpu()
    if any(sampler.sampling.shapes_logits for sampler in samplers) or any(mask_V is not None for mask_V in allowed):
        rows = []
        for sampler, logits_V, mask_V in zip(samplers, logits_BV, allowed, strict=True):
            shaped_V = sampler.shaped(logits_V) if sampler.sampling.shapes_logits else logits_V
            rows.append(shaped_V if mask_V is None else shaped_V.masked_fill(~mask_V, -math.inf))
        logits_BV = torch.stack(rows)
    tokens = logits_BV.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.sampling.greedy]
    if drawn:
        for row, token in zip(drawn, _draw([samplers[row] for row in drawn], logits_BV[drawn]), strict=True):
            tokens[row] = token
    for sampler, token in zip(samplers, tokens, strict=True):
        if sampler.sampling.shapes_logits:
            sampler.written[token] += 1
    return tokens


def _draw(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[int]:
    settings = [sampler.sampling for sampler in samplers]
    probability_BV = (logits_BV / torch.tensor([each.temperature for each in settings])[:, None]).softmax(-1)
    if any(each.filters for each in settings):
        probability_BV = torch.stack([filtered(row_V, each) if each.filters else row_V
                                      for row_V, each in zip(probability_BV, settings, strict=True)])
    reached_BV = probability_BV.double().cumsum(-1)
    aim_B1 = torch.tensor([sampler.uniform() for sampler in samplers], dtype=torch.float64)[:, None] * reached_BV[:, -1:]
    token_B1 = torch.searchsorted(reached_BV, aim_B1, right=True)
    return token_B1.squeeze(1).clamp(max=logits_BV.shape[1] - 1).tolist()


def filtered(probability_V: Tensor, sampling: Sampling) -> Tensor:
    """Of probabilities [V] only top-k, of those the nucleus, of those what min-p keeps; the others 0, not normalised."""
    if 0 < sampling.top_k < len(probability_V):
        kept = probability_V.topk(sampling.top_k)
        probability_V = torch.zeros_like(probability_V).scatter(0, kept.indices, kept.values)
    if sampling.top_p < 1:
        probability_V = _nucleus(probability_V / probability_V.sum(), sampling.top_p)
    if sampling.min_p:
        probability_V = probability_V.where(probability_V >= sampling.min_p * probability_V.max(), 0.0)
    return probability_V


def _nucleus(probability_V: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most likely tokens whose probabilities reach top_p; the most likely one always stays."""
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    dropped_V = sorted_V.cumsum(0) - sorted_V >= top_p
    return probability_V.scatter(0, order_V[dropped_V], 0.0)


def log_probabilities(logits_V: Tensor, token: int, most: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of one token, and of the `most` likely ones, from the model's own logits [V]."""
    logs_V = logits_V.float().log_softmax(-1)
    top = logs_V.topk(min(most, len(logs_V)))
    return float(logs_V[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
