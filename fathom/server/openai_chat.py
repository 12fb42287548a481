"""OpenAI's and DeepSeek's dialect: POST /chat/completions."""

import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from fathom.engine.sampler import Sampling
from fathom.errors import FathomError, InputError
from fathom.server.failures import Failure, failure_of, render
from fathom.server.guards import tenant
from fathom.server.openai_answer import DONE, ChatStream, Head, chat_json, sse
from fathom.server.openai_objects import ChatCompletion, ErrorResponse
from fathom.server.openai_prompt import chat_messages, check_reasoning, function_tools, tool_choice
from fathom.server.openai_types import ChatRequest, ObjectFormat, RegexFormat, SchemaFormat, Wishes
from fathom.server.responses import STREAM, EventStream, Whole
from fathom.server.settings import ServerSettings
from fathom.server.tasks import Answer, ChatTask, Context, End, ResponseFormat, Tool, instruct, start

logger = logging.getLogger("fathom.server")

EFFORTS = {"minimal": "high", "low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}
ERRORS = {status: {"model": ErrorResponse, "description": words} for status, words in {
    400: "Unusable request; param names the field", 401: "Wrong or missing key", 404: "No such model", 408: "Body too slow",
    413: "Body too large", 429: "Queue full", 500: "Failure of the server", 503: "Stopping"}.items()}


def router(context: Context, fingerprint: str) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["openai"])

    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        settings, record = context.settings, request.scope["fathom.record"]
        check_wishes(body, settings)
        record.tenant = tenant(request.scope, body.user_id or body.user)
        task = chat_task(body, record.tenant, settings)
        head = Head(request_id("chatcmpl", request), int(time.time()), settings.model_name, fingerprint, "chat.completion")
        answer, tokenizer = await start(context, task, record), context.service.engine.tokenizer
        logprobs = task.sampling.logprobs is not None
        if not body.stream:
            async def whole() -> bytes:
                return chat_json(head, [item async for item in answer], task.choices, task.thinking, logprobs, tokenizer)
            return Whole(whole(), answer.close, settings.keep_alive)
        include = bool(body.stream_options and body.stream_options.include_usage)
        stream = ChatStream(head, task.choices, logprobs, include, settings.separate_usage, tokenizer)
        return EventStream(_events(answer, stream), answer.close, failed_event, settings.keep_alive)

    for root in ("/v1", "", "/beta", "/beta/v1"):
        routes.add_api_route(f"{root}/chat/completions", create_chat_completion, methods=["POST"], response_model=ChatCompletion,
                             responses=STREAM | ERRORS, operation_id="create_chat_completion", include_in_schema=root == "/v1")
    return routes


def chat_task(body: ChatRequest, tenant: str, settings: ServerSettings) -> ChatTask:
    """What a request asks for; FathomErrors and Failures name the field that makes no sense."""
    thinking = body.reasoning_effort != "none" if body.thinking is None else body.thinking.type == "enabled"
    tools = body.tools or []
    if settings.require_reasoning and thinking and tools:
        check_reasoning(body.messages)
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs: it needs logprobs: true")
    messages, thoughts = chat_messages(body, thinking)
    form = response_format(body)
    schema = form[1] if form and form[0] == "json_schema" else None
    return ChatTask(
        messages=instruct(messages, function_tools(tools), schema), thinking=thinking, thoughts=thoughts,
        effort=EFFORTS.get(body.reasoning_effort),
        tools=tuple(Tool(tool.function.name, tool.function.parameters or {}, bool(tool.function.strict)) for tool in tools),
        tool_choice=tool_choice(body), response_format=form,
        sampling=replace(sampling(body), logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        max_tokens=body.max_completion_tokens or body.max_tokens, choices=body.n or 1, tenant=tenant)


def response_format(body: ChatRequest) -> ResponseFormat | None:
    """What the answer's text must look like; a schema that was left out is that of any object."""
    match body.response_format:
        case ObjectFormat():
            return ("json_object",)
        case SchemaFormat(json_schema=given):
            return ("json_object",) if given.json_schema is None else ("json_schema", given.json_schema)
        case RegexFormat(pattern=pattern):
            return ("regex", pattern)
    return None


# ---- what chats and completions share


def check_wishes(body: Wishes, settings: ServerSettings) -> None:
    """Failure for a model that is not served, or for more choices than are allowed."""
    if not settings.any_model:
        check_model(body.model, settings)
    if body.n is not None and body.n > settings.max_choices:
        raise InputError(f"n is {body.n}; allowed: 1 to {settings.max_choices}")


def check_model(name: str, settings: ServerSettings) -> None:
    """Failure 404 for a model that is not served."""
    if name != settings.model_name:
        raise Failure(404, f"The model {name[:80]!r} does not exist; this server has {settings.model_name!r}.", "model", "model_not_found")


def sampling(body: Wishes) -> Sampling:
    """How to choose tokens and when to stop, where it was said; a token's id outside the vocabulary is found by the engine."""
    names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed", "ignore_eos")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    return Sampling(
        **given, stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()), stop_ids=tuple(body.stop_token_ids or ()),
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()})


def request_id(kind: str, request: Request) -> str:
    """An id for an answer that leads to the request's line in the log."""
    return f"{kind}-{request.scope['fathom.record'].request_id}"


def failed_event(error: Exception) -> bytes:
    """The event of an error after the answer has begun."""
    if not isinstance(error, FathomError):
        logger.error("a stream failed", exc_info=error)
    return b"data: " + render(failure_of(error), "").body + b"\n\n"


def joined_events(chunks: Iterable[dict]) -> bytes:
    """Chunks as events."""
    return b"".join(map(sse, chunks))


async def _events(answer: Answer, stream: ChatStream) -> AsyncIterator[bytes]:
    async for batch in answer.batches():
        yield joined_events(chunk for item in batch for chunk in (stream.finish(item) if isinstance(item, End) else stream.more(item)))
    yield DONE
