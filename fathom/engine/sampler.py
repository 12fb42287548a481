"""From logits to the next token: greedy, or temperature and top-p with a seed of the request's own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; temperature 0 is greedy. `max_tokens` bounds the answer, `seed` None draws a fresh one."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 256

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; allowed: 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; allowed: above 0, up to 1")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; allowed: at least 1")
        if self.seed is not None and not -2**63 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; allowed: a 64-bit integer")


class Sampler:
    """Draws one request's tokens; the same seed and logits give the same tokens whatever else runs."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def next_token(self, logits_V: Tensor) -> int:
        """A token id from logits [V]."""
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        probability_V = (logits_V.float().cpu() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            probability_V = _nucleus(probability_V, self.sampling.top_p)
        # Gumbel-max, as the released generate.py: the largest p / Exp(1) is a draw from p.
        noise_V = torch.empty_like(probability_V).exponential_(generator=self.generator)
        return int((probability_V / noise_V.clamp(min=torch.finfo(noise_V.dtype).tiny)).argmax())


def _nucleus(probability_V: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most likely tokens whose probabilities reach top_p; the most likely one always stays."""
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    dropped_V = sorted_V.cumsum(0) - sorted_V >= top_p
    return probability_V.scatter(0, order_V[dropped_V], 0.0)
