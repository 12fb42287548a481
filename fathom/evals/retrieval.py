"""Needle retrieval by length and depth: a fact stated in filler, asked for at the end (report 8.4's question, in the form that data/recall.py
teaches).

A text of a given number of tokens states some facts, "The code of the amber lantern is 48213.", one of them at the wanted depth and the
others anywhere, and ends with "Question: What is the code of the amber lantern? Answer:". Two measures: whether the greedy answer is
exactly " 48213.", token by token; and whether it is likelier than the same text's other values in its place.
"""

import copy
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fathom.data.recall import KEYS, fact_key, question, recall_document, statement
from fathom.engine.engine import Engine
from fathom.errors import InputError
from fathom.files import write_text
from fathom.model.cache import Cache
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

NEEDLES = "needles.json"
CHUNK = 1024  # tokens of a prompt read at a time


@dataclass(frozen=True)
class Needles:
    """What to ask: every length in tokens with every depth (0: the start, 1: the end), `repeats` texts each, of `facts` facts."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 4
    facts: int = 4
    seed: int = 0

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 128:
            raise InputError(f"needle lengths are {list(self.lengths)}; allowed: one or more, each at least 128 tokens")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"needle depths are {list(self.depths)}; allowed: one or more, each from 0 to 1")
        if self.repeats < 1 or self.facts < 2:
            raise InputError(f"needles of {self.repeats} repeats and {self.facts} facts; allowed: at least 1, and 2")

    @classmethod
    def of_lengths(cls, text: str) -> "Needles":
        """The usual questions at lengths written as "512,1024"."""
        try:
            return cls(lengths=tuple(int(length) for length in text.split(",")))
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"lengths is {text!r}; write it as 512,1024") from None


@dataclass(frozen=True)
class Case:
    """One text: the prompt's tokens, and the answers' tokens, the right one first."""

    prompt: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Cell:
    """Shares of the texts of one length and depth: answered exactly, and with the right value the likeliest."""

    exact: float
    best: float


def make_case(tokenizer: Tokenizer, length: int, depth: float, facts: int, rng: random.Random) -> Case:
    """A text whose prompt has `length` tokens, or a few fewer, with the fact that is asked for at `depth` of its filler."""
    keys = [fact_key(number) for number in rng.sample(range(KEYS), facts)]
    values = [str(value) for value in rng.sample(range(10000, 100000), facts)]
    stated = [tokenizer.encode(" " + statement(*fact)) for fact in zip(keys, values, strict=True)]
    asked = tokenizer.encode(" " + question(keys[0]))
    room = length - 1 - len(asked) - sum(map(len, stated))
    if room < 0:
        raise InputError(f"{facts} facts and a question do not fit into {length} tokens; ask for longer texts or fewer facts")
    filler = _filler(tokenizer, room, rng)
    places = sorted([(round(depth * len(filler)), stated[0]), *((rng.randint(0, len(filler)), tokens) for tokens in stated[1:])],
                    key=lambda place: place[0])
    body, done = [], 0
    for place, tokens in places:
        body += [*(token for sentence in filler[done:place] for token in sentence), *tokens]
        done = place
    body += [token for sentence in filler[done:] for token in sentence]
    return Case([tokenizer.bos_id, *body, *asked], [tokenizer.encode(f" {value}.") for value in values])


@torch.inference_mode()
def score(model: Transformer, case: Case) -> tuple[bool, bool]:
    """Whether the greedy answer is exactly the right one, and whether the right one is the likeliest of the case's answers."""
    longest = max(map(len, case.answers))
    cache = model.new_cache(1, len(case.prompt) + longest)
    for first in range(0, len(case.prompt), CHUNK):
        chunk = torch.tensor([case.prompt[first:first + CHUNK]])
        last_V = model(chunk, cache=cache, last_only=True).logits[0, -1]
    found = [_answer(model, copy.deepcopy(cache), last_V, answer) for answer in case.answers]
    return found[0][1], found[0][0] > max(log_probability for log_probability, _ in found[1:])


def retrieval(model: Transformer, tokenizer: Tokenizer, needles: Needles, console: Console | None = None) -> list[list[Cell]]:
    """Cells by length, then depth. The same seed asks the same questions of every model with this tokenizer."""
    table = []
    for length in needles.lengths:
        row = []
        for depth in needles.depths:
            rng = random.Random(f"{needles.seed} {length} {depth}")
            scores = [score(model, make_case(tokenizer, length, depth, needles.facts, rng)) for _ in range(needles.repeats)]
            row.append(Cell(*(sum(column) / needles.repeats for column in zip(*scores, strict=True))))
        table.append(row)
        if console:
            console.print(f"{length:,} tokens: {sum(cell.exact for cell in row) / len(row):.0%} exact", soft_wrap=True)
    return table


def evaluate_needles(path: Path, needles: Needles, console: Console) -> list[list[Cell]]:
    """Ask the model at `path`, print the table and keep it as needles.json in `path`."""
    engine = Engine.load(path)
    longest = engine.config.max_position_embeddings - 16
    if max(needles.lengths) > longest:
        raise InputError(f"a text of {max(needles.lengths):,} tokens is longer than this model reads with an answer, {longest:,}")
    cells = retrieval(engine.model, engine.tokenizer, needles, console)
    table = Table(title=f"needles: exact, likeliest of {needles.facts} values", title_justify="left")
    table.add_column("tokens", justify="right")
    for depth in needles.depths:
        table.add_column(f"{depth:.0%}", justify="right")
    for length, row in zip(needles.lengths, cells, strict=True):
        table.add_row(f"{length:,}", *(f"{cell.exact:.0%}, {cell.best:.0%}" for cell in row))
    console.print(table)
    kept = asdict(needles) | {"cells": [[asdict(cell) for cell in row] for row in cells]}
    write_text(path / NEEDLES, json.dumps(kept, indent=1) + "\n")
    return cells


def _answer(model: Transformer, cache: Cache, last_V: torch.Tensor, answer: list[int]) -> tuple[float, bool]:
    """Log-probability of an answer after the cache's prompt, and whether every token of it is the likeliest at its place."""
    logits_AV = last_V[None]
    if len(answer) > 1:
        logits_AV = torch.cat([logits_AV, model(torch.tensor([answer[:-1]]), cache=cache).logits[0]])
    target_A = torch.tensor(answer)
    log_probability_A = logits_AV.float().log_softmax(-1).gather(1, target_A[:, None])
    return float(log_probability_A.sum()), bool((logits_AV.argmax(-1) == target_A).all())


def _filler(tokenizer: Tokenizer, room: int, rng: random.Random) -> list[list[int]]:
    """Tokens of sentences that state no fact, as many as fit into `room` tokens."""
    sentences: list[list[int]] = []
    used = 0
    while True:
        text = recall_document(rng, 2000, facts=1).strip()
        for sentence in text.split(". "):
            if "code of the" in sentence or not sentence:
                continue
            tokens = tokenizer.encode((" " if sentences else "") + sentence.rstrip(".") + ".")
            if used + len(tokens) > room:
                return sentences
            sentences.append(tokens)
            used += len(tokens)
