"""The built-in environments by name, each made when it is first asked for: only code needs a sandbox."""

from collections.abc import Iterator, Mapping

from fathom.align.environments import ENVIRONMENTS
from fathom.align.environments.base import Environment


class Domains(Mapping[str, Environment]):
    """Every built-in environment by name."""

    def __init__(self):
        self._made: dict[str, Environment] = {}

    def __getitem__(self, name: str) -> Environment:
        if name not in self._made:
            self._made[name] = ENVIRONMENTS[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ENVIRONMENTS)

    def __len__(self) -> int:
        return len(ENVIRONMENTS)

    def __contains__(self, name: object) -> bool:
        return name in ENVIRONMENTS
