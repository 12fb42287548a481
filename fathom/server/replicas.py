"""One server, several processes that compute: the application as Ray Serve deployments behind a front that routes by prefix.

The front is the only ingress. It hands each request, as it came, to one replica's whole application (guards, dialects, engine) and passes on
what that sends. A replica that dies is restarted by Ray; a request that it had not begun to answer goes to another one.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from rich.console import Console
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fathom.cluster import join_cluster
from fathom.engine.engine import Engine
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError
from fathom.server.app import ServerSettings, create_app
from fathom.server.failures import ANTHROPIC_PATHS, Draining, Failure, failure_of, render
from fathom.server.routing import PrefixRouter, prefix_keys

MOST_REPLICAS = 64
BEAT, PATIENCE = 1.0, 10.0  # seconds between looks at a replica; without an answer for so long it is taken for dead
Message = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What every replica serves, and how."""

    path: Path
    dtype: torch.dtype
    device: str
    packed: bool
    engine: EngineSettings
    server: ServerSettings


class Replica:
    """The application around an engine of its own, in a process of its own."""

    async def __init__(self, plan: Plan):
        engine = await asyncio.to_thread(Engine.load, plan.path, plan.dtype, plan.device, plan.packed, plan.engine)
        self._app = create_app(engine, plan.server)
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def answer(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """The messages that the application sends for a request. Closing the iterator is the client going away."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return unread.pop() if unread else await asyncio.Event().wait()

        async def work() -> None:
            try:
                await self._app(scope | {"app": self._app, "state": {}}, receive, sent.put)
            finally:
                sent.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def ping(self) -> int:
        """The process's number."""
        return os.getpid()

    async def check_health(self) -> None:
        """Ray restarts the replica when this raises."""
        if self._app.state.context.service.failed:
            raise RuntimeError("the engine has failed")

    async def __del__(self):
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)


@dataclass
class Place:
    """A replica as the front sees it."""

    handle: Any
    open: int = 0
    process: int | None = None
    down: asyncio.Event = field(default_factory=asyncio.Event)


class Lost(Exception):
    """The replica went away before it began to answer."""


