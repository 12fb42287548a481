"""What stands before every route: keys, odd paths, bodies that are too large, too slow or no JSON; and what every response carries.

Nothing is open unless it is on the list of public paths. One log line a request, without texts, keys or names of users.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from itertools import accumulate
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.server.failures import Failure, failure_of, render
from fathom.server.metrics import Metrics, Record
from fathom.server.settings import ServerSettings

logger = logging.getLogger("fathom.server")

DEEPEST_JSON = 64
SLOWEST_BODY = 1024  # bytes a second, on average
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
PLAIN_PATH = re.compile(r"/|(?:/(?!\.{1,2}(?:/|$))[^/\\%\x00-\x1f\x7f]+)+")
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
NOT_BRACKETS = bytes(set(range(256)) - STEP.keys())
HEADERS = (
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                                 b"font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"))


class Guards:
    """Middleware before the whole application; `public` are the paths that anyone may read."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, public: frozenset[str]):
        self._app, self._settings, self._metrics, self._public = app, settings, metrics, public
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guard(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 499  # the client went away before there was an answer
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12).encode()
        scope["fathom.record"] = record = Record(request_id.decode())

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *HEADERS]
            await send(message)

        try:
            scope["fathom.caller"] = self._caller(scope)
            _check_path(scope)
            await self._app(scope, await self._read_body(scope, receive), send_on)
        except Failure as failure:
            await _refuse(failure, scope, send_on)
        except Exception as bug:
            logger.exception("request %s failed", request_id.decode())
            if status != 499:
                raise
            await _refuse(failure_of(bug), scope, send_on)
        finally:
            self._note(scope, status, request_id, time.monotonic() - began, record)

    def _note(self, scope: Scope, status: int, request_id: bytes, seconds: float, record: Record) -> None:
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.http(route, method, status)
        logger.info(json.dumps({
            "id": request_id.decode(), "method": method, "route": route, "status": status, "ms": round(seconds * 1000, 1),
            "prompt_tokens": record.prompt_tokens, "hit_tokens": record.hit_tokens, "output_tokens": record.output_tokens,
            "tenant": hashlib.sha256(record.tenant.encode()).hexdigest()[:8] if record.tenant else ""}))

    def _caller(self, scope: Scope) -> str:
        """The digest of the caller's key, or nothing where none is needed; 401 for a missing or wrong one."""
        if not self._digests:
            return ""
        if scope["raw_path"].decode("latin-1") in self._public and scope["method"] in ("GET", "HEAD"):
            return ""
        headers = dict(reversed(scope["headers"]))
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(key).digest()
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):  # a list: all are compared
            raise Failure(401, _wrong_key(key), code="invalid_request_error", headers={"www-authenticate": "Bearer"})
        return digest.hex()

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that has the whole body; Failure for one that is too large or too slow, or no JSON."""
        limit, length = self._settings.body_bytes, dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise _too_large(limit)
        began, chunks, size, more = time.monotonic(), [], 0, True
        while more:
            left = began + self._settings.body_timeout + size / SLOWEST_BODY - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), min(left, self._settings.body_timeout))
            except TimeoutError:
                raise Failure(408, "The request's body did not come in time.", headers={"connection": "close"}) from None
            if message["type"] == "http.disconnect":
                return _replay(message, receive)
            chunks.append(message.get("body", b""))
            size, more = size + len(chunks[-1]), message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
        body = b"".join(chunks)
        if body:
            check_json(body, self._settings.json_items)
        return _replay({"type": "http.request", "body": body, "more_body": False}, receive)


def tenant(scope: Scope, user: str | None) -> str:
    """Whose prefix cache a request uses: that of the caller's key, and of the user whom the caller names."""
    return f"{scope['fathom.caller']}/{user or ''}"


def check_json(body: bytes, most_items: int) -> None:
    """Failure 400 for what a JSON reader should not even try: no UTF-8, half surrogates, too deep, too many values, NaN."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Failure(400, f"The body is not UTF-8 at byte {error.start}.") from None
    outside = STRING.sub(b'""', body)
    brackets = outside.translate(None, NOT_BRACKETS)
    if outside.count(b",") + len(brackets) > most_items:
        raise Failure(400, f"The body has more than {most_items} values.")
    if max(accumulate(map(STEP.__getitem__, brackets)), default=0) > DEEPEST_JSON:
        raise Failure(400, f"The body's JSON is nested more than {DEEPEST_JSON} deep.")
    if b"NaN" in outside or b"Infinity" in outside:
        raise Failure(400, "NaN and Infinity are no JSON.")
    if SURROGATE.search(body):
        try:
            json.dumps(json.loads(body), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Failure(400, "A text holds half of a surrogate pair.") from None
        except ValueError:
            raise Failure(400, "The body is no JSON.") from None


def _check_path(scope: Scope) -> None:
    """404 for a path that two readers could take for two different ones."""
    path, raw = scope["path"], unquote_to_bytes(scope["raw_path"].partition(b"?")[0])
    if not PLAIN_PATH.fullmatch(path) or raw != path.encode("utf-8", "surrogateescape"):
        raise Failure(404, "No such path.")


def _wrong_key(key: bytes) -> str:
    if not key:
        return "Authentication Fails: no API key was given; send it as Authorization: Bearer KEY"
    shown = key[-4:].decode("latin-1") if len(key) >= 8 else ""
    return f"Authentication Fails, Your api key: ****{shown if shown.isascii() and shown.isprintable() else ''} is invalid"


def _too_large(limit: int) -> Failure:
    return Failure(413, f"The request's body is larger than {limit} bytes.", headers={"connection": "close"})


def _replay(first: Message, receive: Receive) -> Receive:
    waiting = [first]

    async def read() -> Message:
        return waiting.pop() if waiting else await receive()

    return read


async def _refuse(failure: Failure, scope: Scope, send: Send) -> None:
    status, headers, body = render(failure, scope["path"])
    lines = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": [*lines, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
