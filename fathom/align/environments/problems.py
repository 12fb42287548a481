"""Generators of small mathematical problems, each with its worked solution in two lengths.

A problem of any level keeps to small numbers and few words, so that a model of some million parameters can learn it; what
grows with the level is the number of steps. Knows no messages and no scoring.
"""

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

LIMIT = 99  # of every value on the way, except in column sums and fractions
EASY_LEVELS, EASY, HARD = 3, 9, 29  # up to which level only one-digit numbers are added and subtracted, and the largest
SYMBOLS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NAMES = "Tom Ann Ben Eva Max Mia Sam Zoe".split()
THINGS = "apples books cards coins eggs pens stones stars".split()


@dataclass(frozen=True)
class Problem:
    """A question, the reasoning of efforts "high" and "max", and the answer; `careless`: the same three where the last thing is left out."""

    question: str
    high: str
    max: str
    answer: str
    careless: tuple[str, str, str]


Step = tuple[int, str, int]  # a value, an operation, a number: 12 + 7


def result(step: Step) -> int:
    """The value after a step."""
    a, symbol, b = step
    return SYMBOLS[symbol](a, b)


def spelled(step: Step) -> str:
    """A step in one line: "12 + 7 = 19." """
    a, symbol, b = step
    return f"{a} {symbol} {b} = {result(step)}."


def parts(step: Step) -> str:
    """A step by tens and ones: "27 + 15: 7 + 5 = 12, 20 + 10 = 30, 30 + 12 = 42." """
    a, symbol, b = step
    tens_a, ones_a, tens_b, ones_b = a // 10 * 10, a % 10, b // 10 * 10, b % 10
    if symbol == "+" and tens_a + tens_b and ones_a and ones_b:
        ones = ones_a + ones_b
        tens = f"{tens_a} + {tens_b} = {tens_a + tens_b}, " if tens_a and tens_b else ""
        lines = f"{ones_a} + {ones_b} = {ones}, {tens}{tens_a + tens_b} + {ones} = {a + b}"
    elif symbol == "-" and tens_b and ones_b:
        lines = f"{a} - {tens_b} = {a - tens_b}, {a - tens_b} - {ones_b} = {a - b}"
    elif symbol == "*" and tens_a and ones_a:
        lines = f"{tens_a} * {b} = {tens_a * b}, {ones_a} * {b} = {ones_a * b}, {tens_a * b} + {ones_a * b} = {a * b}"
    else:
        return spelled(step)
    return f"{a} {symbol} {b}: {lines}."


def worked(question: str, steps: list[Step]) -> Problem:
    """A problem whose solution is a list of steps, at least two; the careless forget the last."""
    return Problem(question, *solution(steps), careless=solution(steps[:-1]))


def solution(steps: list[Step]) -> tuple[str, str, str]:
    """Two lengths of working, and the answer: the long form goes through each step by tens and ones, then checks."""
    checked = ", ".join(str(result(step)) for step in steps)
    return " ".join(map(spelled, steps)), f"{' '.join(map(parts, steps))} Check: {checked}.", str(result(steps[-1]))


def random_steps(rng: random.Random, value: int, level: int) -> Iterator[Step]:
    """A chain of steps from a value, one more than the level, every result from 0 to LIMIT."""
    largest = EASY if level <= EASY_LEVELS else HARD
    for _ in range(level + 1):
        choices = [(value, "+", rng.randint(2, largest)), (value, "-", rng.randint(2, largest)), (value, "*", rng.randint(2, 4))]
        step = rng.choice([step for step in choices if 0 <= result(step) <= LIMIT])
        yield step
        value = result(step)


def chain(rng: random.Random, level: int) -> Problem:
    """ "Start with 12. Add 7. Take away 5. What is the result?": one step more than the level."""
    steps = list(random_steps(rng, rng.randint(2, 30), level))
    words = {"+": "Add {}.", "-": "Take away {}.", "*": "Multiply by {}."}
    told = " ".join(words[symbol].format(b) for _, symbol, b in steps)
    return worked(f"Start with {steps[0][0]}. {told} What is the result?", steps)


def expression(rng: random.Random, level: int) -> Problem:
    """ "What is (12 + 7) * 2 - 5?": brackets wherever the order of operations would say otherwise."""
    steps = list(random_steps(rng, rng.randint(2, 30), level))
    text, is_sum = str(steps[0][0]), False
    for _, symbol, b in steps:
        text = f"({text}) {symbol} {b}" if symbol == "*" and is_sum else f"{text} {symbol} {b}"
        is_sum = symbol != "*"
    return worked(f"What is {text}?", steps)


