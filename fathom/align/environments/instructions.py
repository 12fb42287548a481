"""Instruction following: choose words from a list under constraints that code can check (report section 5, "constraints").

The words are given, so that a right answer is also a sensible one: made-up words, words said twice and extra text all fail.
"""

import json
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from fathom.align.environments.base import Environment, Score, Task, assistant, check_effort, final_text

WORDS = (
    "apple bag bell bird boat book bread bus cake cat chair clock cloud coat cup dance desk dog door dream earth egg farm fire "
    "fish flag frog garden glass gold grass green hand hat hill horse house ice island jam king lake lamp leaf lemon lion milk "
    "moon mouse music night north ocean orange paper park pen plum queen rain ring river road rose sand school sea ship silver "
    "snow song star stone street sugar summer sun table tea tree uncle valley village voice wall water wind window winter wolf "
    "wood yellow").split()
LETTERS = "aeiorst"


class Filter(NamedTuple):
    """A constraint on each word: what the question says, and how it is decided about a word."""

    words: str
    holds: Callable[[str], bool]


def filter_of(kind: str, value: str | int) -> Filter:
    """The filter of a constraint."""
    return {
        "with": Filter(f"Use only words with the letter {value}.", lambda word: str(value) in word),
        "without": Filter(f"Use only words without the letter {value}.", lambda word: str(value) not in word),
        "short": Filter(f"Use only words of at most {value} letters.", lambda word: len(word) <= int(value)),
        "long": Filter(f"Use only words of at least {value} letters.", lambda word: len(word) >= int(value))}[kind]


ORDERS: dict[str, str] = {"up": "Put them in alphabetical order.", "down": "Put them in reverse alphabetical order."}
CASES: dict[str, tuple[str, Callable[[str], str]]] = {
    "upper": ("Write them in capital letters.", str.upper), "title": ("Start each word with a capital letter.", str.capitalize)}
FORMATS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "commas": ("Put a comma between them.", ", ".join), "lines": ("Write one word on each line.", "\n".join),
    "dashes": ("Write each on its own line after a dash.", lambda words: "\n".join(f"- {word}" for word in words)),
    "json": ("Write them as a JSON list.", json.dumps)}
FRAMES: dict[str, tuple[str, str, str]] = {  # words, what comes before, what comes after
    "begin": ("Begin with: Here:", "Here:", ""), "end": ("End with: Done.", "", "Done."),
    "both": ("Begin with: Here: and end with: Done.", "Here:", "Done.")}
GROUPS = ("letter", "length", "order", "case", "format", "frame")


