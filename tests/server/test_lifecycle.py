"""Coming and going: clients that leave, queues that are full, a server that is told to stop, an engine that fails.

FATHOM_ABORTS=10000 makes so many connections that are aborted; some hundred otherwise.
"""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fathom.checkpoint.released import save_model
from fathom.engine.engine import Engine
from fathom.engine.remote import Plan, RemoteEngine
from fathom.engine.settings import EngineSettings
from fathom.server.app import create_app
from fathom.server.settings import ServerSettings
from tests.server.asgi import chat, started, until
from tests.server.conftest import Running, post, request, wait
from tests.server.hostile import JSON
from tests.server.scripted import ScriptedEngine
from tests.server.tiny import tiny_engine

ABORTS = int(os.environ.get("FATHOM_ABORTS", "300"))
CHAT = "/v1/chat/completions"
ENDLESS = {"max_tokens": 3000, "ignore_eos": True, "thinking": {"type": "disabled"}}


def idle(service):
    return not service.open and not service.engine.has_work


# ---- clients that leave


def test_many_clients_that_leave_leave_nothing_behind():
    """Before the answer, in the middle of it, with several choices, while they wait or their prompts are read; over the same few blocks."""
    engine, draw = tiny_engine(EngineSettings(running=4, waiting=64, prefill_chunk=64), Engine), random.Random(1)

    async def leave(call, count):
        for _ in range(count):
            wishes = ENDLESS | {"stream": draw.random() < 0.7, "n": draw.choice([1, 1, 1, 3])}
            words = "the quick brown fox " * draw.choice([1, 1, 10, 100])
            body = chat(**wishes | {"messages": [{"role": "user", "content": words}]})
            leaving = asyncio.ensure_future(call("POST", CHAT, JSON, body, leave_after=draw.choice([0, 0, 1, 2, 3]) if wishes["stream"] else 0))
            await asyncio.wait([leaving], timeout=draw.choice([None, 0.001]))
            if not leaving.done() and draw.random() < 0.3:
                leaving.cancel()  # as a server does that is shut down hard
            await asyncio.gather(leaving, return_exceptions=True)

    async def run():
        app = create_app(engine)
        async with started(app) as call:
            service = app.state.context.service
            await asyncio.gather(*(leave(call, ABORTS // 10) for _ in range(10)))
            assert await until(lambda: idle(service))
            stats = engine.stats()
            assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0) and stats.prompt_tokens > 0
            reply = await call("POST", CHAT, JSON, chat(max_tokens=2, ignore_eos=True))
            assert reply.json()["usage"]["completion_tokens"] == 2
        assert engine._pool.available == engine._pool.blocks

    asyncio.run(run())


class SteppedEngine(ScriptedEngine):
    """Steps only when it is allowed to."""

    def __init__(self, **options):
        super().__init__(lambda request, choice: "word " * 500, **options)
        self.allowed, self.steps, self.stands = threading.Semaphore(0), 0, False

    def step(self):
        self.stands = True
        self.allowed.acquire()
        self.steps += 1
        return super().step()

    def step_until(self, condition):
        """One step after another, each once the one before is over; requests are taken in between."""
        def met():
            if not condition() and self.stands:
                self.stands = False
                self.allowed.release()
            return condition()
        assert wait(met)


def dial(server, body):
    """A connection that has sent a chat, and waits."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=120)
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_client_that_leaves_is_forgotten_within_a_step(serve, stream, waiting):
    """While its answer is written, and while it waits behind another one."""
    engine = SteppedEngine(settings=EngineSettings(running=1))
    server = serve(engine)
    service = server.app.state.context.service
    if waiting:
        other = dial(server, chat(stream=True))
        engine.step_until(lambda: service.stats.running == 1)
    connection = dial(server, chat(stream=stream))
    engine.step_until(lambda: (service.stats.running, service.stats.waiting) == (1, int(waiting)))
    assert wait(lambda: engine.stands)
    connection.close()
    assert wait(lambda: service.open == waiting)
    steps = engine.steps
    engine.allowed.release()  # the step that has begun may end
    assert wait(lambda: engine.stats().waiting == 0 and engine.stats().blocks_used == waiting)
    assert engine.steps == steps + 1 and engine.has_work == waiting
    if waiting:
        other.close()
    engine.allowed.release(1000)
    assert wait(lambda: idle(service))


# ---- full queues


def test_a_full_queue_answers_at_once_in_both_dialects_and_takes_again_later(serve):
    engine = SteppedEngine(settings=EngineSettings(running=1, waiting=2))
    server = serve(engine, ServerSettings(retry_after=3))
    service, connections = server.app.state.context.service, []
    for count in range(1, 4):
        connections.append(dial(server, chat()))
        assert wait(lambda: service.open == count)
        if count == 1:
            engine.step_until(lambda: service.stats.running == 1)
    refused = post(server, CHAT, json.loads(chat()))  # answered although no step is made
    assert (refused.status, refused.headers["retry-after"], refused.json()["error"]["type"]) == (429, "3", "rate_limit_error")
    refused = post(server, "/v1/messages", {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]})
    assert (refused.status, refused.headers["retry-after"], refused.json()["error"]["type"]) == (429, "3", "rate_limit_error")
    many = post(server, "/v1/completions", {"model": "fathom", "prompt": ["x"] * 8})
    assert many.status == 429 and wait(lambda: service.open == 3)
    for connection in connections:
        connection.close()
    engine.allowed.release(5000)
    assert wait(lambda: idle(service))
    assert post(server, CHAT, json.loads(chat(max_tokens=2))).status == 200


def test_of_many_prompts_that_do_not_all_fit_none_is_left(serve):
    engine = ScriptedEngine(lambda request, choice: "word " * 500, delay=0.02, settings=EngineSettings(running=1, waiting=4))
    server = serve(engine)
    assert post(server, "/v1/completions", {"model": "fathom", "prompt": ["x"] * 8, "max_tokens": 3000}).status == 429
    assert wait(lambda: idle(server.app.state.context.service)) and engine.stats().blocks_used == 0


# ---- stopping and failing


def test_a_server_that_drains_finishes_what_runs_and_refuses_the_rest(serve):
    engine = SteppedEngine()
    server = serve(engine)
    service = server.app.state.context.service
    assert request(server, "GET", "/ready").json()["status"] == "ok"
    running_one = dial(server, chat(max_tokens=5, stream=True))
    assert wait(lambda: service.open == 1)
    service.begin_drain()
    refused = post(server, CHAT, json.loads(chat()))
    assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded") and "retry-after" in refused.headers
    refused = post(server, "/v1/messages", {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]})
    assert (refused.status, refused.json()["error"]["type"]) == (503, "overloaded_error")
    assert (request(server, "GET", "/ready").status, request(server, "GET", "/health").status) == (503, 200)
    assert request(server, "GET", "/health").json()["status"] == "draining"
    engine.allowed.release(1000)
    content = b""
    while b"[DONE]" not in content:
        piece = running_one.recv(1 << 16)
        assert piece
        content += piece
    assert wait(lambda: idle(service))
    running_one.close()


def test_an_engine_that_fails_says_so(serve):
    engine = SteppedEngine()
    server = serve(engine)
    waiting = dial(server, chat())
    assert wait(lambda: server.app.state.context.service.open == 1)
    engine.fail = RuntimeError("a secret of the insides")
    engine.allowed.release()
    answer = b""
    while b"\r\n\r\n" not in answer or b"engine has failed" not in answer:  # head and body may come apart
        piece = waiting.recv(1 << 16)
        assert piece, answer
        answer += piece
    assert b" 500 " in answer.split(b"\r\n")[0] and b"secret" not in answer
    waiting.close()
    assert request(server, "GET", "/health").status == 503 and request(server, "GET", "/ready").json()["status"] == "failed"
    assert post(server, CHAT, json.loads(chat())).status == 500
    assert engine.closed


def test_an_engine_whose_process_dies_says_so(serve, tmp_path):
    """Killed while an answer is written; what asks for it then, and later, is told."""
    save_tiny(tmp_path)
    engine = RemoteEngine(Plan(tmp_path, torch.float32, "cpu", False, EngineSettings(cache_bytes=4 << 20), threads=1))
    server = serve(engine)
    slow = dial(server, chat(**ENDLESS))
    assert wait(lambda: server.app.state.context.service.stats.running == 1)
    os.kill(engine._process.pid, signal.SIGKILL)
    assert b" 500 " in slow.recv(100).split(b"\r\n")[0]
    slow.close()
    assert request(server, "GET", "/ready").json()["status"] == "failed" and request(server, "GET", "/health").status == 503
    assert post(server, CHAT, json.loads(chat())).status == 500


def test_the_process_drains_on_a_signal_and_stops_at_once_on_a_second(tmp_path):
    """The real command, a real model folder, real signals."""
    save_tiny(tmp_path / "model")
    command = [sys.executable, "-m", "fathom.cli", "serve", str(tmp_path / "model"), "--port", "0", "--name", "fathom", "--drain", "300"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
                          start_new_session=True) as process:
        lines = iter(process.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
        server = Running(address, None, None)
        assert post(server, CHAT, json.loads(chat(max_tokens=3, ignore_eos=True))).json()["usage"]["completion_tokens"] == 3
        slow = dial(server, chat(**ENDLESS, stream=True))
        assert slow.recv(10)
        os.killpg(process.pid, signal.SIGTERM)  # as a service manager does: to all processes of it
        assert wait(lambda: post(server, CHAT, json.loads(chat(max_tokens=1))).status == 503)
        assert process.poll() is None  # it waits for the slow one, which goes on
        read = 0
        while read < 60_000:
            piece = slow.recv(1 << 16)
            assert piece and b"error" not in piece
            read += len(piece)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(300) is not None
        slow.close()


def save_tiny(folder: Path) -> None:
    """A model folder as `fathom serve` takes it."""
    engine = tiny_engine()
    save_model(engine.model, folder)
    engine.tokenizer.save(folder)
