"""Code: small functions to write, run on hidden arguments in the sandbox (report section 5, "tests run in a sandbox").

The sandboxed program only computes: it is handed the arguments, and what it prints is compared here, outside. The right results
never enter the sandbox, so a program that leaves early, prints "passed", patches the harness or reads the tests gains nothing.
"""

import json
import random
import re

from fathom.align.environments.base import Environment, Score, Task, assistant, check_effort, final_text
from fathom.align.environments.functions import KINDS
from fathom.align.sandbox import Limits, Program, Result, Sandbox

LIMITS = Limits(cpu_seconds=2, wall_seconds=30, output_bytes=64 << 10)
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n)?```", re.DOTALL)

# Prints the results in one line of JSON; whatever the solution prints goes nowhere.
HARNESS = """
import io, json, sys
task, out = json.load(sys.stdin), sys.stdout
sys.stdout = sys.stderr = io.StringIO()
space = {"__name__": "solution", "__builtins__": __builtins__}
exec(compile(task["code"], "solution.py", "exec"), space)
results = [space["f"](argument) for argument in task["arguments"]]
out.write(json.dumps(results))
out.flush()
"""


class CodeEnvironment(Environment):
    """A function f(x) to write; the levels are numbers of steps. Raises SandboxError where `isolation` is not to be had."""

    name = "code"
    levels = range(1, 6)

    def __init__(self, kinds: tuple[str, ...] = tuple(KINDS), isolation: str = "namespaces"):
        self.kinds = kinds
        self.sandbox = Sandbox(isolation)

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A function of a random kind."""
        kind = rng.choice(self.kinds)
        function = KINDS[kind](rng, level)
        facts = {"kind": kind, "code": function.code, "high": function.high, "max": function.max, "tests": function.tests,
                 "careless": [*function.careless]}
        return [{"role": "user", "content": function.question}], facts

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 if every hidden test gives the right result, else 0."""
        return self.scores([(task, turns)])[0]

    def scores(self, episodes: list[tuple[Task, list[dict]]]) -> list[Score]:
        """Many at a time, on all of the sandbox's workers."""
        codes = [code_of(final_text(turns)) for _, turns in episodes]
        programs = [program(code, task.facts["tests"]) for code, (task, _) in zip(codes, episodes, strict=True) if code is not None]
        results = iter(self.sandbox.run(programs))
        return [Score(0.0, False, "no finished answer with one piece of code") if code is None
                else verdict(next(results), task.facts["tests"]) for code, (task, _) in zip(codes, episodes, strict=True)]

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The function, a line for each step; the reasoning for "max" also tries it."""
        return [assistant(task.facts["code"], task.facts[effort] if check_effort(effort) else None)]

    def careless(self, task: Task, effort: str) -> list[dict]:
        """The function without its last step."""
        code, high, longer = task.facts["careless"]
        return [assistant(code, {"high": high, "max": longer}[effort] if check_effort(effort) else None)]

    def close(self) -> None:
        """End the sandbox's processes."""
        self.sandbox.close()


def code_of(text: str | None) -> str | None:
    """The code in an answer: its only fenced block, or all of it where there is none."""
    if text is None or "```" not in text:
        return text
    blocks = FENCE.findall(text)
    return blocks[0] if len(blocks) == 1 and text.count("```") == 2 else None


def program(code: str, tests: list[list]) -> Program:
    """The program that calls a solution with every test's argument, and knows no result."""
    return Program(HARNESS, json.dumps({"code": code, "arguments": [argument for argument, _ in tests]}), LIMITS)


def verdict(result: Result, tests: list[list]) -> Score:
    """1 if the program ended well and printed exactly the right results: 1 is neither True nor 1.0."""
    if not result.ok:
        why = result.stderr.strip().splitlines()
        return Score(0.0, True, f"{result.status}: {why[-1][:100] if why else 'no message'}")
    try:
        printed = json.dumps(json.loads(result.stdout))
    except (ValueError, RecursionError):
        return Score(0.0, True, "no results")
    right = printed == json.dumps([expected for _, expected in tests])
    return Score(float(right), True, "all tests passed" if right else "a test failed")
