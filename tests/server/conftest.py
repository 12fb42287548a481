"""A real server on a port of its own, in a thread, for the clients that users have."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import uvicorn
from fastapi import FastAPI

from fathom.server.app import create_app
from fathom.server.settings import ServerSettings
from tests.server.scripted import ScriptedEngine

KEY = "test-key-0123456789"


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    engine: ScriptedEngine
    app: FastAPI


@dataclass(frozen=True)
class Reply:
    """What came back: status, headers by lower-case name, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        """The body as JSON."""
        return json.loads(self.body)


def request(server: Running, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
    """One request as it stands, by the standard library."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


def post(server: Running, path: str, body: object, **headers: str) -> Reply:
    """A JSON body."""
    return request(server, "POST", path, json.dumps(body).encode(), {"content-type": "application/json"} | headers)


def wait(condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Wait for something to become true; whether it did."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@contextmanager
def running(engine: ScriptedEngine, settings: ServerSettings = ServerSettings(), app: FastAPI | None = None) -> Iterator[Running]:
    """Serve `engine` until the block ends."""
    app = app or create_app(engine, settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, app)
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server whose engine says hello, open to everyone."""
    with running(ScriptedEngine()) as started:
        yield started


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """A function from an engine and settings to a server of the test's own."""
    stack = []

    def begin(engine: ScriptedEngine, settings: ServerSettings = ServerSettings()) -> Running:
        context = running(engine, settings)
        stack.append(context)
        return context.__enter__()

    yield begin
    for context in reversed(stack):
        context.__exit__(None, None, None)
