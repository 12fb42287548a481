"""An application called without a network: its own event loop in the test, requests exactly as they are meant."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from urllib.parse import unquote_to_bytes

from fastapi import FastAPI

from tests.server.conftest import Reply


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[Callable[..., Awaitable[Reply]]]:
    """The application, started; gives a function that calls it."""
    async with app.router.lifespan_context(app):
        yield lambda *request, **options: call(app, *request, **options)


async def call(app: FastAPI, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | Iterable[bytes] = b"",
               leave_after: int | None = None, pause: float = 0.0) -> Reply:
    """One request, with a `pause` in seconds before each piece of the body. `leave_after`: the client disconnects once it has got so many pieces of the body (0: at once); status 0 if there was none."""
    raw, _, query = path.partition("?")
    lines = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
    pieces = [body] if isinstance(body, bytes) else list(body)
    names = {name for name, _ in lines}
    if "content-length" not in {name.decode() for name in names} and isinstance(body, bytes):
        lines.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "headers": lines,
             "path": unquote_to_bytes(raw).decode("utf-8", "surrogateescape"), "raw_path": raw.encode("latin-1"), "query_string": query.encode(), "root_path": "",
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    gone, received = asyncio.Event(), []
    if leave_after == 0:
        gone.set()

    async def receive() -> dict:
        if pieces:
            piece = pieces.pop(0)
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        await gone.wait()
        return {"type": "http.disconnect"}

    status, head, content = 0, {}, []

    async def send(message: dict) -> None:
        nonlocal status, head
        if message["type"] == "http.response.start":
            status, head = message["status"], {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
        elif message.get("body"):
            content.append(message["body"])
            received.append(1)
            if leave_after is not None and len(received) >= leave_after:
                gone.set()

    await app(scope, receive, send)
    return Reply(status, head, b"".join(content))


def chat(**wishes: object) -> bytes:
    """A chat's body."""
    return json.dumps({"model": "fathom", "messages": [{"role": "user", "content": "the quick"}]} | wishes).encode()


async def until(condition: Callable[[], bool], tries: int = 20_000) -> bool:
    """Wait for the engine's thread; whether it came to that."""
    for _ in range(tries):
        if condition():
            return True
        await asyncio.sleep(0.005)
    return False
