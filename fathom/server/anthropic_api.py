"""Anthropic's dialect: POST /v1/messages and /v1/messages/count_tokens, also below /anthropic.

Every model name is answered, by the one model there is. Errors have Anthropic's types; a server that is stopping says 503 (overloaded_error).
"""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from fathom.engine.sampler import Sampling
from fathom.errors import FathomError, InputError
from fathom.server.anthropic_answer import PING, MessageStream, message_json
from fathom.server.anthropic_prompt import chat_messages, function_tools
from fathom.server.anthropic_types import CountRequest, ErrorResponse, Message, MessageRequest, TokenCount, ToolChoice
from fathom.server.failures import failure_of, render
from fathom.server.guards import tenant
from fathom.server.metrics import Record
from fathom.server.responses import STREAM, EventStream, Whole
from fathom.server.tasks import Answer, ChatTask, Context, End, Tool, instruct, read_prompt, start

logger = logging.getLogger("fathom.server")

ROOTS = ("/v1/messages", "/anthropic/v1/messages")
EFFORTS = {"low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}
CHOICES = {"auto": "auto", "none": "none", "any": "required"}
ERRORS = {status: {"model": ErrorResponse, "description": words} for status, words in {
    400: "Unusable request", 401: "Wrong or missing key", 408: "Body too slow", 413: "Body too large", 429: "Queue full",
    500: "Failure of the server", 503: "Stopping"}.items()}


def router(context: Context) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["anthropic"])

    async def create_message(body: MessageRequest, request: Request) -> Response:
        """Answer a conversation."""
        record, message_id = request.scope["fathom.record"], f"msg_{secrets.token_hex(12)}"
        record.tenant = tenant(request.scope, body.metadata.user_id)
        answer = await start(context, message_task(body, record.tenant), record)
        if not body.stream:
            return Whole(_whole(answer, message_id, context.settings.model_name), answer.close, context.settings.keep_alive)
        events = _events(answer, record, MessageStream(message_id, context.settings.model_name))
        return EventStream(events, answer.close, _failed, context.settings.keep_alive, sse(PING))

    async def count_tokens(body: CountRequest) -> TokenCount:
        """The length of the prompt that a conversation becomes."""
        engine = context.service.engine
        prompt = await asyncio.to_thread(read_prompt, chat_task(body), engine.tokenizer, engine.max_tokens)
        return TokenCount(input_tokens=len(prompt.ids))

    for root in ROOTS:
        name = root.strip("/").replace("/", "_")
        routes.add_api_route(root, create_message, methods=["POST"], response_model=Message, responses=STREAM | ERRORS,
                             operation_id=name)
        routes.add_api_route(f"{root}/count_tokens", count_tokens, methods=["POST"], responses=ERRORS, operation_id=f"{name}_count_tokens")
    return routes


def chat_task(body: CountRequest) -> ChatTask:
    """What a request asks for, as far as the prompt goes; FathomErrors for a conversation or a choice of tools that makes no sense."""
    form = body.output_config.format
    return ChatTask(
        messages=instruct(chat_messages(body), function_tools(body.tools), form and form.json_schema),
        thinking=body.thinking.type != "disabled",
        effort=EFFORTS.get(body.output_config.effort),
        tools=tuple(Tool(tool.name, tool.input_schema, tool.strict) for tool in body.tools),
        tool_choice=_tool_choice(body),
        response_format=form and ("json_schema", form.json_schema))


def message_task(body: MessageRequest, tenant: str) -> ChatTask:
    """What a request asks for."""
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=tuple(body.stop_sequences))
    return replace(chat_task(body), sampling=sampling, max_tokens=body.max_tokens, tenant=tenant)


def sse(event: dict) -> bytes:
    """A server-sent event, named by its type."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _tool_choice(body: CountRequest) -> str:
    choice = body.tool_choice
    if choice is None:
        return "auto"
    if isinstance(choice, ToolChoice):
        if choice.name not in {tool.name for tool in body.tools}:
            raise InputError(f"tool_choice.name: {choice.name[:80]!r} is none of the tools")
        return choice.name
    if choice.type == "any" and not body.tools:
        raise InputError("tool_choice: any needs tools")
    return CHOICES[choice.type]


async def _whole(answer: Answer, message_id: str, model: str) -> bytes:
    items = [item async for item in answer]
    return message_json(message_id, model, (item.event for item in items[:-1]), items[-1]).encode()


async def _events(answer: Answer, record: Record, stream: MessageStream) -> AsyncIterator[bytes]:
    """The answer's events; the first one comes with the first of the answer, when it is known how much of the prompt was read before."""
    started = False
    async for batch in answer.batches():
        events = [] if started else [stream.start(answer.prompt_tokens, record.hit_tokens)]
        started = True
        for item in batch:
            events += stream.finish(item) if isinstance(item, End) else stream.more(item.event)
        yield b"".join(map(sse, events))


def _failed(error: Exception) -> bytes:
    """The event of an error after the answer has begun."""
    if not isinstance(error, FathomError):
        logger.error("a stream failed", exc_info=error)
    return b"event: error\ndata: " + render(failure_of(error), ROOTS[0]).body + b"\n\n"