def story(rng: random.Random, level: int) -> Problem:
    """Who has how many: steps that concern one person, among some that concern another."""
    (who, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    start, spare = rng.randint(2, 30), rng.randint(2, 30)
    words = {"+": ("finds {} more", "buys {} more", "gets {} more"), "-": ("gives away {}", "loses {}", "sells {}"),
             "*": ("then has {} times as many",)}
    steps = list(random_steps(rng, start, level))
    told = [f"{who} {rng.choice(words[symbol]).format(b)}." for _, symbol, b in steps]
    for _ in range(level - 1):
        told.insert(rng.randint(0, len(told)), f"{other} {rng.choice(words['+']).format(rng.randint(2, 9))}.")
    question = f"{who} has {start} {thing}. {other} has {spare}. {' '.join(told)} How many {thing} does {who} have?"
    return worked(question, steps)


def column(rng: random.Random, level: int) -> Problem:
    """The sum of two numbers written as digits with blanks between them, one digit more than the level."""
    size = level + 1
    a, b = (str(rng.randint(10 ** (size - 1), 10**size - 1)) for _ in range(2))
    question = f"Add {' '.join(a)} and {' '.join(b)}. Write the digits of the sum."
    return Problem(question, *added(a, b, size), careless=added(a, b, size - 1))


def added(a: str, b: str, size: int) -> tuple[str, str, str]:
    """Two lengths of working, and the answer: the sum of the last `size` digits of two numbers of one length, written with blanks."""
    high, longer, carry, written = [], [], 0, ""
    for left, right in [*zip(reversed(a), reversed(b), strict=True)][:size]:
        total = int(left) + int(right) + carry
        line = f"{left} + {right} + {carry} = {total}"
        high.append(f"{line}.")
        longer.append(f"{left} + {right} = {int(left) + int(right)}, {line}, write {total % 10}, carry {total // 10}.")
        carry, written = total // 10, f"{total % 10}{written}"
    answer = " ".join(f"{carry or ''}{written}")
    return " ".join(high), f"{' '.join(longer)} Last carry {carry}. Sum {answer}.", answer


def fraction(rng: random.Random, level: int) -> Problem:
    """A sum or difference of fractions, as many as the level less one: level 3 has two of them."""
    denominators = (2, 3, 4, 5, 6, 8) if level < 5 else (2, 3, 4, 5, 6, 8, 10, 12)
    terms = [Fraction(rng.randint(1, size - 1), size) for size in (rng.choice(denominators) for _ in range(level - 1))]
    signs = [1] + [rng.choice((1, -1)) for _ in terms[1:]]
    return Problem(f"What is {joined(signs, terms)}?", *summed(signs, terms), careless=summed(signs[:-1], terms[:-1]))


def summed(signs: list[int], terms: list[Fraction]) -> tuple[str, str, str]:
    """Two lengths of working, and the answer: a sum of fractions."""
    total = sum((sign * term for sign, term in zip(signs, terms, strict=True)), Fraction())
    common = lcm(*(term.denominator for term in terms))
    tops = [term.numerator * common // term.denominator for term in terms]
    top = sum(sign * value for sign, value in zip(signs, tops, strict=True))
    wide = " ".join(f"{term} = {value}/{common}." for term, value in zip(terms, tops, strict=True))
    line = f"{joined(signs, tops)} = {top}."
    divisor = gcd(top, common)
    reduced = f"Divide {top} and {common} by {divisor}. " if divisor > 1 else ""
    return (f"{wide} {line} {top}/{common} = {total}.",
            f"Common denominator {common}. {wide} {line} {reduced}{top}/{common} = {total}.", str(total))


def joined(signs: list[int], terms: list) -> str:
    """ "1/2 + 1/3 - 1/4". """
    return str(terms[0]) + "".join(f" {'+' if sign > 0 else '-'} {term}" for sign, term in zip(signs[1:], terms[1:], strict=True))


KINDS: dict[str, Callable[[random.Random, int], Problem]] = {
    "chain": chain, "expression": expression, "story": story, "column": column, "fraction": fraction}
FIRST_LEVEL = {"fraction": 3}
