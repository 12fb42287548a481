"""An engine in a process of its own, so that it never waits for the interpreter of a server's loop.

The child steps as long as it has work. Between two steps it does all that it was told since, and after each it reports: what the step
gave, the counters, and how many commands it has followed. Nothing that the parent says is answered, so that no command waits for a step.
When the parent is gone, the child goes too.
"""

import atexit
import multiprocessing
import signal
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch

from fathom.config import ModelConfig
from fathom.engine.constraint import Grammars
from fathom.engine.engine import Engine
from fathom.engine.request import Limits, Output, Request, Stats
from fathom.engine.settings import EngineSettings
from fathom.errors import CheckpointError, FathomError, QueueFull
from fathom.text.tokenizer import Tokenizer

CLOSE_SECONDS = 60.0  # for the step that runs and the disk cache's last writes


class EngineLost(RuntimeError):
    """The engine's process ended, which no request should be able to cause."""


@dataclass(frozen=True)
class Plan:
    """What the child loads (`Engine.load`), and its threads for arithmetic; None: as torch chooses."""

    path: Path
    dtype: torch.dtype
    device: str
    packed: bool
    settings: EngineSettings
    threads: int | None = None


class Facts(NamedTuple):
    """What does not change while an engine lives."""

    tokenizer: Tokenizer
    config: ModelConfig
    limits: Limits
    block_tokens: int
    slots: int


class Report(NamedTuple):
    """Sent after a step, and where commands were followed without one."""

    outputs: list[Output]
    stats: Stats
    followed: int  # commands since the start


class RemoteEngine:
    """The face of an `Engine` whose work another process does. One thread at a time may use it, but for `grammars`.

    Raises what `Engine.load` raises, and CheckpointError where the process ends while it loads; later EngineLost once it has ended. It ends
    with the program at the latest.
    """

    def __init__(self, plan: Plan):
        context = multiprocessing.get_context("spawn")
        self._pipe, work = context.Pipe()
        self._questions, questions = context.Pipe()
        self._asking = threading.Lock()
        self._process = context.Process(target=_work, args=(plan, work, questions), name="engine")
        self._process.start()
        atexit.register(self._process.kill)  # before multiprocessing waits for its children
        work.close(), questions.close()
        self.settings = plan.settings
        self._waiting: deque[int] = deque()  # commands that added a request and are not followed yet
        self._open: dict[int, int] = {}  # by request: choices that are not finished
        self._sent = self._followed = self._requests = 0
        try:
            facts, self._stats = self._receive()
        except BaseException as error:
            self._end()
            if isinstance(error, EngineLost):
                raise CheckpointError(f"{plan.path}: {error} while it was loading; is there enough memory?") from None
            raise
        self.tokenizer, self.config, self.limits, self.block_tokens, self.slots = facts

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.limits.max_tokens

    @cached_property
    def grammars(self) -> Grammars:
        """Writes constraints; the child compiles them, beside its steps. For any number of threads."""
        return Grammars(self.tokenizer, self._check)

    @property
    def has_work(self) -> bool:
        """Whether there is something to wait for, be it bad news."""
        return bool(self._open) or self._followed < self._sent or not self._process.is_alive()

    def add(self, request: Request) -> int:
        """Queue a request; its number. InputError for a prompt that the model cannot take, QueueFull where too many wait."""
        self.limits.check(request)
        if self._stats.waiting + len(self._waiting) >= self.settings.waiting:
            raise QueueFull(f"{self.settings.waiting} requests wait already; try again later")
        self._requests += 1
        self._send("add", request)
        self._waiting.append(self._sent)
        self._open[self._requests] = request.choices
        return self._requests

    def step(self) -> list[Output]:
        """Wait for what the child's next step gives; [] where there is nothing to wait for."""
        if not self.has_work:
            return []
        report: Report = self._receive()
        self._stats, self._followed = report.stats, report.followed
        while self._waiting and self._waiting[0] <= self._followed:
            self._waiting.popleft()
        outputs = [output for output in report.outputs if output.request in self._open]
        for output in outputs:
            if output.finish is not None:
                self._open[output.request] -= 1
                if not self._open[output.request]:
                    del self._open[output.request]
        return outputs

    def cancel(self, request_id: int) -> None:
        """Forget a request: it has no further output, and its memory is free before the child's next step. Unknown ones are ignored."""
        if self._open.pop(request_id, None) is not None:
            self._send("cancel", request_id)

    def stats(self) -> Stats:
        """Counters and gauges after the last step, and all that wait now."""
        return self._stats._replace(waiting=self._stats.waiting + len(self._waiting))

    def close(self) -> None:
        """Forget all requests, and let the child finish writing."""
        with suppress(EngineLost):
            self._send("close", None)
            while True:
                self._receive()  # the child may wait for a reader
        self._process.join(CLOSE_SECONDS)
        self._end()

    def _check(self, grammar: str, where: str) -> None:
        with self._asking:
            try:
                self._questions.send((grammar, where))
                error = self._questions.recv()
            except (EOFError, OSError):
                raise EngineLost("the engine's process ended") from None
        if error is not None:
            raise error

    def _send(self, command: str, value: object) -> None:
        self._sent += 1
        try:
            self._pipe.send((command, value))
        except OSError:
            raise self._lost() from None

    def _receive(self) -> object:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(message, FathomError):
            raise message
        return message

    def _lost(self) -> EngineLost:
        self._process.join(1)
        return EngineLost(f"the engine's process ended (exit code {self._process.exitcode})")

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)


