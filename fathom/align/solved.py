"""Demonstrations of an environment as a file of conversations that `fathom sft` reads, for the start of a specialist.

Every row is a task of the training split with a worked right answer in one of the efforts. Knows no tokens and no model.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fathom import files
from fathom.align.environments.base import EFFORTS, Environment, check_effort
from fathom.errors import InputError


def solved(
    environment: Environment, count: int, levels: Sequence[int], efforts: Mapping[str, float], seed: int = 0,
) -> Iterator[dict]:
    """`count` rows with messages, thinking_mode and reasoning_effort, and the task's key.

    Tasks are those of the seeds from `seed` on, levels drawn evenly, efforts with the given weights. The same arguments give the
    same rows. InputError for an unknown effort, or weights that are negative or all zero.
    """
    for effort in efforts:
        check_effort(effort)
    if not levels or min(efforts.values(), default=0) < 0 or not any(efforts.values()):
        raise InputError("demonstrations need at least one level, and weights of efforts from 0 up, not all 0")
    rng = random.Random(f"{environment.name}/{seed}")
    for number in range(count):
        level, effort = rng.choice(list(levels)), rng.choices(list(efforts), list(efforts.values()))[0]
        task = environment.task(seed + number, "train", level)
        mode, reasoning_effort = EFFORTS[effort]
        row = {"messages": task.messages + environment.demonstration(task, effort), "thinking_mode": mode, "task": task.key}
        yield row if reasoning_effort is None else row | {"reasoning_effort": reasoning_effort}


def write_solved(
    path: str | Path, environments: Sequence[Environment], count: int, levels: Sequence[int], efforts: Mapping[str, float],
    seed: int = 0,
) -> None:
    """`count` rows of each environment as JSONL, mixed, written atomically; levels that an environment lacks are left out of it."""
    rows = [row for environment in environments for row in
            solved(environment, count, [level for level in levels if level in environment.levels], efforts, seed)]
    random.Random(seed).shuffle(rows)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
