"""The folder of a run: its resolved recipe, the environment it ran in, and whether it starts or continues."""

import copy
import dataclasses
import json
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console

from fathom import recipe as recipes
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import TrainingState, find_model, list_checkpoints, load_checkpoint
from fathom.errors import CheckpointError, RecipeError
from fathom.files import alone_in, write_text
from fathom.model.transformer import Transformer
from fathom.optim.muon import Optimizer
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Stage, seconds_a_step
from fathom.train.parallel import parallelise
from fathom.train.rank_optimizer import make_optimizer
from fathom.train.ranks import ALONE, Ranks

RECIPE = "recipe.toml"
MIN_STEPS = 10
Recipe = TypeVar("Recipe")


def start_run(run: Path, recipe: Any) -> None:
    """Make a new run's folder with its resolved recipe; a folder that holds a run already is never overwritten."""
    if list_checkpoints(run):
        raise RecipeError(f"{run} already holds a run; --resume continues it, --set run=... starts another")
    with alone_in(run):  # a run that has no checkpoint yet may be in training
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        write_text(run / RECIPE, recipes.dump(recipe))
    environment = {"python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__,
                   "threads": torch.get_num_threads(), "fathom": metadata.version("fathom")}
    write_text(run / "environment.json", json.dumps(environment, indent=2) + "\n")


def fit_minutes(recipe: Recipe, model: Transformer, stage_of: Callable[[Transformer], Stage],
                console: Console, ranks: Ranks = ALONE) -> Recipe:
    """The recipe with as many steps as this machine does in its minutes, timed on a copy of the model and stored with
    the run; all counts of steps keep their shares.
    """
    trial = parallelise(copy.deepcopy(model), ranks)
    optimizer = make_optimizer(trial, recipe.muon, recipe.adamw, ranks, getattr(recipe, "optimizer", "muon"))
    seconds = seconds_a_step(trial, optimizer, stage_of(trial), recipe.loop, ranks)
    steps = max(MIN_STEPS, round(recipe.minutes * 60 / seconds))
    console.print(f"{seconds:.2f} s a step: {steps} steps in {recipe.minutes:g} minutes", soft_wrap=True)
    recipe = dataclasses.replace(recipe, schedule=recipe.schedule.scaled_to(steps))
    ranks.lead(lambda: write_text(Path(recipe.run) / RECIPE, recipes.dump(recipe)))
    return recipe


def resumed_recipe(run: Path, given: Recipe) -> Recipe:
    """The recipe that `run` was started with. RecipeError where there is no run, or where `given` differs from it:
    another recipe would bend the curve. Steps that were measured from minutes are the run's own; how the work is spread over
    processes changes no curve and is what is given.
    """
    if not (run / RECIPE).is_file():
        raise RecipeError(f"{run} holds no run to resume; leave --resume out to start one")
    stored = recipes.load(type(given), run / RECIPE)
    if getattr(given, "minutes", None):
        given = dataclasses.replace(given, schedule=stored.schedule)
    if hasattr(given, "parallel"):
        stored = dataclasses.replace(stored, parallel=given.parallel)
    old = recipes.dump(stored).splitlines()
    for line in recipes.dump(given).splitlines():
        if line not in old:
            raise RecipeError(f"{run} was started with another recipe (now: {line}); resume it unchanged, or start "
                              "another run with --set run=...")
    return stored


def continue_run(run: Path) -> tuple[Transformer, TrainingState]:
    """The newest checkpoint's model and state, with torch's random state set back."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise CheckpointError(f"{run} holds no checkpoint yet; delete the folder and start again without --resume")
    model, state = load_checkpoint(checkpoints[-1])
    torch.set_rng_state(state.random_state)
    return model, state


class Tuned(NamedTuple):
    """A run that goes on from another model: its resolved recipe, what it tunes, and where it was stopped, if it was."""

    recipe: Any
    model: Transformer
    tokenizer: Tokenizer
    state: TrainingState | None


def tuned_run(recipe: Any, resume: bool, ranks: Ranks = ALONE) -> Tuned:
    """Start a run from `recipe.base`, or continue it. RecipeError, CheckpointError as `start_run`, `resumed_recipe` and `continue_run`."""
    run = Path(recipe.run)
    if resume:
        recipe = resumed_recipe(run, recipe)
        model, state = first_continues(run, ranks)
        return Tuned(recipe, model, Tokenizer.load(run / "tokenizer"), state)
    folder = find_model(recipe.base)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)

    def start() -> None:
        start_run(run, recipe)
        (run / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(run / "tokenizer")

    ranks.lead(start)
    return Tuned(recipe, model, tokenizer, None)


def first_continues(run: Path, ranks: Ranks) -> tuple[Transformer, TrainingState]:
    """`continue_run` on every rank; on the first one alone before the others, so that what is wrong with a checkpoint is said once."""
    loaded: list[tuple[Transformer, TrainingState]] = []
    ranks.lead(lambda: loaded.append(continue_run(run)))
    return loaded[0] if loaded else continue_run(run)


def restored(optimizer: Optimizer, state: TrainingState | None) -> Optimizer:
    """The optimiser with the state of a checkpoint, or as it is for a fresh start."""
    if state is not None:
        optimizer.load_state_tensors(state.optimizer)
    return optimizer
