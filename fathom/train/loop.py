"""The one loop: batches, a loss, an optimiser -> steps, with checkpoints, resume, Ctrl-C and a NaN guard.

Used by every stage. A stage is three functions of the step; everything the loop must remember is the step itself,
the weights and the optimiser, so a resumed run continues bit for bit.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

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
from fathom.files import alone_in
from fathom.memory import keep_freed_memory
from fathom.model.transformer import Transformer
from fathom.ops.precision import PRECISIONS, narrow_dtype, products_in
from fathom.optim.muon import Optimizer
from fathom.optim.schedules import Attention
from fathom.text.tokenizer import Tokenizer
from fathom.train.finite import find_not_finite
from fathom.train.objective import Losses, Share, move_router_biases
from fathom.train.parallel import clip_gradients, gradient_norm, whole_model
from fathom.train.phases import attending
from fathom.train.qat import released_numbers
from fathom.train.ranks import ALONE, Nobody, Ranks
from fathom.train.shares import gradients, tokens_of
from fathom.train.stability import Guard, Stability
from fathom.train.tracking import Tracker, Tracking, draw_curve
from fathom.train.watch import Watch

TRIAL_STEPS = 6


@dataclass(frozen=True)
class Loop:
    """How often a run saves and looks, how far a gradient may reach, and what matrix products compute in: `precision` "float32",
    "bfloat16" (mixed precision: weights and sums stay float32), or "auto", bfloat16 where the device multiplies it natively.
    """

    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    validate_every: int = 100
    clip_norm: float = 1.0
    precision: str = "float32"

    def __post_init__(self):
        for name in ("checkpoint_every", "keep_checkpoints", "validate_every", "clip_norm"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: above 0")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Stage:
    """What one kind of training does at a step (counted from 0)."""

    batch: Callable[[int], Batch]  # this rank's rows
    loss: Callable[[Batch | Share, int], Losses]
    rate: Callable[[int], float]
    bias_speed: Callable[[int], float]
    validate: Callable[[], float] | None  # bits per byte
    quantised: Callable[[int], bool]  # whether forward and backward see the released number formats
    attention: Callable[[int], Attention] = lambda step: "sparse"
    sample: Callable[[Transformer], list[dict[str, str]]] | None = None  # texts of the whole model as it is, written at checkpoints
    flops: Callable[[int], float] | None = None  # of training on one of the step's tokens
    peak_flops: float | None = None  # a second, of all ranks' devices together, where that is known


def speed(metrics: dict[str, Any], stage: Stage, step: int) -> dict[str, float]:
    """Tokens a second of a step with its `tokens` and `seconds` and, where the stage says what they cost, FLOPs a second and the share of
    the devices' peak (MFU).
    """
    found = {"tokens_per_second": metrics["tokens"] / metrics["seconds"]}
    if stage.flops:
        found["flops_per_second"] = found["tokens_per_second"] * stage.flops(step)
        if stage.peak_flops:
            found["mfu"] = found["flops_per_second"] / stage.peak_flops
    return found


class Diverged(FathomError):
    """The loss or the gradient is no number any more."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a termination signal, after the state was saved; every rank stops together."""

    shared = True


def run_stage(run: Path, model: Transformer, tokenizer: Tokenizer, optimizer: Optimizer, stage: Stage, steps: int,
              start: int, settings: Loop, console: Console, guard: Guard | None = None, tracking: Tracking | None = None,
              ranks: Ranks = ALONE) -> None:
    """Train from step `start` to `steps`, then draw the curve. Raises Stopped after a signal, with everything saved. Without a
    `guard`, spikes are left alone; `tracking` says what is recorded beside the losses. All `ranks` call it; the first one writes.
    """
    guard, tracking = guard or Guard(Stability(enabled=False)), tracking or Tracking()
    watch = Watch(model, tracking.layers_every if ranks.one_pass else 0)
    keep_freed_memory()

    def save(done: int) -> None:
        began = time.monotonic()
        state = TrainingState(done, optimizer.state_tensors(), random_state(), guard.state_tensors())
        whole = whole_model(model, ranks)
        ranks.lead(lambda: save_checkpoint(checkpoint_folder(run, done), whole, tokenizer, state))
        ranks.lead(lambda: prune_checkpoints(run, settings.keep_checkpoints, settings.checkpoint_every))
        tracker.record_checkpoint(done, time.monotonic() - began)
        if stage.sample and tracking.prompts:
            ranks.lead(lambda: _sample(whole, stage, done, tracker))
            model.train()

    model.train()
    saved, step = start if list_checkpoints(run) else -1, start
    with (alone_in(run) if ranks.first else nullcontext(), _interrupts() as interrupted,
          Tracker(run, steps, start, console, tracking.tensorboard) if ranks.first else Nobody() as tracker):
        while step < steps:
            began = time.monotonic()
            metrics = take_step(model, optimizer, stage, step, settings, ranks, guard, watch)
            metrics["seconds"] = time.monotonic() - began
            metrics |= speed(metrics, stage, step)
            done = step + 1
            tracker.record(done, metrics)
            if guard.sees_spike(step, metrics["loss"], metrics["gradient_norm"], _kind(metrics, stage, step)):
                step = _go_back(run, step, model, optimizer, settings, guard, tracker, ranks)
                continue
            if stage.validate and (done % settings.validate_every == 0 or done == steps):
                _validate(model, stage, step, tracker)
                ranks.lead(lambda: draw_curve(run))
            stop = ranks.any(bool(interrupted) or ranks.orphaned())
            if stop or done == steps or done % settings.checkpoint_every == 0:
                save(saved := done)
            if stop and done < steps:
                tracker.say(f"stopped after step {done}; everything is saved, --resume continues")
                raise Stopped(interrupted[0] if interrupted else signal.SIGTERM)
            step = done
        if saved < steps:
            save(steps)
        tracker.summarise()
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


