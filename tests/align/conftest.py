"""The domains, with what isolation this machine permits, and tasks of them."""

import pytest

from fathom.align.environments import ENVIRONMENTS
from fathom.align.environments.code import CodeEnvironment
from fathom.align.sandbox import Program, Sandbox, SandboxError

BOTH = ("train", "held_out")


def isolation():
    try:
        with Sandbox() as sandbox:
            sandbox.run([Program("")])
        return "namespaces"
    except SandboxError:
        return "limits"


@pytest.fixture(scope="module")
def domains():
    made = {name: make() for name, make in ENVIRONMENTS.items() if name != "code"}
    made["code"] = CodeEnvironment(isolation=isolation())
    yield made
    made["code"].close()


def tasks(domain, count, splits=BOTH):
    return [domain.task(seed, split, level) for level in domain.levels for split in splits for seed in range(count)]
