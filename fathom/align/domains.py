"""The built-in environments, made once by name; what they hold (a sandbox) is started when it is first used."""

from fathom.align.environments import ENVIRONMENTS
from fathom.align.environments.base import Environment


def domains() -> dict[str, Environment]:
    """Every built-in environment by name."""
    return {name: make() for name, make in ENVIRONMENTS.items()}
