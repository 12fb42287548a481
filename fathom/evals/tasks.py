"""Questions with answers that a program checks, asked in chat format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fathom.data.questions import Pair, check, make_pairs, to_messages
from fathom.engine.engine import Engine
from fathom.engine.sampler import Sampling
from fathom.errors import ChatFormatError, InputError
from fathom.text import chat

ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Score:
    """Of `asked` questions, how many answers kept the chat format and how many were right."""

    asked: int
    in_format: int
    right: int


def ask(engine: Engine, pairs: Sequence[Pair], thinking: bool) -> dict[str, Score]:
    """Greedy answers to all questions; scores by kind of question."""
    mode, scores = "thinking" if thinking else "chat", {}
    for pair in pairs:
        prompt = chat.tokenize(to_messages(pair, thinking)[:-1], engine.tokenizer, mode)
        ids = list(engine.stream(prompt, Sampling(temperature=0, max_tokens=ANSWER_TOKENS)))
        try:
            answer = chat.parse(engine.tokenizer.decode(ids), mode)["content"]
        except ChatFormatError:
            answer = None
        old = scores.get(pair.kind, Score(0, 0, 0))
        scores[pair.kind] = Score(old.asked + 1, old.in_format + (answer is not None),
                                  old.right + (answer is not None and check(pair, answer)))
    return scores


def show_scores(scores: dict[str, Score], title: str, console: Console) -> None:
    """Print the scores as a table with a total."""
    table = Table(title, "asked", "in format", "right")
    total = Score(*(sum(getattr(score, name) for score in scores.values()) for name in ("asked", "in_format", "right")))
    for kind, score in [*sorted(scores.items()), ("all", total)]:
        table.add_row(kind, str(score.asked), f"{score.in_format / score.asked:.0%}", f"{score.right / score.asked:.0%}",
                      style="bold" if kind == "all" else None)
    console.print(table)


def evaluate_questions(path: Path, count: int, think: str, console: Console) -> dict[str, Score]:
    """Ask the model at `path` `count` held-out questions, thinking or not, and print the scores."""
    if think not in ("off", "high"):
        raise InputError(f"think is {think!r}; allowed: off, high")
    scores = ask(Engine.load(path), make_pairs(count, 0, held_out=True), think == "high")
    show_scores(scores, f"held-out questions, thinking {think}", console)
    return scores
