"""Scores of a model on held-out tasks, by environment and reasoning mode, and against the thinking budget."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fathom.align.domains import Domains
from fathom.align.environments.base import EFFORTS, SEEDS, Environment
from fathom.align.judge import reveal_truth
from fathom.align.rollout import Draw, environments_named, new_engine, new_rollouts, play
from fathom.align.sample import Mode, Rollout
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.errors import InputError
from fathom.files import write_text
from fathom.text.tokenizer import Tokenizer

Row = dict[str, str | int | float | None]


def score(path: str | Path, names: Sequence[str], known: Mapping[str, Environment], tasks: int, modes: Sequence[Mode],
          levels: Sequence[int], budgets: Sequence[int | None] = (None,), draw: Draw = Draw(), seed: int = 0) -> list[Row]:
    """A row for each environment, mode and thinking budget (None: without), over the same held-out tasks, levels in equal parts.

    Each row: environment, effort, budget, tasks, score (mean reward), error (its standard error), solved (share with the full
    reward), tokens (written, mean), cut and invalid (shares), calls and valid_calls.
    """
    if tasks < 1:
        raise InputError(f"tasks is {tasks}; allowed: at least 1")
    folder = find_model(path)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    environments = environments_named(names, known)
    asked = [(environment.task((seed * tasks + number) % SEEDS, "held_out", existing[number % len(existing)]), replace(mode, thinking_budget=budget))
             for environment in environments.values()
             for existing in [[level for level in levels if level in environment.levels] or [environment.levels[0]]]
             for mode in modes for budget in (budgets if mode.thinking else (None,)) for number in range(tasks)]
    rollouts = new_rollouts(asked, 1, tokenizer)
    engine = new_engine(model, tokenizer, draw, len(rollouts))
    play(engine, rollouts, environments, draw, seed)
    reveal_truth(rollouts, environments)
    engine.close()
    return [_row(rollouts[first:first + tasks]) for first in range(0, len(rollouts), tasks)]


def _row(rollouts: Sequence[Rollout]) -> Row:
    rewards, count = [rollout.score.reward for rollout in rollouts], len(rollouts)
    mean, first = sum(rewards) / count, rollouts[0]
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / max(count - 1, 1))
    return {"environment": first.task.domain, "effort": first.mode.effort, "budget": first.mode.thinking_budget, "tasks": count,
            "score": mean, "error": deviation / math.sqrt(count), "solved": sum(reward >= 1 for reward in rewards) / count,
            "tokens": sum(rollout.count for rollout in rollouts) / count,
            "cut": sum(rollout.finish == "length" for rollout in rollouts) / count,
            "invalid": sum(rollout.is_invalid for rollout in rollouts) / count,
            "calls": sum(rollout.score.calls for rollout in rollouts), "valid_calls": sum(rollout.score.valid_calls for rollout in rollouts)}


def show_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print rows as a table."""
    table = Table("environment", "mode", "budget", "tasks", "score", "tokens", "cut", "invalid", "valid calls", title=title)
    for row in rows:
        calls = f"{row['valid_calls']} of {row['calls']}" if row["calls"] else "-"
        table.add_row(row["environment"], row["effort"], "-" if row["budget"] is None else str(row["budget"]), str(row["tasks"]),
                      f"{row['score']:.1%} ± {row['error']:.1%}", f"{row['tokens']:.0f}", f"{row['cut']:.0%}", f"{row['invalid']:.0%}", calls)
    console.print(table)


def score_command(path: Path, names: str, tasks: int, modes: str, levels: str, budgets: str, max_tokens: int, temperature: float,
                  seed: int, out: Path | None) -> None:
    """`fathom score` with its lists as texts. Prints a table, or with `out` writes the rows there as JSON too."""
    efforts = modes.split(",")
    for effort in efforts:
        if effort not in EFFORTS:
            raise InputError(f"mode is {effort!r}; allowed: {', '.join(EFFORTS)}")
    rows = score(path, names.split(","), Domains(), tasks, [Mode(effort, max_tokens) for effort in efforts], _numbers(levels, "levels"),
                 [None, *_numbers(budgets, "budgets")], Draw(temperature, running=192), seed)
    if out is not None:
        write_text(out, json.dumps(rows, indent=2) + "\n")
    show_rows(rows, f"{path}, held-out tasks, temperature {temperature:g}", Console())


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{name} is {text!r}; write numbers with commas between them") from None