class InstructionsEnvironment(Environment):
    """Words to choose and how to write them; the level is the number of constraints besides how many words."""

    name = "instructions"
    levels = range(1, len(GROUPS) + 1)

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A list of words, a count and constraints that it can meet."""
        while True:
            words, groups = rng.sample(WORDS, rng.randint(6, 8)), rng.sample(GROUPS, level)
            facts = {"words": words, "count": rng.randint(2, 3), "constraints": {}}
            choices = {"letter": [rng.choice(("with", "without")), rng.choice(LETTERS)],
                       "length": rng.choice([["short", rng.randint(3, 5)], ["long", rng.randint(4, 6)]]),
                       "order": rng.choice(list(ORDERS)), "case": rng.choice(list(CASES)), "format": rng.choice(list(FORMATS)),
                       "frame": rng.choice(list(FRAMES))}
            facts["constraints"] = {group: choices[group] for group in GROUPS if group in groups}
            fitting = [word for word in words if all(rule.holds(word) for rule in filters(facts))]
            is_choice = len(fitting) < len(words) or not filters(facts)
            if len(fitting) >= facts["count"] and is_choice:
                return [{"role": "user", "content": question(facts)}], facts

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 if every constraint holds, else 0."""
        text = final_text(turns)
        if text is None:
            return Score(0.0, False, "no finished answer")
        problem = broken_constraint(text, task.facts)
        return Score(float(problem is None), True, problem or "all constraints hold")

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The first words that fit. The reasoning goes through the words, for "max" through their letters."""
        return self._chosen(task.facts, effort)

    def careless(self, task: Task, effort: str) -> list[dict]:
        """As if the last constraint were not there, or only one word were asked for where that makes no difference."""
        facts = task.facts
        kept = facts | {"constraints": dict([*facts["constraints"].items()][:-1])}
        turns = self._chosen(kept, effort)
        return turns if self.score(task, turns).reward == 0 else self._chosen(facts | {"count": 1}, effort)

    def _chosen(self, facts: dict, effort: str) -> list[dict]:
        """The answer to a question of these facts."""
        thinks = check_effort(effort)
        chosen = [word for word in facts["words"] if all(rule.holds(word) for rule in filters(facts))][:facts["count"]]
        notes = [note for group in ("letter", "length") if group in facts["constraints"]
                 for note in [filter_note(*facts["constraints"][group], facts["words"], effort == "max")]]
        notes.append(f"Choose {', '.join(chosen)}.")
        ordered = sorted(chosen, reverse=facts["constraints"].get("order") == "down") if "order" in facts["constraints"] else chosen
        if "order" in facts["constraints"]:
            notes.append(f"In order: {', '.join(ordered)}.")
        written = [CASES[facts["constraints"]["case"]][1](word) for word in ordered] if "case" in facts["constraints"] else ordered
        if "case" in facts["constraints"]:
            notes.append(f"Written: {', '.join(written)}.")
        body = FORMATS[facts["constraints"].get("format", "commas")][1](written)
        _, before, after = FRAMES.get(facts["constraints"].get("frame"), ("", "", ""))
        return [assistant("\n".join(filter(None, (before, body, after))), " ".join(notes) if thinks else None)]


def filters(facts: dict) -> list[Filter]:
    """The constraints on each word."""
    return [filter_of(*facts["constraints"][group]) for group in ("letter", "length") if group in facts["constraints"]]


def filter_note(kind: str, value: str | int, words: list[str], spelled: bool) -> str:
    """Each word and whether it may be used: "cat yes, river no."; spelled also its letters, or their number."""
    holds = filter_of(kind, value).holds
    def seen(word: str) -> str:
        if not spelled:
            return word
        return f"{word} {' '.join(word)}" + (f" {len(word)}" if kind in ("short", "long") else "")
    verdicts = (f"{seen(word)} {'yes' if holds(word) else 'no'}" for word in words)
    return f"{kind} {value}: {', '.join(verdicts)}."


def question(facts: dict) -> str:
    """What is asked, in words."""
    constraints = facts["constraints"]
    lines = [f"Choose {facts['count']} of these words: {', '.join(facts['words'])}.", *(rule.words for rule in filters(facts))]
    for group, texts in (("order", ORDERS), ("case", CASES), ("format", FORMATS), ("frame", FRAMES)):
        if group in constraints:
            text = texts[constraints[group]]
            lines.append(text if isinstance(text, str) else text[0])
    return " ".join(lines)


def broken_constraint(text: str, facts: dict) -> str | None:
    """The first constraint that an answer breaks, in words; None where all hold."""
    constraints, text = facts["constraints"], text.strip()
    words, before, after = FRAMES.get(constraints.get("frame"), ("", "", ""))
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        return words
    body = text[len(before):len(text) - len(after)].strip()
    written = split(body, constraints.get("format"))
    if written is None:
        return FORMATS[constraints["format"]][0]
    if "case" in constraints:
        rule, shape = CASES[constraints["case"]]
        if any(word != shape(word.lower()) for word in written):
            return rule
        written = [word.lower() for word in written]
    if not set(written) <= set(facts["words"]) or len(set(written)) < len(written):
        return "different words of the list and nothing else"
    if len(written) != facts["count"]:
        return f"{facts['count']} words"
    for rule in filters(facts):
        if not all(rule.holds(word) for word in written):
            return rule.words
    if "order" in constraints and written != sorted(written, reverse=constraints["order"] == "down"):
        return ORDERS[constraints["order"]]
    return None


def split(body: str, kind: str | None) -> list[str] | None:
    """The words of an answer in a format; without one, between commas, blanks or line ends. None for another format."""
    if kind == "json":
        try:
            words = json.loads(body)
        except (ValueError, RecursionError):
            return None
        return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None
    if kind == "commas":
        return re.split(r", ?", body)
    if kind in ("lines", "dashes"):
        lines = body.split("\n")
        if kind == "dashes" and not all(line.startswith("- ") for line in lines):
            return None
        return [line.removeprefix("- ") if kind == "dashes" else line for line in lines]
    return re.split(r"[,\s]+", body)
