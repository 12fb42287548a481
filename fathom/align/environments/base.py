"""The interface of environments: tasks with a reward that a program can check (report section 5, "verifiable rewards").

An environment makes a task from (seed, split, level), answers the model's tool calls, scores what was said and shows a worked
right answer. It holds no state between calls: everything that happened stands in the turns, so that an episode goes on from a
log, or in another process. Knows no tokens, no model and no sampling.

An episode, with `turns` all messages after the task's own:
    turns = []
    while True:
        turns.append(read_answer(<text the model wrote after chat.encode(task.messages + turns)>, thinking, bool(task.tools)))
        results = environment.step(task, turns)
        if results is None: break
        turns += results
    score = environment.score(task, turns)
An answer that was cut off (token limit) is marked by the caller with `wo_eos: True`, the chat format's own mark.
"""

import json
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from fathom.data.questions import is_held_out
from fathom.errors import InputError
from fathom.text.templates import CALL_OPEN
from fathom.text.tokenizer import SPECIAL_TOKENS

SPLITS = ("train", "held_out")
SEEDS = 2**31  # of each split; held-out tasks are made from the seeds above
TRIES = 10_000

# Effort -> thinking_mode and reasoning_effort of `chat.encode` (report 5.1.1: non-think, think high, think max).
EFFORTS = {"chat": ("chat", None), "high": ("thinking", "high"), "max": ("thinking", "max")}


@dataclass(frozen=True)
class Task:
    """One question. `domain`, `split`, `seed` and `level` determine the rest, so a log needs only `key`.

    `messages`: the prompt, as `chat.encode` takes it; tools stand on its system message. `facts`: what scoring needs, JSON-able,
    never shown to the model.
    """

    domain: str
    split: str
    seed: int
    level: int
    messages: list[dict]
    facts: dict = field(repr=False)

    @property
    def key(self) -> str:
        """The task's name, for logs: "math/train/17/2" is domain, split, seed and level."""
        return f"{self.domain}/{self.split}/{self.seed}/{self.level}"

    @property
    def tools(self) -> list[dict]:
        """The tools offered, as OpenAI function schemas; empty where the task is answered in one turn."""
        return [tool for message in self.messages for tool in message.get("tools", ())]

    @property
    def question(self) -> str:
        """The text of the last user message."""
        return next(message["content"] for message in reversed(self.messages) if message["role"] == "user")


@dataclass(frozen=True)
class Score:
    """The verdict on an episode.

    `reward` from 0 to 1. `valid`: the last answer is finished, not empty and free of the format's own tokens. `calls`: tool calls
    attempted, broken ones included; `valid_calls`: those that parse and fit a tool's schema. `reason`: one line, for people.
    """

    reward: float
    valid: bool
    reason: str
    calls: int = 0
    valid_calls: int = 0


class Environment(ABC):
    """A domain: `name`, `levels` (1 is the easiest) and the four methods. Methods may be called from several threads."""

    name: str
    levels: range

    def task(self, seed: int, split: str = "train", level: int = 1) -> Task:
        """The task of a seed from 0 to SEEDS - 1; the same arguments always give the same task.

        Splits have disjoint ranges of seeds, and no question of one split can be asked in the other: it belongs to the side that
        the hash of its wording says. Raises InputError for arguments outside of their range.
        """
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        if not 0 <= seed < SEEDS:
            raise InputError(f"seed is {seed}; allowed: from 0 to {SEEDS - 1}")
        if level not in self.levels:
            raise InputError(f"level is {level}; {self.name} has levels {self.levels[0]} to {self.levels[-1]}")
        held_out = split == "held_out"
        rng = random.Random(f"{self.name}/{seed + SEEDS * held_out}/{level}")
        for _ in range(TRIES):
            messages, facts = self.make(rng, level)
            task = Task(self.name, split, seed, level, messages, facts)
            if is_held_out(self.side(task)) == held_out:
                return task
        raise InputError(f"{self.name} level {level} has too few questions for a {split} side")

    @abstractmethod
    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """Messages and facts of one random task; all chance comes from `rng`."""

    def side(self, task: Task) -> str:
        """The wording whose hash decides between training and held-out side."""
        return task.question

    def step(self, task: Task, turns: list[dict]) -> list[dict] | None:
        """The tool messages that answer the last turn's calls; None where the episode ends."""
        return None

    @abstractmethod
    def score(self, task: Task, turns: list[dict]) -> Score:
        """The verdict on an episode; never raises, whatever the model wrote."""

    def scores(self, episodes: list[tuple[Task, list[dict]]]) -> list[Score]:
        """`score` for many episodes, where that is faster than one by one."""
        return [self.score(task, turns) for task, turns in episodes]

    @abstractmethod
    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """Turns that score 1: a worked right answer, with `reasoning_content` for "high" and "max", without for "chat"."""

    def careless(self, task: Task, effort: str) -> list[dict]:
        """As `demonstration`, but the last thing to do is left out: finished and well formed, and as a rule wrong. InputError where
        the domain has none.
        """
        raise InputError(f"{self.name} has no careless demonstrations; set demonstrations.careless to 0")

    def close(self) -> None:
        """Give back what the environment holds (processes of a sandbox); it may be used again afterwards."""


def assistant(content: str, reasoning: str | None = None, calls: list[dict] | None = None) -> dict:
    """An assistant's turn in the shape that `chat.parse` returns; `calls` from `tool_call`."""
    return {"role": "assistant", "content": content, "reasoning_content": reasoning or "", "tool_calls": calls or []}


def tool_call(name: str, arguments: dict) -> dict:
    """A call in OpenAI's shape, its arguments as a JSON string."""
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def final_text(turns: list[dict]) -> str | None:
    """The content of the last turn, or None where it is no valid last answer of the assistant.

    Valid means: finished, not empty, no tool calls, and nothing in it that only the chat format may write.
    """
    if not turns or turns[-1].get("role") != "assistant":
        return None
    last = turns[-1]
    text = last.get("content") or ""
    if last.get("wo_eos") or last.get("prefix") or last.get("tool_calls"):
        return None
    return None if not text.strip() or any(token in text for token in SPECIAL_TOKENS) else text


def broken_calls(turns: list[dict]) -> int:
    """Tool calls that were begun in ordinary text: what `read_answer` leaves of a call that breaks the format."""
    texts = (turn.get("content") or "" for turn in turns if turn.get("role") == "assistant")
    return sum(max(text.count(CALL_OPEN), "｜DSML｜tool_calls" in text) for text in texts)


def check_effort(effort: str) -> bool:
    """Whether an effort reasons before it answers; InputError for an unknown one."""
    if effort not in EFFORTS:
        raise InputError(f"effort is {effort!r}; expected one of {', '.join(EFFORTS)}")
    return EFFORTS[effort][0] == "thinking"
