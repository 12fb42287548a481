"""The engine's own thread, and the way there and back: requests go in through a queue, outputs come out in one call a step.

Everything else of the server runs on one event loop. Only the engine's thread touches the engine.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

from fathom.config import ModelConfig
from fathom.engine.constraint import Grammars
from fathom.engine.request import Output, Request, Stats
from fathom.engine.settings import EngineSettings
from fathom.errors import FathomError, QueueFull
from fathom.server.failures import Draining, EngineFailed
from fathom.text.tokenizer import Tokenizer

LOOK_SECONDS = 1.0  # between looks at an idle engine, which may have died

logger = logging.getLogger("fathom.server")


class Generates(Protocol):
    """The face of an engine, as far as a server needs it."""

    tokenizer: Tokenizer
    config: ModelConfig
    settings: EngineSettings
    max_tokens: int
    grammars: Grammars

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, request: Request) -> int:
        """Queue a request and return its id."""

    def step(self) -> list[Output]:
        """Advance all requests."""

    def cancel(self, request_id: int) -> None:
        """Forget a request and free its memory."""

    def stats(self) -> Stats:
        """Counters and gauges."""

    def close(self) -> None:
        """Free everything."""


class Stream:
    """The outputs of one request: an asynchronous iterator of all that has come since the last look; `close` cancels what is left."""

    def __init__(self, service: "Service", request: Request):
        self.request, self.id = request, -1
        self._service, self._left = service, request.choices
        self._outputs: list[Output] = []
        self._error: Exception | None = None
        self._news: asyncio.Future | None = None

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> list[Output]:
        if not self._outputs:
            if self._error is not None:
                raise self._error
            if not self._left:
                raise StopAsyncIteration
            self._news = asyncio.get_running_loop().create_future()
            await self._news
            if not self._outputs:
                raise self._error or StopAsyncIteration
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Cancel the request if it still runs; its memory is free before the engine's next step."""
        self._service.forget(self)
        self._left = 0
        self._wake()

    def push(self, output: Output) -> bool:
        """Take an output; True when it was the request's last."""
        self._outputs.append(output)
        self._left -= output.finish is not None
        self._wake()
        return not self._left

    def fail(self, error: Exception) -> None:
        """End with this error, after the outputs that came before."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class Service:
    """An engine that many requests of one event loop share."""

    def __init__(self, engine: Generates):
        self.engine, self.stats = engine, Stats()
        self.draining, self.failed = False, False
        self._streams: dict[int, Stream] = {}
        self._coming = 0  # requests that are prepared, or on their way to the engine
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._thread is not None and not self.draining and not self.failed

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that is served."""
        return self._loop

    @property
    def open(self) -> int:
        """Requests that are not finished."""
        return len(self._streams) + self._coming

    def start(self) -> None:
        """Begin to serve the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.stats = self.engine.stats()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Cancel what runs, and close the engine once its step is over."""
        self.draining = True
        for stream in list(self._streams.values()):
            stream.fail(Draining("The server is stopping."))
            self.forget(stream)
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for a request that is about to be made; Draining, EngineFailed or QueueFull when there is none."""
        if self.failed:
            raise EngineFailed("The engine has failed.")
        if not self.ready:
            raise Draining("The server takes no new requests now; try again later.")
        if self.stats.waiting + self._coming >= self.engine.settings.waiting:
            raise QueueFull("too many requests are waiting; try again later")
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def submit(self, request: Request) -> Stream:
        """The stream of a request that the engine has taken (call it in a `place`); raises what `Engine.add` raises."""
        stream, accepted = Stream(self, request), asyncio.get_running_loop().create_future()
        self._inbox.put(partial(self._add, stream, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self._inbox.put(partial(self._cancel, stream))
            raise
        if self.failed:
            raise EngineFailed("The engine has failed.")
        return stream

    def forget(self, stream: Stream) -> None:
        """Cancel a stream's request, unless it is over."""
        if self._streams.pop(stream.id, None) is not None:
            self._inbox.put(partial(self._cancel, stream))

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    async def drained(self, timeout: float) -> bool:
        """Wait until no request is open, or `timeout` seconds; whether none is."""
        end = asyncio.get_running_loop().time() + timeout
        while self.open and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        return not self.open

    # ---- on the engine's thread

    def _work(self) -> None:
        try:
            while self._read_inbox():
                if self.engine.has_work:
                    outputs = self.engine.step()
                    self._tell(self._deliver, outputs, self.engine.stats())
        except Exception:
            logger.exception("the engine failed")
            self._tell(self._give_up)
        finally:
            self.engine.close()

    def _read_inbox(self) -> bool:
        """Do what was asked for, waiting a little if there is nothing to do; False when asked to stop."""
        wait = not self.engine.has_work
        try:
            while (command := self._inbox.get(wait, LOOK_SECONDS)) is not None:
                command()
                wait = wait and not self.engine.has_work
            return False
        except Empty:
            return True

    def _add(self, stream: Stream, accepted: asyncio.Future) -> None:
        try:
            stream.id, error = self.engine.add(stream.request), None
        except FathomError as refused:
            error = refused
        except Exception as bug:
            logger.exception("the engine could not take a request")
            error = bug
        self._tell(self._accept, stream, accepted, error, self.engine.stats())

    def _cancel(self, stream: Stream) -> None:
        self.engine.cancel(stream.id)
        if not self.engine.has_work:
            self._tell(self._deliver, [], self.engine.stats())

    def _tell(self, callback: Callable, *values: object) -> None:
        self._loop.call_soon_threadsafe(callback, *values)

    # ---- on the event loop, called from the engine's thread

    def _accept(self, stream: Stream, accepted: asyncio.Future, error: Exception | None, stats: Stats) -> None:
        self.stats = stats
        if accepted.cancelled():
            return
        if error is not None:
            accepted.set_exception(error)
        else:
            self._streams[stream.id] = stream
            accepted.set_result(None)

    def _deliver(self, outputs: list[Output], stats: Stats) -> None:
        self.stats = stats
        for output in outputs:
            stream = self._streams.get(output.request)
            if stream is not None and stream.push(output):
                del self._streams[output.request]

    def _give_up(self) -> None:
        self.failed = True
        for stream in self._streams.values():
            stream.fail(EngineFailed("The engine has failed."))
        self._streams.clear()
