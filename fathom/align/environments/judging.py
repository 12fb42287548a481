"""Judging: is an answer right by a rubric? Verdicts with known truth, to train a judge by (report section 5, generative reward model).

Candidates are worked answers of other environments and the same with something spoilt; what is true of them those environments'
own scores say. `judge_messages` and `verdict_of` are also the way to have an answer judged that no rule scores.
"""

import random
import re
from collections.abc import Sequence

from fathom.align.environments.base import Environment, Score, Task, assistant, check_effort, final_text
from fathom.align.environments.instructions import InstructionsEnvironment
from fathom.align.environments.math import MathEnvironment

RUBRICS = {"math": "The answer is the right result.", "code": "The function does what the question asks.",
           "instructions": "The answer follows every instruction and says nothing else."}
VERDICTS = {True: "yes", False: "no"}
ATTEMPTS = 50  # at spoiling one answer


class JudgingEnvironment(Environment):
    """A question, an answer and a rubric; yes if the answer meets it, else no. Levels are those of the judged domains.

    `domains`: single-turn environments whose names have a rubric in RUBRICS.
    """

    name = "judging"

    def __init__(self, domains: Sequence[Environment] | None = None):
        self.domains = {domain.name: domain for domain in domains or (MathEnvironment(), InstructionsEnvironment())}
        self.levels = range(1, min(len(domain.levels) for domain in self.domains.values()) + 1)

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """An answer that is right or spoilt, both as often."""
        domain = self.domains[rng.choice(sorted(self.domains))]
        messages, facts = domain.make(rng, level)
        judged = Task(domain.name, "train", 0, level, messages, facts)
        [right] = domain.demonstration(judged, "chat")
        wanted, answer, score = rng.random() < 0.5, right["content"], domain.score(judged, [right])
        for _ in range(0 if wanted else ATTEMPTS):
            answer = spoilt(right["content"], rng)
            score = domain.score(judged, [assistant(answer)])
            if score.reward == 0:
                break
        met = score.reward == 1
        notes = {effort: f"{domain.demonstration(judged, effort)[0]['reasoning_content']} {checked(score)}" for effort in ("high", "max")}
        return (judge_messages(judged.question, answer, RUBRICS[domain.name]),
                {"domain": domain.name, "question": judged.question, "answer": answer, "met": met, **notes})

    def side(self, task: Task) -> str:
        """The question that is judged: its domain's own training and held-out questions stay apart here too."""
        return task.facts["question"]

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 for the true verdict."""
        verdict = verdict_of(turns)
        if verdict is None:
            return Score(0.0, False, "no verdict")
        right = verdict == task.facts["met"]
        return Score(float(right), True, "true verdict" if right else "false verdict")

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The true verdict; the reasoning solves the question and compares."""
        return [assistant(VERDICTS[task.facts["met"]], task.facts[effort] if check_effort(effort) else None)]

    def close(self) -> None:
        """Close the judged domains."""
        for domain in self.domains.values():
            domain.close()


def judge_messages(question: str, answer: str, rubric: str) -> list[dict]:
    """The prompt that asks for a verdict on an answer."""
    text = f"Question: {question}\nAnswer: {answer}\nRubric: {rubric}\nDoes the answer meet the rubric? Say yes or no."
    return [{"role": "user", "content": text}]


def verdict_of(turns: list[dict]) -> bool | None:
    """The verdict that a judge's turn gives; None where it gives none, or more than one word."""
    text = final_text(turns)
    return None if text is None else {"yes": True, "no": False}.get(text.strip().removesuffix(".").lower())


def checked(score: Score) -> str:
    """The end of a judge's reasoning."""
    return f"So yes: {score.reason}." if score.reward == 1 else f"So no: {score.reason.removesuffix('.')}."


def spoilt(text: str, rng: random.Random) -> str:
    """A text with one thing changed: a digit or a number, the order, case or number of its words, something more or less."""
    numbers, words = list(re.finditer(r"\d+", text)), list(re.finditer(r"[A-Za-z]+", text))
    ways = []
    if numbers:
        found = rng.choice(numbers)
        other = max(0, int(found[0]) + rng.choice((-10, -2, -1, 1, 2, 10)))
        ways += [text[:found.start()] + str(other) + text[found.end():]] * 3
    if len(words) > 1:
        first, second = sorted(rng.sample(words, 2), key=lambda word: word.start())
        ways.append(text[:first.start()] + second[0] + text[first.end():second.start()] + first[0] + text[second.end():])
        ways.append(text[:first.start()] + first[0].swapcase() + text[first.end():])
        ways.append(text[:first.start()] + second[0] + text[first.end():])
        ways.append(text.replace(", ", " ", 1))
    lines = text.split("\n")
    if len(lines) > 1:
        del lines[rng.randrange(len(lines))]
        ways.append("\n".join(lines))
    return rng.choice(ways) if ways else f"{text} {text}"