class Front:
    """Reads a request, chooses a replica, passes its answer on."""

    def __init__(self, replicas: list[Any], settings: ServerSettings):
        self._settings, self._router = settings, PrefixRouter()
        self._places = [Place(handle) for handle in replicas]
        self._watching: list[asyncio.Task] = []
        self._draining = False

    async def __call__(self, request: Request) -> Response:
        """Any request but `GET /replicas`, which says how the replicas are. `/metrics?replica=1` asks that replica."""
        self._watching = self._watching or [asyncio.create_task(self._watch(place)) for place in self._places]
        if request.url.path == "/replicas":
            return JSONResponse([{"replica": number, "up": not place.down.is_set(), "open": place.open, "process": place.process}
                                 for number, place in enumerate(self._places)])
        try:
            if self._draining and request.method == "POST":
                raise failure_of(Draining("The server takes no new requests now; try again later."))
            body = await self._read(request)
            return await self._pass_on(request, body)
        except Failure as failure:
            status, headers, text = render(failure, request.url.path)
            return Response(text, status, headers)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; return when none is open any more, or after `seconds`."""
        self._draining, end = True, time.monotonic() + seconds
        while any(place.open for place in self._places) and time.monotonic() < end:
            await asyncio.sleep(0.1)

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > self._settings.body_bytes:
                    raise Failure(413, f"The request's body is larger than {self._settings.body_bytes} bytes.", headers={"connection": "close"})
        except ClientDisconnect:
            raise Failure(400, "The request's body did not come whole.") from None
        return bytes(body)

    async def _pass_on(self, request: Request, body: bytes) -> Response:
        """Ask one replica after the other until one begins to answer; Failure 503 when there is none left to ask."""
        scope = {name: request.scope[name] for name in ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")}
        scope |= {"root_path": "", "client": None, "server": None}
        keys = prefix_keys(body, request.headers.get("authorization", ""))
        named = request.query_params.get("replica") if request.url.path == "/metrics" else None
        tried = set() if named is None else {number for number in range(len(self._places)) if str(number) != named}
        while True:
            counts = [None if place.down.is_set() or number in tried else place.open for number, place in enumerate(self._places)]
            number = self._router.choose(keys, counts)
            if number is None:
                raise Failure(503, "No replica is up now; try again later.", headers={"retry-after": str(self._settings.retry_after)})
            tried.add(number)
            with suppress(Lost):
                return await self._ask(number, scope, body)

    async def _ask(self, number: int, scope: Message, body: bytes) -> Response:
        place = self._places[number]
        messages = place.handle.options(stream=True).answer.remote(scope, body)
        place.open += 1
        try:
            start = await _unless_down(place, anext(messages))
        except BaseException:
            place.open -= 1
            messages.cancel()
            raise

        events = dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")

        async def rest() -> AsyncIterator[bytes]:
            try:
                async for message in messages:
                    yield message.get("body", b"")
            except RayError:
                if not events:
                    raise  # the connection breaks, so that nobody takes half an answer for a whole one
                failure = render(Failure(503, "The replica was lost in the middle of the answer; ask again."), scope["path"])
                yield (b"event: error\n" if scope["path"].startswith(ANTHROPIC_PATHS) else b"") + b"data: " + failure.body + b"\n\n"
            finally:
                place.open -= 1
                messages.cancel()

        response = StreamingResponse(rest(), start["status"])
        response.raw_headers = [*start["headers"], (b"x-fathom-replica", str(number).encode())]
        return response

    async def _watch(self, place: Place) -> None:
        """Ask the replica for a sign of life again and again; without one it is down, until it gives one again."""
        while True:
            ping = asyncio.ensure_future(_awaited(place.handle.ping.remote()))
            if not (await asyncio.wait({ping}, timeout=PATIENCE))[0]:
                place.down.set()
            try:
                place.process = await ping
                place.down.clear()
            except RayError:
                place.down.set()
            await asyncio.sleep(BEAT)


async def _unless_down(place: Place, first: Awaitable[Message]) -> Message:
    """The first message; Lost when the replica dies or goes down before it comes."""
    answering, falling = asyncio.ensure_future(_awaited(first)), asyncio.ensure_future(place.down.wait())
    answering.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be waiting for it any more
    try:
        await asyncio.wait({answering, falling}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Lost
        return answering.result()
    except (RayError, StopAsyncIteration) as error:
        place.down.set()
        raise Lost from error
    finally:
        answering.cancel()
        falling.cancel()


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def launch_replicas(count: int, plan: Plan, host: str, port: int, console: Console) -> None:
    """Serve with `count` replicas until a signal comes, on the Ray cluster that RAY_ADDRESS names, else on this machine.

    The first signal lets running requests finish, a second does not. InputError for a count that is out of range.
    """
    if not 2 <= count <= MOST_REPLICAS:
        raise InputError(f"replicas is {count}; allowed: 2 to {MOST_REPLICAS} (without --replicas one process serves)")
    share = join_cluster(count)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would drop what runs
    try:
        serve.start(http_options={"host": host, "port": port, "num_cpus": 0})
        front = serve.run(application(count, plan, share), name="fathom", route_prefix="/")
        console.print(f"serving {plan.server.model_name} at http://{host}:{port} with {count} replicas  (Ctrl-C stops)", soft_wrap=True,
                      highlight=False, markup=False)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
        front.drain.remote(plan.server.drain_seconds).result()
    except KeyboardInterrupt:
        pass  # asked twice
    finally:
        serve.shutdown()
        ray.shutdown()


def application(count: int, plan: Plan, cores: float) -> Any:
    """The Ray Serve application: a front, and `count` replicas of `cores` each, and of one GPU each where they compute on them."""
    deployment = serve.deployment(Replica).options(
        num_replicas=1, max_ongoing_requests=4096, graceful_shutdown_timeout_s=plan.server.drain_seconds, health_check_period_s=5,
        ray_actor_options={"num_cpus": cores, "num_gpus": int(plan.device != "cpu")})
    replicas = [deployment.options(name=f"replica-{number}").bind(plan) for number in range(count)]
    front = serve.deployment(Front).options(num_replicas=1, max_ongoing_requests=1 << 14, graceful_shutdown_timeout_s=plan.server.drain_seconds,
                                            ray_actor_options={"num_cpus": 0})
    return front.bind(replicas, plan.server)