def _work(plan: Plan, pipe: Connection, questions: Connection) -> None:
    """The child: load, then follow commands and step, until told to close or the parent is gone."""
    for sent in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and a service manager reach both processes; the parent decides
        signal.signal(sent, signal.SIG_IGN)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    try:
        settings = replace(plan.settings, waiting=1 << 30)  # the parent counts who waits
        engine = Engine.load(plan.path, plan.dtype, plan.device, plan.packed, settings)
    except FathomError as error:
        pipe.send(error)
        return
    commands: SimpleQueue[tuple[str, object]] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, commands), daemon=True).start()
    threading.Thread(target=_compile, args=(questions, engine), daemon=True).start()
    try:
        with suppress(OSError):  # the parent is gone
            pipe.send((Facts(engine.tokenizer, engine.config, engine.limits, engine.block_tokens, engine.slots), engine.stats()))
            _run(engine, pipe, commands)
    finally:
        pipe.close()  # the parent need not read on
        engine.close()


def _run(engine: Engine, pipe: Connection, commands: SimpleQueue) -> None:
    """Follow what has come, step, report; until told to close."""
    followed = 0
    while True:
        batch = [] if engine.has_work else [commands.get()]
        with suppress(Empty):
            while True:
                batch.append(commands.get_nowait())
        for command, value in batch:
            if command == "close":
                return
            follow = engine.add if command == "add" else engine.cancel
            follow(value)
        followed += len(batch)
        outputs = engine.step() if engine.has_work else []
        pipe.send(Report(outputs, engine.stats(), followed))


def _listen(pipe: Connection, commands: SimpleQueue) -> None:
    """Commands as they come: the parent never waits for a step to be over."""
    command = ""
    while command != "close":
        try:
            command, value = pipe.recv()
        except (EOFError, OSError):
            command, value = "close", None
        commands.put((command, value))


def _compile(questions: Connection, engine: Engine) -> None:
    """Whether grammars can be compiled; afterwards they are, for the requests that bring them."""
    with questions, suppress(EOFError, OSError):
        while True:
            grammar, where = questions.recv()
            try:
                engine.compiler.check(grammar, where)
                questions.send(None)
            except FathomError as error:
                questions.send(error)