def take_step(model: Transformer, optimizer: Optimizer, stage: Stage, step: int, settings: Loop, ranks: Ranks = ALONE,
              guard: Guard | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """One step on this rank, in step with the others, with what it showed. Raises Diverged, on every rank and before anything is
    updated, where a number is none.
    """
    guard, watch = guard or Guard(Stability(enabled=False)), watch or Watch(model, 0)
    began, done = time.monotonic(), step + 1
    batch = stage.batch(step)
    data_seconds = time.monotonic() - began
    optimizer.zero_grad()
    products = products_in(narrow_dtype(settings.precision, next(model.parameters()).device))
    with _as_at(model, stage, step), products, guard.routing(model, step, lambda ahead: stage.loss(stage.batch(ahead), ahead)):
        losses = gradients(model, stage.loss, batch, step, ranks, lambda: watch.forward(done))
        watch.before_update(done)
        total_norm = gradient_norm(model, ranks)
        norm = float(total_norm)
        if not (math.isfinite(norm) and all(map(math.isfinite, losses.parts.values()))):
            raise ranks.together(_diverged(model, stage, step, batch, losses, norm, ranks))
    clip_gradients(model, total_norm, settings.clip_norm)  # not before: it would spread a NaN
    rate = stage.rate(step)
    optimizer.step(rate)
    seen = watch.figures(done, losses.observations, rate) or {}
    load = move_router_biases(model, losses.observations, stage.bias_speed(step))
    return losses.parts | load | seen | {
        "gradient_norm": norm, "rate": rate, "tokens": tokens_of(batch, ranks), "length": batch.tokens_BS.shape[1],
        "attention": stage.attention(step), "anticipates": int(guard.anticipates(step)), "data_seconds": data_seconds}


def _diverged(model: Transformer, stage: Stage, step: int, batch: Batch, losses: Losses, norm: float, ranks: Ranks) -> Diverged:
    where = ""
    if ranks.count == 1:  # parts of a model have no layer's whole output
        where = f"the first number that is none is in {find_not_finite(model, lambda: stage.loss(batch, step))}; "
    return Diverged(f"step {step + 1} gave loss {losses.parts['loss']} and gradient norm {norm}; {where}nothing was updated: lower the "
                    "learning rate and resume from the last checkpoint")


def _sample(model: Transformer, stage: Stage, done: int, tracker: Tracker) -> None:
    began = time.monotonic()
    with _as_at(model, stage, done - 1):
        samples = stage.sample(model)
    tracker.record_samples(done, samples, time.monotonic() - began)


def _validate(model: Transformer, stage: Stage, step: int, tracker: Tracker) -> None:
    began = time.monotonic()
    with _as_at(model, stage, step):
        score = stage.validate()
    tracker.record_validation(step + 1, score, time.monotonic() - began)


def _go_back(run: Path, step: int, model: Transformer, optimizer: Optimizer, settings: Loop, guard: Guard, tracker: Tracker,
             ranks: Ranks) -> int:
    """Leave a spike behind; the step to continue with."""
    target = guard.roll_back(run, step, settings.checkpoint_every, model, optimizer, ranks)
    tracker.record_spike(step + 1, target)
    return step + 1 if target is None else target


def _kind(metrics: dict[str, Any], stage: Stage, step: int) -> tuple[int, int]:
    """What has to be alike for the losses of two steps to be compared: sequence length and attention."""
    return metrics["length"], get_args(Attention).index(stage.attention(step))


@contextmanager
def _as_at(model: Transformer, stage: Stage, step: int) -> Iterator[None]:
    """The number formats and the attention of a step."""
    with released_numbers(model) if stage.quantised(step) else nullcontext(), attending(model, stage.attention(step)):
        yield


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
