"""The chat API as documented, answering by script: what the page is tested against. It waits where a script says so, and knows who went away."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

WAIT, BREAK = "wait", "break"
Step = dict | str  # a delta, a whole choice (with "finish_reason"), an error, or WAIT or BREAK
USAGE = {"prompt_tokens": 1300, "completion_tokens": 42, "total_tokens": 1342, "prompt_cache_hit_tokens": 1280, "prompt_cache_miss_tokens": 20,
         "completion_tokens_details": {"reasoning_tokens": 7}}
METRICS = """# HELP fathom:state_bytes Bytes of window states in memory.
# TYPE fathom:state_bytes gauge
fathom:state_bytes{model_name="small"} 1572864.0
fathom:kv_disk_bytes{model_name="small"} 5.0e+09
fathom:kv_cache_usage_perc{model_name="small"} 0.25
"""


def pieces(name: str, text: str, size: int = 3) -> list[Step]:
    """Deltas of `name` that together say `text`."""
    return [{name: text[at:at + size]} for at in range(0, len(text), size)]


def done(reason: str = "stop", usage: dict = USAGE) -> Step:
    """The last chunk."""
    return {"delta": {"content": ""}, "finish_reason": reason, "usage": usage}


def called(*calls: tuple[str, str]) -> list[Step]:
    """Tool calls (name, arguments), the arguments in pieces."""
    steps: list[Step] = []
    for index, (name, text) in enumerate(calls):
        steps.append({"tool_calls": [{"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}]})
        steps += [{"tool_calls": [{"index": index, "function": piece}]} for piece in pieces("arguments", text, 5)]
    return steps


def hello(_: dict) -> list[Step]:
    """A short answer after a short thought."""
    return [*pieces("reasoning_content", "A greeting."), *pieces("content", "Hello, **world**."), done()]


class FakeApi:
    """`script(body)` gives the steps of an answer, or a (status, error) to refuse with. `bodies` and `keys` are what came in."""

    def __init__(self, script: Callable[[dict], Any] = hello):
        self.script, self.bodies, self.keys, self.models = script, [], [], [{"id": "small", "object": "model", "max_model_len": 4096}]
        self.gate, self.left = threading.Event(), threading.Event()  # WAIT ends; a client went away before the end

    @property
    def app(self) -> Starlette:
        """The page and the routes that it calls."""
        return Starlette(routes=[
            Route("/v1/models", self._list), Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/metrics", lambda _: PlainTextResponse(METRICS)), Mount("/", StaticFiles(directory=Path(str(files("fathom.server") / "web")), html=True))])

    async def _list(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        steps = self.script(body)
        if isinstance(steps, tuple):
            status, error = steps
            return JSONResponse({"error": {"message": error, "type": "error", "param": None, "code": None}}, status)
        return StreamingResponse(self._write(steps), media_type="text/event-stream")

    async def _write(self, steps: list[Step]) -> AsyncIterator[bytes]:
        frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "small", "system_fingerprint": "fp"}
        finished = False
        try:
            yield b": keep-alive\n\n"
            for step in [{"role": "assistant", "content": ""}, *steps]:
                if step == WAIT:
                    while not self.gate.is_set():
                        await asyncio.sleep(0.01)
                        yield b": keep-alive\n\n"
                elif step == BREAK:
                    finished = True
                    return
                elif "error" in step:
                    yield b"data: " + json.dumps(step).encode() + b"\n\n"
                else:
                    choice = step if "finish_reason" in step else {"delta": step, "finish_reason": None}
                    chunk = frame | {"choices": [{"index": 0, "delta": choice["delta"], "finish_reason": choice["finish_reason"], "logprobs": None}],
                                     "usage": choice.get("usage")}
                    yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
            finished = True
        finally:
            if not finished:
                self.left.set()
