"""A conversation with a model: the history, the modes, and answers as they are written."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

from fathom.engine.engine import Engine
from fathom.engine.sampler import Sampling
from fathom.errors import ChatFormatError, InputError
from fathom.text import chat
from fathom.text.tokenizer import THINK_END

EFFORTS = ("off", "high", "max")
HELP = "/think off|high|max changes the mode, /new forgets the conversation, /quit leaves, Ctrl-C stops an answer"
DIM, PLAIN = "\033[2m", "\033[0m"


class Piece(NamedTuple):
    """A piece of an answer, and whether it belongs to the reasoning before it."""

    text: str
    reasoning: bool


class ChatSession:
    """Keeps the messages of one conversation. InputError for an unknown thinking mode."""

    def __init__(self, engine: Engine, sampling: Sampling, think: str = "high", system: str | None = None):
        self.engine, self.sampling, self.system = engine, sampling, system
        self.set_thinking(think)
        self.reset()

    def set_thinking(self, think: str) -> None:
        """Choose off, high or max for the answers to come."""
        if think not in EFFORTS:
            raise InputError(f"think is {think!r}; allowed: {', '.join(EFFORTS)}")
        self.think = think

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> Iterator[Piece]:
        """Ask, and yield the answer piece by piece; question and answer join the history once the answer ends or is stopped.

        An answer that breaks the chat format is kept as its plain text.
        """
        mode = "chat" if self.think == "off" else "thinking"
        asked = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self.engine.tokenizer
        prompt = chat.tokenize(asked, tokenizer, mode, self.think if self.think == "max" else None)
        think_end, end = tokenizer.special_ids[THINK_END], self.engine.model.config.eos_token_id
        ids, reasoning, stream = [], mode == "thinking", tokenizer.stream()
        try:
            for token in self.engine.stream(prompt, self.sampling):
                ids.append(token)
                if reasoning and token == think_end:
                    yield Piece(stream.flush(), True)
                    reasoning = False
                elif token != end:
                    yield Piece(stream.push(token), reasoning)
            yield Piece(stream.flush(), reasoning)
        finally:
            self.messages = [*asked, self._message(ids, mode)]

    def _message(self, ids: list[int], mode: str) -> dict:
        text = self.engine.tokenizer.decode(ids)
        try:
            message = chat.parse(text, mode)
        except ChatFormatError:
            message = {"role": "assistant", "content": self.engine.tokenizer.decode(ids, skip_special=True)}
        return {key: value for key, value in message.items() if value}


def converse(session: ChatSession, message: str | None) -> None:
    """Ask one `message`, or talk in the terminal until /quit or the end of the input."""
    if message is not None:
        _write_answer(session, message)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        sys.stdout.write(HELP + "\n")
    while True:
        if interactive:
            sys.stdout.write(f"\nyou ({session.think}): ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        try:
            _obey(session, line.strip())
        except KeyboardInterrupt:
            sys.stdout.write(f"{PLAIN if interactive else ''}\n")
        except InputError as error:
            sys.stdout.write(f"{error}\n")


def _obey(session: ChatSession, line: str) -> None:
    if line == "/new":
        session.reset()
    elif line.startswith("/think"):
        session.set_thinking(line.removeprefix("/think").strip())
    elif line.startswith("/"):
        sys.stdout.write(HELP + "\n")
    elif line:
        _write_answer(session, line)


def _write_answer(session: ChatSession, text: str) -> None:
    """Reasoning is dimmed on a terminal and left out of a pipe."""
    colours, was_reasoning = sys.stdout.isatty(), False
    for piece in session.answer(text):
        if piece.reasoning and colours and piece.text:
            sys.stdout.write(f"{DIM}{piece.text}{PLAIN}")
        elif not piece.reasoning:
            sys.stdout.write(("\n" if was_reasoning and colours else "") + piece.text)
        was_reasoning = piece.reasoning
        sys.stdout.flush()
    sys.stdout.write("\n")
