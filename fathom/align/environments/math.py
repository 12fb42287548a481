"""Mathematics: small problems whose answer is compared by value (report section 5, "answer equivalence").

The answer is the whole content, workings belong in the reasoning: so nothing is gained by listing several answers, by answering
in the reasoning only, or by repeating the question. Numbers are compared exactly; anything else through `math_tools`.
"""

import random
import re
from fractions import Fraction

from fathom.align.environments.base import Environment, Score, Task, assistant, check_effort, final_text
from fathom.align.environments.problems import FIRST_LEVEL, KINDS

ANSWER_LENGTH = 200  # characters; a longer content is no answer
WRAPPERS = (re.compile(r"(?:the )?(?:final )?answer(?: is|:)\s*(.+)", re.IGNORECASE | re.DOTALL),
            re.compile(r"\$(.+)\$", re.DOTALL), re.compile(r"\\boxed\{(.+)\}", re.DOTALL))
INTEGER = r"(?:\d+|\d{1,3}(?:,\d{3})+)"
NUMBER = re.compile(rf"([+-]?)({INTEGER})(\.\d+)?(?:/({INTEGER}))?", re.ASCII)
LATEX_FRACTION = re.compile(r"([+-]?)\\d?frac\{(\d+)\}\{(\d+)\}", re.ASCII)
SPACED_DIGITS = re.compile(r"\d(?: \d)+", re.ASCII)


class MathEnvironment(Environment):
    """One question, one answer; the levels are numbers of steps."""

    name = "math"
    levels = range(1, 7)

    def __init__(self, kinds: tuple[str, ...] = tuple(KINDS)):
        self.kinds = kinds

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A problem of a random kind that has this level."""
        kind = rng.choice([kind for kind in self.kinds if level >= FIRST_LEVEL.get(kind, 1)])
        problem = KINDS[kind](rng, level)
        facts = {"kind": kind, "high": problem.high, "max": problem.max, "answer": problem.answer, "careless": [*problem.careless]}
        return [{"role": "user", "content": problem.question}], facts

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 for an answer equal to the right one, else 0."""
        text = final_text(turns)
        if text is None:
            return Score(0.0, False, "no finished answer")
        right = same_value(text, task.facts["answer"])
        return Score(float(right), True, "right" if right else f"expected {task.facts['answer']}, got {text[:40]!r}")

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The worked solution: each step in a line for "high", by tens and ones and checked for "max"."""
        return [assistant(task.facts["answer"], task.facts[effort] if check_effort(effort) else None)]

    def careless(self, task: Task, effort: str) -> list[dict]:
        """The worked solution without its last step, or last digit."""
        high, longer, answer = task.facts["careless"]
        return [assistant(answer, {"high": high, "max": longer}[effort] if check_effort(effort) else None)]


def answer_of(text: str) -> str:
    """The answer that a whole content gives: without blanks around it, one full stop at its end, and common wrappings."""
    text = text.strip().removesuffix(".").strip()
    for wrapper in WRAPPERS:
        if len(text) <= ANSWER_LENGTH and (found := wrapper.fullmatch(text)):
            text = found[1].strip().removesuffix(".")
    return text


def number(text: str) -> Fraction | None:
    """The value of a literal number: 12, -3, 1,234, 0.5, 3/4, \\frac{3}{4}, 1 2 3 (digits); None for anything else.

    An expression is no number: repeating a question is no answer.
    """
    if len(text) > ANSWER_LENGTH:
        return None
    if SPACED_DIGITS.fullmatch(text):
        text = text.replace(" ", "")
    if found := LATEX_FRACTION.fullmatch(text):
        sign, top, bottom, decimals = found[1], found[2], found[3], ""
    elif found := NUMBER.fullmatch(text):
        sign, top, decimals, bottom = found[1], found[2].replace(",", ""), found[3] or "", (found[4] or "1").replace(",", "")
    else:
        return None
    if int(bottom) == 0 or (decimals and bottom != "1"):
        return None
    return Fraction(f"{sign}{top}{decimals}") / int(bottom)


def same_value(text: str, expected: str) -> bool:
    """Whether a content gives the expected answer: the same number exactly, or else the same text."""
    answer, right = answer_of(text), number(expected)
    if right is not None:
        return number(answer) == right
    return answer.casefold() == answer_of(expected).casefold()
