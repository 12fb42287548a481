"""Answers of two kinds, as a stream of events or as one body; both end their work at once when the client goes away."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING = b": keep-alive\n\n"

# What the OpenAPI document says of a stream: the schema of one event, whose data is JSON (or [DONE], in OpenAI's dialect).
STREAM = {200: {"description": "The answer; pieces of it as server-sent events with `stream`", "content": {"text/event-stream": {
    "schema": {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}, "required": ["data"]}}}}}


class EventStream(Response):
    """Server-sent events: what `events` yields is sent as it comes, and `ping` first and whenever nothing came for `keep_alive` seconds.

    `close` is called at the end in any case. `failed(error)` is the last event when `events` raises.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], failed: Callable[[Exception], bytes],
                 keep_alive: float = 10.0, ping: bytes = PING):
        self.events, self.close, self.failed, self.keep_alive, self.ping = events, close, failed, keep_alive, ping
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pulse() -> None:
            if not self._sent:
                await send({"type": "http.response.body", "body": self.ping, "more_body": True})
            self._sent = False

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(self._write(send), receive, self.keep_alive, pulse)
        finally:
            self.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self.ping, "more_body": True})
        try:
            async for event in self.events:
                self._sent = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": self.failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Whole(Response):
    """One JSON body. While it is made, empty lines are sent every `keep_alive` seconds. `close` is called at the end in any case."""

    media_type = "application/json"

    def __init__(self, body: Awaitable[bytes], close: Callable[[], None], keep_alive: float = 10.0):
        self.made, self.close, self.keep_alive = body, close, keep_alive
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store"})
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def begin() -> None:
            if not self._started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._started = True

        async def pulse() -> None:
            await begin()
            await send({"type": "http.response.body", "body": b"\n", "more_body": True})

        async def write() -> None:
            body = await self.made
            await begin()
            await send({"type": "http.response.body", "body": body})

        try:
            await while_connected(write(), receive, self.keep_alive, pulse)
        finally:
            self.close()


async def while_connected(work: Awaitable[None], receive: Receive, interval: float, pulse: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, calling `pulse` every `interval` seconds; it is cancelled when the client disconnects."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        while not working.done() and not gone.done():
            done, _ = await asyncio.wait((working, gone), timeout=interval, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                await pulse()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
