"""The built-in environments by name, each made when it is first asked for: only code needs a sandbox.

Beside those that a program scores there is "judged-math", which only a judge scores.
"""

from collections.abc import Callable, Iterator, Mapping

from fathom.align.environments import ENVIRONMENTS
from fathom.align.environments.base import Environment
from fathom.align.environments.math import MathEnvironment
from fathom.align.judge import JudgedEnvironment

MAKERS: dict[str, Callable[[], Environment]] = ENVIRONMENTS | {
    "judged-math": lambda: JudgedEnvironment(MathEnvironment())}


class Domains(Mapping[str, Environment]):
    """Every built-in environment by name."""

    def __init__(self):
        self._made: dict[str, Environment] = {}

    def __getitem__(self, name: str) -> Environment:
        if name not in self._made:
            self._made[name] = MAKERS[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MAKERS)

    def __len__(self) -> int:
        return len(MAKERS)

    def __contains__(self, name: object) -> bool:
        return name in MAKERS
