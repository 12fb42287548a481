"""What a client is told when something goes wrong: one exception, rendered in the dialect of the path that was asked."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fathom.errors import FathomError, QueueFull

ANTHROPIC_PATHS = ("/anthropic", "/v1/messages")
ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 503: "overloaded_error"}
OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
OPENAI_CODES = {
    404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large", 429: "rate_limit_exceeded",
    500: "internal_error", 503: "overloaded"}
FIELD = re.compile(r"([a-z_]+(?:\[\d+\]|\.[A-Za-z_]+)*)(?:: | is )")


class Draining(FathomError):
    """The server takes no new requests: it is about to stop."""


class EngineFailed(FathomError):
    """The engine met a bug and has stopped; the log has the traceback."""


class Failure(Exception):
    """An answer with this status; `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


class Rendered(NamedTuple):
    """A response: status, headers and JSON body."""

    status: int
    headers: dict[str, str]
    body: bytes


def failure_of(error: Exception, retry_after: int = 1) -> Failure:
    """What a client is told of this error; nothing of its insides unless it is the client's own fault."""
    match error:
        case Failure():
            return error
        case QueueFull():
            return Failure(429, f"Rate limit reached: {error}", headers={"retry-after": str(retry_after)})
        case Draining():
            return Failure(503, str(error), headers={"retry-after": str(retry_after)})
        case HTTPException():
            known = {404: "No such path.", 405: "This path does not take that method."}
            return Failure(error.status_code, known.get(error.status_code, str(error.detail)), headers=dict(error.headers or {}))
        case RequestValidationError():
            return _invalid(error)
        case EngineFailed():
            return Failure(500, "The engine has failed; its operator has to restart it.")
        case FathomError():
            found = FIELD.match(str(error))
            return Failure(400, str(error), found and found[1], "invalid_request_error")
    return Failure(500, "Internal error; the server's log has more.")


def _invalid(error: RequestValidationError) -> Failure:
    """A body that is not of the route's type: the first field at fault, by its name in the body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Failure(400, "The body is no JSON.")
    field = _field(first["loc"][1:], error.body)
    words = first["msg"].removeprefix("Value error, ").splitlines()[0][:500]
    return Failure(400, f"{field or 'body'}: {words}", field or None)


def _field(location: Sequence[int | str], body: object) -> str:
    """A place in a body, such as messages[2].content; names of types, which locations of unions hold too, are left out."""
    name = ""
    for index, part in enumerate(location):
        if isinstance(part, int):
            name += f"[{part}]"
            body = body[part] if isinstance(body, list) and part < len(body) else None
        elif isinstance(body, dict) and (part in body or index + 1 == len(location)):
            name += f".{part}" if name else part
            body = body.get(part)
    return name[:200]


def render(failure: Failure, path: str) -> Rendered:
    """The response in Anthropic's shape under its paths, in OpenAI's everywhere else."""
    if is_anthropic(path):
        kind = ANTHROPIC_TYPES.get(failure.status, "api_error")
        content = {"type": "error", "error": {"type": kind, "message": failure.message}}
    else:
        content = {"error": {
            "message": failure.message, "type": OPENAI_TYPES.get(failure.status, "invalid_request_error"), "param": failure.param,
            "code": failure.code or OPENAI_CODES.get(failure.status, "invalid_request_error")}}
    return Rendered(failure.status, {"content-type": "application/json", **failure.headers}, json.dumps(content).encode())


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to the Anthropic dialect."""
    return any(path == start or path.startswith(start + "/") for start in ANTHROPIC_PATHS)
