"""OpenAI's and DeepSeek's dialect: POST /completions, texts to continue or to fill in the middle."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from fathom.errors import InputError
from fathom.server.guards import tenant
from fathom.server.metrics import Record
from fathom.server.openai_answer import DONE, CompletionText, Head, completion_choice, joined_logprobs, sse, usage
from fathom.server.openai_chat import ERRORS, check_wishes, failed_event, joined_events, request_id, sampling
from fathom.server.openai_objects import Completion
from fathom.server.openai_types import CompletionRequest
from fathom.server.responses import STREAM, EventStream, Whole
from fathom.server.settings import ServerSettings
from fathom.server.tasks import Answer, CompletionTask, Context, Delta, End, start

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


def router(context: Context, fingerprint: str) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["openai"])

    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        settings, record = context.settings, request.scope["fathom.record"]
        check_wishes(body, settings)
        record.tenant = tenant(request.scope, body.user_id or body.user)
        tasks = completion_tasks(body, record.tenant, settings)
        head = Head(request_id("cmpl", request), int(time.time()), settings.model_name, fingerprint, "text_completion")
        answers = await _start_all(context, tasks, record)
        texts = [_echoed(task, context) if body.echo else "" for task in tasks]
        running = _Running(head, answers, tasks[0].choices, texts, body.logprobs is not None, context)
        if not body.stream:
            return Whole(running.whole(), running.close, settings.keep_alive)
        include = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(running.events(include), running.close, failed_event, settings.keep_alive)

    for root in ("/v1", "", "/beta", "/beta/v1"):
        routes.add_api_route(f"{root}/completions", create_completion, methods=["POST"], response_model=Completion,
                             responses=STREAM | ERRORS, operation_id="create_completion", include_in_schema=root == "/v1")
    return routes


def completion_tasks(body: CompletionRequest, tenant: str, settings: ServerSettings) -> list[CompletionTask]:
    """A task for each prompt; InputError for fields that do not go together, and for more prompts than are allowed."""
    prompts = _prompts(body)
    if len(prompts) > settings.max_prompts:
        raise InputError(f"prompt: {len(prompts)} prompts; allowed: up to {settings.max_prompts}")
    if body.suffix is not None and not isinstance(prompts[0], str):
        raise InputError("suffix: it needs a prompt that is text")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InputError("best_of: this server does not choose among answers; leave it out, and use n")
    if body.echo and body.logprobs is not None:
        raise InputError("logprobs: those of the prompt are not computed; use them without echo")
    wishes = replace(sampling(body), logprobs=body.logprobs)
    return [CompletionTask(prompt, body.suffix, wishes, body.max_tokens or DEFAULT_MAX_TOKENS, body.n or 1, tenant) for prompt in prompts]


def _prompts(body: CompletionRequest) -> list[str | tuple[int, ...]]:
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [tuple(given)]
    return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in given]


def _echoed(task: CompletionTask, context: Context) -> str:
    return task.prompt if isinstance(task.prompt, str) else context.service.engine.tokenizer.decode(task.prompt)


async def _start_all(context: Context, tasks: Sequence[CompletionTask], record: Record) -> list[Answer]:
    """All or none."""
    answers: list[Answer] = []
    try:
        for task in tasks:
            answers.append(await start(context, task, record))
    except BaseException:
        for answer in answers:
            answer.close()
        raise
    return answers


@dataclass
class _Running:
    """The answers to all prompts of one request."""

    head: Head
    answers: list[Answer]
    choices: int  # of each prompt
    echoes: list[str]
    logprobs: bool
    context: Context

    def __post_init__(self):
        tokenizer = self.context.service.engine.tokenizer
        self._texts = [CompletionText(echo, tokenizer) for echo in self.echoes for _ in range(self.choices)]
        self._ends: list[list[End]] = [[] for _ in self.answers]

    def close(self) -> None:
        for answer in self.answers:
            answer.close()

    async def whole(self) -> bytes:
        pieces: list[list[tuple[str, dict]]] = [[] for _ in self._texts]
        finishes = [""] * len(self._texts)
        async for prompt, item in self._items():
            index = prompt * self.choices + item.choice
            if isinstance(item, End):
                finishes[index] = item.finish
            pieces[index].append(self._texts[index].take(item if isinstance(item, Delta) else None))
        choices = [completion_choice(index, "".join(text for text, _ in parts), finishes[index],
                                     joined_logprobs(lists for _, lists in parts) if self.logprobs else None)
                   for index, parts in enumerate(pieces)]
        return json.dumps(self.head.json() | {"choices": choices, "usage": usage(self._ends)}).encode()

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """Chunks; with `include_usage` a last one without choices, as in OpenAI's API (here in DeepSeek's too)."""
        head = self.head.json() | ({"usage": None} if include_usage else {})
        async for prompt, item in self._items():
            index, end = prompt * self.choices + item.choice, isinstance(item, End)
            text, lists = self._texts[index].take(None if end else item)
            choice = completion_choice(index, text, item.finish if end else None, lists if self.logprobs else None)
            yield joined_events([head | {"choices": [choice]}])
        if include_usage:
            yield sse(head | {"choices": [], "usage": usage(self._ends)})
        yield DONE

    async def _items(self) -> AsyncIterator[tuple[int, Delta | End]]:
        async for prompt, batch in _as_they_come([answer.batches() for answer in self.answers]):
            for item in batch:
                if isinstance(item, End):
                    self._ends[prompt].append(item)
                yield prompt, item


async def _as_they_come(sources: Sequence[AsyncIterator[list[Delta | End]]]) -> AsyncIterator[tuple[int, list[Delta | End]]]:
    """What any of the iterators gives, with its number."""
    coming = {asyncio.ensure_future(anext(source)): index for index, source in enumerate(sources)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index = coming.pop(future)
                with suppress(StopAsyncIteration):
                    batch = future.result()
                    coming[asyncio.ensure_future(anext(sources[index]))] = index
                    yield index, batch
    finally:
        for future in coming:
            future.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
