"""Mathematics from outside: reasoning-gym's generators, and questions from a file (extra `fathom[align]`).

The libraries run in a process of their own (library_worker.py), which is ended when an answer takes too long to judge.
"""

import importlib.util
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from fathom.align import sandbox_filter
from fathom.align.environments.base import Environment, Score, Task, assistant, check_effort, final_text
from fathom.align.environments.math import ANSWER_LENGTH, answer_of, number, same_value
from fathom.errors import DataError, InputError

WORKER = Path(__file__).with_name("library_worker.py")
START_SECONDS, ANSWER_SECONDS = 300.0, 30.0
# Of reasoning-gym 0.1.25: no right answer of its own, or full marks for anything.
UNFIT = ("boxnet", "game_of_life_halting", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour", "composite")


class LibraryWorker:
    """The process with the libraries; starts at first use, and again after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, **request: object) -> object:
        """The answer to a request; None where it raised, took longer than 30 seconds or ended the process."""
        with self._lock:
            if self._process is None:
                # The hash seed: a dataset may walk over a set, and tasks must repeat in another process.
                code = sandbox_filter.build(False, False).hex() if sandbox_filter.supported() else ""
                self._process = subprocess.Popen([sys.executable, "-P", str(WORKER), code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                 stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONHASHSEED": "0"})
                self._read(START_SECONDS)
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                line = self._read(ANSWER_SECONDS)
            except BrokenPipeError:
                line = b""
            if not line.endswith(b"\n"):
                self._end()
                return None
            return json.loads(line)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._end()

    def _read(self, seconds: float) -> bytes:
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not more:
                break
            line += more
        return line

    def _end(self) -> None:
        process, self._process = self._process, None
        process.kill()
        process.stdout.close()
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.wait()


class GymEnvironment(Environment):
    """A dataset of reasoning-gym, by its name there. `settings`: the dataset's own, one set for each level; by default its defaults.

    A `worker` may be shared between environments. InputError where the library or such a dataset is missing, or its scores unfit.
    """

    def __init__(self, dataset: str, settings: tuple[dict, ...] = ({},), worker: LibraryWorker | None = None):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise InputError("reasoning-gym is not installed; pip install 'fathom[align]'")
        if dataset in UNFIT:
            raise InputError(f"reasoning-gym's {dataset} cannot be scored: it has no single right answer, or takes any")
        self.name, self.dataset, self.settings = f"gym_{dataset}", dataset, settings
        self.levels = range(1, len(settings) + 1)
        self.worker = worker or LibraryWorker()
        if self._ask("task", 1, 0) is None:
            raise InputError(f"reasoning-gym has no dataset {dataset!r} with these settings")

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A task of the dataset; its seed there is all that is kept besides the answer."""
        seed = rng.randrange(2**31)
        entry = self._ask("task", level, seed)
        if not isinstance(entry, dict) or not isinstance(entry["answer"], str):
            raise InputError(f"reasoning-gym's {self.dataset} gave no task with an answer at level {level}")
        return [{"role": "user", "content": entry["question"]}], {"seed": seed, "answer": entry["answer"]}

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 for full marks of the dataset, else 0: some give a little to anything."""
        text = final_text(turns)
        if text is None:
            return Score(0.0, False, "no finished answer")
        full = self._ask("score", task.level, task.facts["seed"], answer=text.strip()) == 1.0
        return Score(float(full), True, "right" if full else "wrong, or too long to judge")

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The dataset's own answer; it comes without workings."""
        return [assistant(task.facts["answer"], f"The answer is {task.facts['answer']}." if check_effort(effort) else None)]

    def close(self) -> None:
        """End the library's process."""
        self.worker.close()

    def _ask(self, what: str, level: int, seed: int, **more: object) -> object:
        return self.worker.ask(do=what, dataset=self.dataset, seed=seed, settings=self.settings[level - 1], **more)


class QuestionsEnvironment(Environment):
    """Questions of a JSONL file with "question", "answer" and optionally "reasoning" (GSM8K, say); DataError names what is wrong.

    Numbers are compared exactly, other answers by math-verify where it is installed, else as texts.
    """

    levels = range(1, 2)

    def __init__(self, path: str | Path, name: str = "questions", worker: LibraryWorker | None = None):
        self.name, self.worker = name, worker or LibraryWorker()
        self.verify = importlib.util.find_spec("math_verify") is not None
        try:
            rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
            self.rows = [(str(row["question"]), str(row["answer"]), str(row.get("reasoning") or "")) for row in rows]
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}: every line must be a JSON object with "question" and "answer"') from None
        if not self.rows:
            raise DataError(f"{path}: no questions")

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A random question of the file."""
        question, answer, reasoning = rng.choice(self.rows)
        return [{"role": "user", "content": question}], {"answer": answer, "reasoning": reasoning}

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 for an answer equal to the file's."""
        text = final_text(turns)
        if text is None:
            return Score(0.0, False, "no finished answer")
        gold = task.facts["answer"]
        right = same_value(text, gold)
        if not right and self.verify and number(gold) is None and len(text) <= ANSWER_LENGTH:
            right = self.worker.ask(do="equal", gold=answer_of(gold), answer=answer_of(text)) is True
        return Score(float(right), True, "right" if right else f"expected {gold[:40]!r}, got {text[:40]!r}")

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The file's answer and reasoning."""
        reasoning = task.facts["reasoning"] or f"The answer is {task.facts['answer']}."
        return [assistant(task.facts["answer"], reasoning if check_effort(effort) else None)]

    def close(self) -> None:
        """End the library's process."""
        self.worker.close()
