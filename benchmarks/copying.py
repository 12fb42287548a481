"""What a model of the pipeline copies: its probability of the right number or word, with the right text before it.

    python benchmarks/copying.py runs/pipeline/pro/student            after SFT, in the chat format
    python benchmarks/copying.py runs/pipeline/pro/base --plain       a base, as its corpus writes

Worked solutions of held-out tasks, level 1, effort high: 300 of mathematics (the reasoning's numbers that stand in the question, its other numbers, and the
second operand of a sum of digits) and 250 of instructions (the first, second and third word chosen from the list). About 20 seconds.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch

from fathom.align.domains import Domains
from fathom.align.environments.base import EFFORTS, Environment, Task
from fathom.align.pipeline import plain_text
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.text import chat
from fathom.text.tokenizer import Tokenizer

TASKS = {"math": 300, "instructions": 250}


class Reader:
    """A model that reads worked solutions, as chats or as `plain` text."""

    def __init__(self, run: str, plain: bool):
        folder = find_model(run)
        self.tokenizer, self.model, self.plain = Tokenizer.load(folder), load_model(folder).eval(), plain

    @torch.inference_mode()
    def probabilities(self, messages: list[dict], reasoning: str) -> Iterator[tuple[int, str, float]]:
        """Of each token of the reasoning, where it begins there, its text, and its probability."""
        mode = EFFORTS["high"]
        ids = self.tokenizer.encode(plain_text(messages, mode[0])) if self.plain else chat.tokenize(messages, self.tokenizer, *mode, drop_thinking=False)
        pieces = [self.tokenizer.decode([id]) for id in ids]
        at = -"".join(pieces).rindex(reasoning)
        right_S = self.model(torch.tensor([ids])).logits[0, :-1].float().softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        for piece, probability in zip(pieces, [1.0, *right_S], strict=True):
            if 0 <= at < len(reasoning):
                yield at, piece, probability
            at += len(piece)


def of_numbers(reader: Reader, task: Task, turns: list[dict]) -> Iterator[tuple[str, float]]:
    """The numbers of a worked solution of mathematics."""
    asked, numbers = set(re.findall(r"\d+", task.question)), 0
    for _, piece, probability in reader.probabilities(task.messages + turns, turns[0]["reasoning_content"]):
        if piece.strip().isdecimal():
            numbers += 1
            yield "numbers of the question" if piece.strip() in asked else "other numbers", probability
            if numbers == 2 and "Write the digits" in task.question:
                yield "second operand of digits", probability


def of_words(reader: Reader, task: Task, turns: list[dict]) -> Iterator[tuple[str, float]]:
    """The words that a worked solution chooses from a list; a word's probability is that of all its tokens."""
    reasoning = turns[0]["reasoning_content"]
    chosen = re.match(r"Choose ([^.]*)\.", reasoning)
    if chosen is None:
        return
    tokens = list(reader.probabilities(task.messages + turns, reasoning))
    for number, word in enumerate(re.finditer(r"\w+", chosen[1]), 1):
        begin, end = chosen.start(1) + word.start(), chosen.start(1) + word.end()
        inside = [p for at, piece, p in tokens if at >= begin - 1 and begin < at + len(piece) <= end]
        if inside:
            yield f"word {number} of the list", math.prod(inside)


def main(run: str, plain: bool) -> None:
    reader, found, known = Reader(run, plain), defaultdict(list), Domains()
    for name, of in (("math", of_numbers), ("instructions", of_words)):
        environment: Environment = known[name]
        for seed in range(TASKS[name]):
            task = environment.task(seed, "held_out", 1)
            for kind, probability in of(reader, task, environment.demonstration(task, "high")):
                found[kind].append(probability)
    for kind, values in sorted(found.items()):
        print(f"{kind:28} {sum(values) / len(values):.2f}   ({len(values)})")


if __name__ == "__main__":
    main(sys.argv[1], "--plain" in sys.argv[2:])
