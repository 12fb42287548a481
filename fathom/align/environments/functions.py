"""Generators of small functions to write: what they should do in words, a solution, and tests with the right results.

The right results come from Python callables beside each step, never from running text. What grows with the level is the number
of steps. Knows no messages, no sandbox and no scoring.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

TESTS = 20  # of lists and texts; of numbers as many and all the small ones
WORDS = "apple bird cloud dance earth fire garden horse island king lamp music north ocean paper queen".split()


class Step(NamedTuple):
    """One thing a function does: in words, as a line of Python, and as a callable."""

    words: str
    line: str
    apply: Callable[[Any], Any]


@dataclass(frozen=True)
class Function:
    """A function to write. `tests`: pairs of an argument and the result, JSON-able; `careless`: code and reasoning without the last step."""

    question: str
    code: str
    high: str
    max: str
    tests: list[list]
    careless: tuple[str, str, str]


def number_step(rng: random.Random) -> Step:
    """A step from a number to a number."""
    k, m = rng.randint(2, 12), rng.randint(2, 9)
    return rng.choice([
        Step(f"add {k}", f"x = x + {k}", lambda x: x + k), Step(f"subtract {k}", f"x = x - {k}", lambda x: x - k),
        Step(f"multiply by {m}", f"x = x * {m}", lambda x: x * m),
        Step(f"take the remainder after division by {m}", f"x = x % {m}", lambda x: x % m),
        Step(f"if it is over {k}, subtract {m}", f"x = x - {m} if x > {k} else x", lambda x: x - m if x > k else x)])


def list_step(rng: random.Random) -> Step:
    """A step from a list of numbers to a list of numbers."""
    k, m = rng.randint(1, 9), rng.randint(2, 9)
    return rng.choice([
        Step("keep the even numbers", "x = [n for n in x if n % 2 == 0]", lambda x: [n for n in x if n % 2 == 0]),
        Step("keep the odd numbers", "x = [n for n in x if n % 2 == 1]", lambda x: [n for n in x if n % 2 == 1]),
        Step(f"keep the numbers over {k}", f"x = [n for n in x if n > {k}]", lambda x: [n for n in x if n > k]),
        Step(f"keep the numbers under {k}", f"x = [n for n in x if n < {k}]", lambda x: [n for n in x if n < k]),
        Step(f"add {k} to each number", f"x = [n + {k} for n in x]", lambda x: [n + k for n in x]),
        Step(f"multiply each number by {m}", f"x = [n * {m} for n in x]", lambda x: [n * m for n in x])])


def list_end(rng: random.Random) -> Step:
    """A step from a list of numbers to the result."""
    return rng.choice([
        Step("return the sum", "return sum(x)", sum), Step("return how many there are", "return len(x)", len),
        Step("return them sorted", "return sorted(x)", sorted),
        Step("return the largest, or 0 if there is none", "return max(x, default=0)", lambda x: max(x, default=0)),
        Step("return the smallest, or 0 if there is none", "return min(x, default=0)", lambda x: min(x, default=0))])


def text_step(rng: random.Random) -> Step:
    """A step from a text to a text."""
    k, letter, word = rng.randint(2, 5), rng.choice("aeionrst"), rng.choice(WORDS)
    return rng.choice([
        Step("make it upper case", "x = x.upper()", str.upper), Step("reverse it", "x = x[::-1]", lambda x: x[::-1]),
        Step(f"keep the first {k} letters", f"x = x[:{k}]", lambda x: x[:k]),
        Step(f"drop the first {k} letters", f"x = x[{k}:]", lambda x: x[k:]),
        Step("repeat it twice", "x = x * 2", lambda x: x * 2),
        Step(f"remove every letter {letter}", f'x = x.replace("{letter}", "")', lambda x: x.replace(letter, "")),
        Step(f"put {word} after it", f'x = x + "{word}"', lambda x: x + word)])


def numbers(rng: random.Random) -> list:
    """Arguments for functions of a number."""
    return [*range(-2, 15), *(rng.randint(-30, 60) for _ in range(TESTS))]


def lists(rng: random.Random) -> list:
    """Arguments for functions of a list."""
    return [[], [rng.randint(0, 9)], *([rng.randint(0, 15) for _ in range(rng.randint(3, 8))] for _ in range(TESTS - 2))]


def texts(rng: random.Random) -> list:
    """Arguments for functions of a text."""
    return ["", "a", *(f"{rng.choice(WORDS)}{rng.choice(WORDS)}" for _ in range(TESTS - 3)), rng.choice(WORDS)]


def described(what: str, steps: list[Step], arguments: list) -> Function:
    """A function told step by step; the long reasoning also follows one argument through it."""
    question = f"Write a Python function f(x) of {what} x: {', then '.join(step.words for step in steps)}."
    tests = []
    for argument in arguments:
        value = argument
        for step in steps:
            value = step.apply(value)
        tests.append([argument, value])
    return Function(question, *solution(steps, arguments[-1]), tests, careless=solution(steps[:-1], arguments[-1]))


def solution(steps: list[Step], argument: Any) -> tuple[str, str, str]:
    """The code, and two lengths of reasoning: the long one also follows an argument through the steps."""
    lines = [step.line for step in steps]
    if not lines[-1].startswith("return"):
        lines.append("return x")
    high = " ".join(f"{step.words}: {step.line}." for step in steps)
    value, followed = argument, []
    for step in steps:
        value = step.apply(value)
        followed.append(f"{step.words}: {value!r}")
    code = "def f(x):\n" + "\n".join(f"    {line}" for line in lines)
    return code, high, f"{high} Try f({argument!r}). {'; '.join(followed)}."


def number_function(rng: random.Random, level: int) -> Function:
    """Steps on a number, one more than the level."""
    return described("a number", [number_step(rng) for _ in range(level + 1)], numbers(rng))


def list_function(rng: random.Random, level: int) -> Function:
    """Steps on a list, as many as the level, and one to the result."""
    return described("a list of numbers", [*(list_step(rng) for _ in range(level)), list_end(rng)], lists(rng))


def text_function(rng: random.Random, level: int) -> Function:
    """Steps on a text, one more than the level."""
    return described("a text", [text_step(rng) for _ in range(level + 1)], texts(rng))


def guessed_function(rng: random.Random, level: int) -> Function:
    """A straight line that must be found from three of its values."""
    a, b, start = rng.choice([-3, -2, *range(2, 13)]), rng.randint(0, 40), rng.randint(0, min(level, 3) - 1)
    shown = [[x, a * x + b] for x in range(start, start + 3)]
    told = ", ".join(f"f({x}) = {y}" for x, y in shown)
    code = f"def f(x):\n    return {a} * x + {b}"
    (x0, y0), (x1, y1), (x2, y2) = shown
    slope, longer_slope = f"{y1} - {y0} = {a}, so {a} * x.", f"{y1} - {y0} = {a}. {y2} - {y1} = {a}, the same, so {a} * x."
    high = f"{slope} {y0} - {a} * {x0} = {b}, so + {b}."
    longer = f"{longer_slope} {a} * {x0} = {a * x0}. {y0} - {a * x0} = {b}, so + {b}."
    check = f" Check f({x2}): {a} * {x2} = {a * x2}, {a * x2} + {b} = {y2}."
    return Function(f"Write a Python function f(x) of the form a * x + b with {told}.", code, high, longer + check,
                    [[x, a * x + b] for x in numbers(rng)], careless=(f"def f(x):\n    return {a} * x", slope, longer_slope))


KINDS: dict[str, Callable[[random.Random, int], Function]] = {
    "number": number_function, "list": list_function, "text": text_function, "guessed": guessed_function}
