"""What goes into the engine and what comes out of it: requests, their answers piece by piece, and the counters of an engine."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fathom.engine.grammar import Constraint
from fathom.engine.sampler import Sampling
from fathom.errors import InputError

FinishReason = Literal["stop", "length", "cancelled"]
MOST_CHOICES = 128


@dataclass(frozen=True)
class Request:
    """Token ids to continue, in `choices` independent ways.

    `tenant` separates prefix caches: requests of different tenants never share anything. `input_end` counts the prompt's tokens up to
    the end of the user's input (before the think tag), from where a next turn can go on. `constraint` bounds what may be
    written. `first_choice` is the number of the first choice, which with the seed decides what is drawn.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    choices: int = 1
    tenant: str = ""
    input_end: int | None = None
    constraint: Constraint | None = None
    first_choice: int = 0

    def __post_init__(self):
        if not 1 <= self.choices <= MOST_CHOICES:
            raise InputError(f"n is {self.choices}; allowed: 1 to {MOST_CHOICES}")
        if self.first_choice < 0:
            raise InputError(f"first_choice is {self.first_choice}; allowed: 0 or above")
        if self.input_end is not None and not 0 <= self.input_end <= len(self.prompt):
            raise InputError(f"input_end is {self.input_end}; the prompt has {len(self.prompt)} tokens")


@dataclass(frozen=True)
class Limits:
    """What a model can take: tokens of prompt and answer together, ids of its vocabulary, and how many of those can be written."""

    max_tokens: int
    context: int  # of the model; max_tokens is less where memory is what limits
    vocab_size: int
    known: int

    def check(self, request: Request) -> None:
        """InputError for a request that the model cannot take."""
        prompt = request.prompt
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= self.max_tokens:
            limit = "max_position_embeddings" if self.max_tokens == self.context else "cache_bytes"
            raise InputError(f"the prompt has {len(prompt)} tokens; the model holds {self.max_tokens} ({limit}), the answer included")
        wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size} ids")
        if unknown := [token for token in request.sampling.logit_bias if not 0 <= token < self.known]:
            raise InputError(f"logit_bias: token id {unknown[0]} is outside the {self.known} ids that can be written")


class Written(NamedTuple):
    """A generated token: its id, its log-probability and those of the most likely ones, before temperature; None where not asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """What one step added to one choice of a request.

    `text` is what became certain: whole characters, nothing that may still turn out to be the start of a stop string. The
    last output of a choice says why it ended, and which stop string did it; that and the end token's text are not
    part of the text. `hit_tokens` of the prompt came from the prefix cache.
    """

    request: int
    choice: int
    text: str
    tokens: tuple[Written, ...]
    finish: FinishReason | None
    hit_tokens: int
    stop: str | None = None


class Stats(NamedTuple):
    """Counters since the start, and gauges (running, waiting, used and cached blocks, cache bytes) of an engine."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0  # in the pool
    blocks_used: int = 0  # held by running requests
    blocks_cached: int = 0  # held by the prefix cache alone
    block_bytes: int = 0
    state_bytes: int = 0  # of checkpoints in memory
    prompt_tokens: int = 0
    hit_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    disk_bytes: int = 0
    disk_errors: int = 0
    disk_dropped: int = 0  # damaged files found and removed
