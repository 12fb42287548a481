"""What the dialects share: a task becomes a request, and the engine's outputs become reasoning, content and tool calls. Knows no HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, NamedTuple

from fathom.engine.constraint import Tool
from fathom.engine.grammar import Constraint
from fathom.engine.request import Output, Request, Written
from fathom.engine.sampler import Sampling
from fathom.errors import InputError
from fathom.server.metrics import Metrics, Record
from fathom.server.service import Generates, Service, Stream
from fathom.server.settings import ServerSettings
from fathom.text.chat import Segment, fim_segments, segments
from fathom.text.chat_stream import AnswerStream, Content, Reasoning, ToolCall
from fathom.text.tokenizer import ASSISTANT, BOS, THINK, THINK_END, USER, Tokenizer

Finish = Literal["stop", "length", "tool_calls"]
ResponseFormat = tuple[Literal["json_object"]] | tuple[Literal["json_schema"], dict] | tuple[Literal["regex"], str]


@dataclass(frozen=True)
class Context:
    """What the routes of every dialect need."""

    service: Service
    settings: ServerSettings
    metrics: Metrics


@dataclass(frozen=True)
class ChatTask:
    """A conversation to continue. `messages` as fathom.text.chat takes them, with tools and a schema on one of them (see `instruct`).

    `max_tokens` (None: as many as fit) stands for the one of `sampling`. `tool_choice` is auto, none, required or a tool's name.
    `thoughts` is the beginning of the answer's reasoning, which goes on from there.
    """

    messages: list[dict]
    thinking: bool = True
    thoughts: str = ""
    effort: Literal["high", "max"] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    response_format: ResponseFormat | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    choices: int = 1
    tenant: str = ""


@dataclass(frozen=True)
class CompletionTask:
    """A text, or token ids, to continue; with a suffix, what belongs between them. `max_tokens` as in ChatTask."""

    prompt: str | tuple[int, ...]
    suffix: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    choices: int = 1
    tenant: str = ""


Task = ChatTask | CompletionTask


class Prompt(NamedTuple):
    """The tokens that a model reads for a task; `input_end` as in Request, `thinking` when the answer begins inside the reasoning."""

    ids: tuple[int, ...]
    input_end: int | None
    thinking: bool


class Delta(NamedTuple):
    """More of a choice, with the tokens it was written with."""

    choice: int
    event: Reasoning | Content | ToolCall
    written: tuple[Written, ...]


class End(NamedTuple):
    """The last of a choice. `stop` is the stop string that ended it; completion tokens include those of the reasoning."""

    choice: int
    finish: Finish
    stop: str | None
    prompt_tokens: int
    hit_tokens: int
    completion_tokens: int
    reasoning_tokens: int


def instruct(messages: list[dict], functions: list[dict], schema: object = None) -> list[dict]:
    """Messages whose first system message carries OpenAI-style tools and a schema for the answer; one is put first if there is none."""
    extra = ({"tools": functions} if functions else {}) | ({"response_format": schema} if schema else {})
    if not extra:
        return messages
    place = next((index for index, message in enumerate(messages) if message.get("role") == "system"), None)
    if place is None:
        return [{"role": "system", "content": "", **extra}, *messages]
    return [*messages[:place], messages[place] | extra, *messages[place + 1:]]


async def start(context: Context, task: Task, record: Record | None = None) -> "Answer":
    """The answer to a task, which must be closed; raises FathomErrors: unusable input, QueueFull, Draining, EngineFailed."""
    began = time.monotonic()
    with context.service.place():
        request, thinking = await asyncio.to_thread(prepare, task, context.service.engine)
        stream = await context.service.submit(request)
    reader = AnswerReader(context.service.engine.tokenizer, task, thinking, len(request.prompt))
    return Answer(stream, reader, context.metrics, record or Record(), began)


def prepare(task: Task, engine: Generates) -> tuple[Request, bool]:
    """The request of a task, and whether its answer begins inside the reasoning; InputError or ChatFormatError for an unusable one.

    Slow for long prompts and large schemas, and safe to run in a thread.
    """
    prompt = read_prompt(task, engine.tokenizer, engine.max_tokens)
    wanted = 1 if task.max_tokens is None else task.max_tokens
    if len(prompt.ids) + wanted > engine.max_tokens:
        raise InputError(
            f"This model's maximum context length is {engine.max_tokens} tokens. However, you requested {len(prompt.ids) + wanted} tokens "
            f"({len(prompt.ids)} in the messages, {wanted} in the completion). Please reduce the length of the messages or completion.")
    sampling = replace(task.sampling, max_tokens=task.max_tokens or engine.max_tokens - len(prompt.ids))
    constraint = _constraint(task, engine, prompt.thinking) if isinstance(task, ChatTask) else None
    return Request(prompt.ids, sampling, task.choices, task.tenant, prompt.input_end, constraint), prompt.thinking


def read_prompt(task: Task, tokenizer: Tokenizer, most_tokens: int) -> Prompt:
    """The prompt of a task; InputError before any work when its text must have more than `most_tokens`."""
    if isinstance(task, ChatTask):
        pieces = segments(task.messages, "thinking" if task.thinking else "chat", task.effort if task.thinking else None)
        pieces.append(Segment(task.thoughts, markup=False))
    elif isinstance(task.prompt, tuple):
        return Prompt(task.prompt, None, False)
    elif task.suffix is not None:
        pieces = [(BOS, True), *fim_segments(task.prompt, task.suffix)]
    else:
        pieces = [(BOS, True), (task.prompt, False)]
    characters = sum(len(text) for text, _ in pieces)
    if characters > most_tokens * _longest_token(tokenizer):
        raise InputError(f"This model's maximum context length is {most_tokens} tokens. However, your messages have {characters} "
                         "characters. Please reduce the length of the messages.")
    ids = tuple(tokenizer.encode_segments(pieces))
    if isinstance(task, CompletionTask):
        return Prompt(ids, None, False)
    return Prompt(ids, _input_end(ids, tokenizer), bool(task.thoughts) or ids[-1] == tokenizer.special_ids[THINK])


@cache
def _longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token: no fewer than the characters it may stand for."""
    return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))


