"""Environments with verifiable rewards: mathematics, code, tool use, instruction following; and judging."""

from collections.abc import Callable

from fathom.align.environments.agent import AgentEnvironment
from fathom.align.environments.base import Environment
from fathom.align.environments.code import CodeEnvironment
from fathom.align.environments.instructions import InstructionsEnvironment
from fathom.align.environments.judging import JudgingEnvironment
from fathom.align.environments.math import MathEnvironment
from fathom.errors import InputError

ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "math": MathEnvironment, "code": CodeEnvironment, "agent": AgentEnvironment, "instructions": InstructionsEnvironment,
    "judging": JudgingEnvironment}


def environment(name: str) -> Environment:
    """A new environment of this name; InputError for an unknown one."""
    if name not in ENVIRONMENTS:
        raise InputError(f"environment {name!r} is unknown; there are {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]()
