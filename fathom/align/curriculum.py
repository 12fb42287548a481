"""Which tasks a round asks: every combination of environment, level and mode equally often, all chance from a seed and the round."""

import random
from collections.abc import Mapping, Sequence

from fathom.align.environments.base import SEEDS, Environment, Task
from fathom.align.sample import Mode
from fathom.errors import RecipeError

Asked = tuple[Task, Mode]


def combinations(environments: Mapping[str, Environment], levels: Sequence[int], modes: Sequence[Mode]) -> list[tuple[Environment, int, Mode]]:
    """Environment, level and mode in every way that exists; RecipeError for an environment without any of the levels."""
    found = [(environment, level, mode) for environment in environments.values() for level in levels if level in environment.levels
             for mode in modes]
    for name, environment in environments.items():
        if not any(one is environment for one, _, _ in found):
            raise RecipeError(f"levels is {list(levels)}; {name} has {environment.levels[0]} to {environment.levels[-1]}")
    return found


def choose_tasks(environments: Mapping[str, Environment], levels: Sequence[int], modes: Sequence[Mode], count: int,
                 seed: int, number: int, split: str = "train", shares: Mapping[str, int] | None = None) -> list[Asked]:
    """`count` tasks of a round; the same arguments give the same tasks. An environment is asked as often as its share (else 1) says."""
    rng = random.Random(f"{seed}/{number}")
    ways = [way for way in combinations(environments, levels, modes) for _ in range((shares or {}).get(way[0].name, 1))]
    chosen: list[tuple[Environment, int, Mode]] = []
    while len(chosen) < count:
        chosen += rng.sample(ways, len(ways))
    return [(environment.task(rng.randrange(SEEDS), split, level), mode) for environment, level, mode in chosen[:count]]