def _input_end(ids: tuple[int, ...], tokenizer: Tokenizer) -> int:
    """Behind the last opening of the assistant, from which a next turn goes on; the whole prompt if a user's turn comes after it."""
    assistant, user = (tokenizer.special_ids[token] for token in (ASSISTANT, USER))
    last = next((at for at in reversed(range(len(ids))) if ids[at] in (assistant, user)), -1)
    return last + 1 if last >= 0 and ids[last] == assistant else len(ids)


def _constraint(task: ChatTask, engine: Generates, thinking: bool) -> Constraint | None:
    """What bounds the answer: calls that have to be made, else the format asked for, else calls that may be made."""
    if task.tools and task.tool_choice not in ("auto", "none"):
        return engine.grammars.tools(task.tools, task.tool_choice, thinking)
    match task.response_format:
        case ("json_object",):
            return engine.grammars.json_object(thinking)
        case ("json_schema", schema):
            return engine.grammars.json_schema(schema, thinking)
        case ("regex", pattern):
            return engine.grammars.regex(pattern, thinking)
    if task.tools and task.tool_choice == "auto":
        return engine.grammars.tools(task.tools, "auto", thinking)
    return None


class AnswerReader:
    """Outputs of a request -> deltas and ends."""

    def __init__(self, tokenizer: Tokenizer, task: Task, thinking: bool, prompt_tokens: int):
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._choices = [_ChoiceReader(task, thinking) for _ in range(task.choices)]

    def read(self, output: Output) -> list[Delta | End]:
        """What has become certain with this output."""
        return self._choices[output.choice].read(output, self._tokenizer, self._prompt_tokens)


class _ChoiceReader:
    def __init__(self, task: Task, thinking: bool):
        chat = isinstance(task, ChatTask)
        self._stream = AnswerStream(thinking, bool(task.tools) and task.tool_choice != "none") if chat else None
        self._thinking = thinking
        self._thoughts: list[Written] = []  # tokens whose text has not been given out
        self._words: list[Written] = []
        self._tokens = self._reasoning_tokens = 0

    def read(self, output: Output, tokenizer: Tokenizer, prompt_tokens: int) -> list[Delta | End]:
        self._count(output.tokens, tokenizer)
        if self._stream is None:
            events = [Content(output.text)] if output.text else []
        else:
            events = self._stream.push(output.text) if output.text else []
            if output.finish is not None:
                events += self._stream.finish()
        deltas: list[Delta | End] = [Delta(output.choice, event, self._take(event)) for event in events]
        if output.finish is not None:
            called = self._stream is not None and self._stream.calls and output.finish == "stop"
            deltas.append(End(output.choice, "tool_calls" if called else output.finish, output.stop, prompt_tokens, output.hit_tokens,
                              self._tokens, self._reasoning_tokens))
        return deltas

    def _count(self, tokens: tuple[Written, ...], tokenizer: Tokenizer) -> None:
        """Sort new tokens into those of the reasoning and of the rest; the tag between them and the end token are neither's text."""
        self._tokens += len(tokens)
        for written in tokens:
            if self._thinking:
                self._reasoning_tokens += 1
            if self._thinking and written.token == tokenizer.special_ids[THINK_END]:
                self._thinking = False
            elif written.logprob is not None and written.token != tokenizer.eos_id:
                (self._thoughts if self._thinking else self._words).append(written)

    def _take(self, event: Reasoning | Content | ToolCall) -> tuple[Written, ...]:
        waiting = self._thoughts if isinstance(event, Reasoning) else self._words
        written = tuple(waiting)
        waiting.clear()
        return written


class Answer:
    """An answer that is being written: `batches` gives deltas and ends as they come, iterating gives them one by one."""

    def __init__(self, stream: Stream, reader: AnswerReader, metrics: Metrics, record: Record, began: float):
        self.prompt_tokens = len(stream.request.prompt)
        self._stream, self._reader, self._metrics, self._record, self._began = stream, reader, metrics, record, began
        record.prompt_tokens += self.prompt_tokens

    async def batches(self) -> AsyncIterator[list[Delta | End]]:
        """All that has come since the last look, never nothing; ends after every choice's End."""
        last, first = self._began, True
        written = 0
        async for outputs in self._stream:
            now = time.monotonic()
            batch: list[Delta | End] = []
            for output in outputs:
                written += len(output.tokens)
                batch += self._reader.read(output)
            if written and first:
                self._metrics.first_token(now - last)
                self._record.hit_tokens += outputs[0].hit_tokens
            elif not first:
                self._metrics.next_token(now - last)
            if written:
                first, last = False, now
            for item in batch:
                if isinstance(item, End):
                    self._metrics.choice_ended(item.finish)
            self._record.output_tokens += sum(len(output.tokens) for output in outputs)
            if batch:
                yield batch
        self._metrics.request_ended(time.monotonic() - self._began, self.prompt_tokens, written)

    async def __aiter__(self) -> AsyncIterator[Delta | End]:
        async for batch in self.batches():
            for item in batch:
                yield item

    def close(self) -> None:
        """Cancel what is not finished."""
        self._stream.close()
