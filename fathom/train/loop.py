"""The one loop: batches, a loss, an optimiser -> steps, with checkpoints, resume, Ctrl-C and a NaN guard.

Used by every stage. A stage is three functions of the step; everything the loop must remember is the step itself,
the weights and the optimiser, so a resumed run continues bit for bit.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fathom.checkpoint.training import (
    TrainingState,
    checkpoint_folder,
    list_checkpoints,
    prune_checkpoints,
    random_state,
    save_checkpoint,
)
from fathom.data.packing import Batch
from fathom.errors import FathomError, RecipeError
from fathom.model.transformer import Transformer
from fathom.optim.muon import Optimizer
from fathom.text.tokenizer import Tokenizer
from fathom.train.objective import Losses, Share, move_router_biases
from fathom.train.parallel import clip_gradients, gradient_norm, whole_model
from fathom.train.qat import released_numbers
from fathom.train.ranks import ALONE, Nobody, Ranks
from fathom.train.shares import gradients, tokens_of
from fathom.train.tracking import Tracker, draw_curve

TRIAL_STEPS = 6


@dataclass(frozen=True)
class Loop:
    """How often a run saves and looks, and how far a gradient may reach."""

    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    validate_every: int = 100
    clip_norm: float = 1.0

    def __post_init__(self):
        for name in ("checkpoint_every", "keep_checkpoints", "validate_every", "clip_norm"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: above 0")


@dataclass(frozen=True)
class Stage:
    """What one kind of training does at a step (counted from 0)."""

    batch: Callable[[int], Batch]  # this rank's rows
    loss: Callable[[Batch | Share, int], Losses]
    rate: Callable[[int], float]
    bias_speed: Callable[[int], float]
    validate: Callable[[], float] | None  # bits per byte
    quantised: Callable[[int], bool]  # whether forward and backward see the released number formats


class Diverged(FathomError):
    """The loss or the gradient is no number any more."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a termination signal, after the state was saved; every rank stops together."""

    shared = True


def run_stage(run: Path, model: Transformer, tokenizer: Tokenizer, optimizer: Optimizer, stage: Stage, steps: int,
              start: int, settings: Loop, console: Console, ranks: Ranks = ALONE) -> None:
    """Train from step `start` to `steps`, then draw the curve. Raises Stopped after a signal, with everything saved."""

    def save(done: int) -> None:
        state = TrainingState(done, optimizer.state_tensors(), random_state())
        whole = whole_model(model, ranks)
        ranks.lead(lambda: save_checkpoint(checkpoint_folder(run, done), whole, tokenizer, state))
        ranks.lead(lambda: prune_checkpoints(run, settings.keep_checkpoints))

    model.train()
    saved = start if list_checkpoints(run) else -1
    with Tracker(run, steps, start, console) if ranks.first else Nobody() as tracker, _interrupts() as interrupted:
        for step in range(start, steps):
            began = time.monotonic()
            metrics = take_step(model, optimizer, stage, step, settings, ranks)
            metrics["tokens_per_second"] = metrics["tokens"] / (time.monotonic() - began)
            done = step + 1
            tracker.record(done, metrics)
            if stage.validate and (done % settings.validate_every == 0 or done == steps):
                with _numbers(model, stage, step):
                    tracker.record_validation(done, stage.validate())
                ranks.lead(lambda: draw_curve(run))
            stop = ranks.any(bool(interrupted) or ranks.orphaned())
            if stop or done == steps or done % settings.checkpoint_every == 0:
                save(saved := done)
            if stop and done < steps:
                tracker.say(f"stopped after step {done}; everything is saved, --resume continues")
                raise Stopped(interrupted[0] if interrupted else signal.SIGTERM)
        if saved < steps:
            save(steps)
    ranks.lead(lambda: draw_curve(run))
    model.eval()


def seconds_a_step(model: Transformer, optimizer: Optimizer, stage: Stage, settings: Loop, ranks: Ranks = ALONE) -> float:
    """Median time of a training step on this machine, the first one not counted. Spoils the model: hand in a copy."""
    seconds = []
    for step in range(TRIAL_STEPS):
        began = time.monotonic()
        take_step(model, optimizer, stage, step, settings, ranks)
        seconds.append(time.monotonic() - began)
    return ranks.largest(statistics.median(seconds[1:]))


def take_step(model: Transformer, optimizer: Optimizer, stage: Stage, step: int, settings: Loop, ranks: Ranks) -> dict[str, float]:
    """One step on this rank, in step with the others; its metrics. Diverged, on every rank, where the numbers are none."""
    batch = stage.batch(step)
    optimizer.zero_grad()
    with _numbers(model, stage, step):
        losses = gradients(model, stage.loss, batch, step, ranks)
    norm = gradient_norm(model, ranks)
    if not (math.isfinite(norm) and all(map(math.isfinite, losses.parts.values()))):
        raise ranks.together(Diverged(
            f"step {step + 1} gave loss {losses.parts['loss']} and gradient norm {float(norm)}; nothing was updated: "
            "lower the learning rate and resume from the last checkpoint"))
    clip_gradients(model, norm, settings.clip_norm)
    rate = stage.rate(step)
    optimizer.step(rate)
    load = move_router_biases(model, losses.observations, stage.bias_speed(step))
    return losses.parts | load | {"gradient_norm": float(norm), "rate": rate, "tokens": tokens_of(batch, ranks)}


def _numbers(model: Transformer, stage: Stage, step: int) -> AbstractContextManager[None]:
    return released_numbers(model) if stage.quantised(step) else nullcontext()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM in a list, for the loop to finish its step; a second one acts at once."""
    received: list[int] = []
    previous = {}

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not the main thread: signals stay with their owner
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
