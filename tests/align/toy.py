"""Environments so simple that an untrained model earns rewards in them, a micro model, and runs in a process that may be killed."""

import sys
from pathlib import Path

import torch
from rich.console import Console

from fathom import recipe as recipes
from fathom.align.distill import Distill, distill
from fathom.align.environments.base import Environment, Score, assistant, broken_calls, final_text, tool_call
from fathom.align.grpo import Grpo, reinforce
from fathom.align.sft import Sft, fine_tune
from fathom.checkpoint.released import save_model
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config
from tests.runs import WORDS

QUIET = Console(quiet=True)
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}


class Letters(Environment):
    """The more of a letter in the answer, the better; "letters" wants e, "other" wants a."""

    levels = range(1, 3)

    def __init__(self, name="letters", wanted="e"):
        self.name, self.wanted = name, wanted

    def make(self, rng, level):
        return [{"role": "user", "content": f"Say {rng.randrange(10**6)}."}], {}

    def score(self, task, turns):
        text = final_text(turns)
        shown = turns[-1].get("content") or ""
        return Score(min(1.0, shown.count(self.wanted) / 4), text is not None, "counted")

    def demonstration(self, task, effort):
        return [assistant(self.wanted * 4, "so" if effort != "chat" else None)]


class Looking(Environment):
    """Two calls of a tool, then an answer that repeats what was seen."""

    name, levels = "looking", range(1, 2)

    def make(self, rng, level):
        seen = rng.choice(["red", "blue", "green"])
        return [{"role": "system", "content": "Look twice.", "tools": [TOOL]},
                {"role": "user", "content": f"What is at {rng.randrange(1000)}?"}], {"seen": seen}

    def step(self, task, turns):
        calls = turns[-1].get("tool_calls") or []
        return [{"role": "tool", "tool_call_id": "", "content": task.facts["seen"]} for _ in calls] or None

    def score(self, task, turns):
        calls = [call for turn in turns for call in turn.get("tool_calls") or []]
        right = len(calls) == 2 and final_text(turns) == task.facts["seen"]
        return Score(float(right), final_text(turns) is not None, "looked", len(calls) + broken_calls(turns), len(calls))

    def demonstration(self, task, effort):
        look = assistant("", "I look." if effort != "chat" else None, [tool_call("look", {"at": "there"})])
        results = [{"role": "tool", "tool_call_id": "", "content": task.facts["seen"]}]
        return [look, *results, look, *results, assistant(task.facts["seen"], "Seen." if effort != "chat" else None)]


TOYS = {environment.name: environment for environment in (Letters(), Letters("other", "a"), Looking())}


def micro_tokenizer() -> Tokenizer:
    """A vocabulary of 300 tokens."""
    return Tokenizer.train([" ".join(WORDS)] * 3, 300)


def micro_folder(folder: Path, seed: int = 0, vocab_size: int = 320, **changes) -> Path:
    """A random micro model with its tokenizer, on disk."""
    config = small_config([4, 0], vocab_size=vocab_size, hidden_size=32, index_n_heads=2, hc_mult=2, hc_sinkhorn_iters=5, **changes)
    save_model(random_model(config, seed), folder)
    micro_tokenizer().save(folder)
    return folder


def run(kind: str, recipe: Path, resume: bool = False) -> None:
    """A run of this kind by one thread, as a process with OMP_NUM_THREADS=1 does it."""
    settings, function = {
        "grpo": (Grpo, lambda recipe: reinforce(recipe, TOYS, resume, QUIET)),
        "distill": (Distill, lambda recipe: distill(recipe, TOYS, resume, QUIET)),
        "sft": (Sft, lambda recipe: fine_tune(recipe, Path(), resume, QUIET, TOYS))}[kind]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        function(recipes.load(settings, recipe))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":  # python -m tests.align.toy KIND RECIPE
    run(sys.argv[1], Path(sys.argv[2]))
