"""Hostile and broken requests: a right 4xx each, never a 5xx, nothing kept, and the next caller is served.

Some hundred each time; FATHOM_HOSTILE=5000 sends so many.
"""

import asyncio
import json
import logging
import os
import socket
from collections import Counter

import pytest

from fathom.server.app import create_app
from fathom.server.settings import ServerSettings
from tests.server.asgi import chat, started, until
from tests.server.conftest import post, request, running, wait
from tests.server.hostile import JSON, attacks
from tests.server.tiny import tiny_engine

COUNT = int(os.environ.get("FATHOM_HOSTILE", "400"))
SETTINGS = ServerSettings(body_bytes=8 << 20, body_timeout=20.0)


def check(attack, reply, seen):
    """The reply is one of those that are right, and an error is short, in the dialect's shape, and tells nothing of the insides."""
    assert reply.status in attack.expected, (attack.name, attack.path, attack.headers, attack.body[:300], reply.status, reply.body[:300])
    seen[attack.name, reply.status] += 1
    if reply.status >= 400 and attack.method != "HEAD":
        error = reply.json()["error"]
        assert error["message"] and error["type"] and len(reply.body) < 2000 and b"Traceback" not in reply.body and b'File "' not in reply.body
    assert reply.headers["x-content-type-options"] == "nosniff"


async def attack_all(app, count, seed, seen):
    async with started(app) as call:
        service = app.state.context.service

        async def worker(queue):
            for attack in queue:
                check(attack, await call(attack.method, attack.path, attack.headers, attack.body), seen)

        queue = attacks(count, seed)  # shared: each worker takes the next
        await asyncio.gather(*(worker(queue) for _ in range(6)))
        assert await until(lambda: not service.open and not service.engine.has_work)
        assert service.engine.stats().blocks_used == 0 and service.ready
        reply = await call("POST", "/v1/chat/completions", JSON, chat(max_tokens=3))
        assert reply.status == 200 and reply.json()["usage"]["completion_tokens"] == 3


def test_every_attack_gets_a_right_answer_and_leaves_nothing(caplog):
    caplog.set_level(logging.WARNING)
    engine, seen = tiny_engine(), Counter()
    asyncio.run(attack_all(create_app(engine, SETTINGS), COUNT, 0, seen))
    assert seen.total() == COUNT and len({name for name, _ in seen}) >= 18 and engine.most_blocks > 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    print(sorted(seen.items()))


@pytest.mark.parametrize(("pieces", "pause", "timeout", "status"), [(3, 60, 0.2, 408), (40, 0.01, 60, 200)])
def test_a_body_that_does_not_come_is_given_up_and_a_slow_one_is_not(pieces, pause, timeout, status):
    async def ask():
        async with started(create_app(tiny_engine(), ServerSettings(body_timeout=timeout))) as call:
            body = chat(max_tokens=2)
            size = -(-len(body) // pieces)
            parts = [body[begin:begin + size] for begin in range(0, len(body), size)]
            return await call("POST", "/v1/chat/completions", JSON, parts, pause=pause)

    reply = asyncio.run(ask())
    assert reply.status == status
    if status == 408:
        assert reply.json()["error"]["code"] == "request_timeout" and reply.headers["connection"] == "close"


def test_over_the_network_nothing_breaks_either():
    """Raw sockets: some of the same attacks, connections that are cut in the middle of a request or half closed."""
    engine, seen = tiny_engine(), Counter()
    with running(engine, SETTINGS, create_app(engine, SETTINGS)) as server:
        for attack in attacks(60, seed=5):
            if attack.expected == (413,):  # the server closes before all is sent: what the client sees of it is the network's choice
                continue
            if attack.path.isascii() and not any(letter in attack.path for letter in "\x00 "):
                check(attack, request(server, attack.method, attack.path, attack.body, attack.headers), seen)
        body = chat(max_tokens=100, stream=True)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for cut in (b"", head[:20], head, head + body[:30], head + body, b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50,
                    b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
                    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\nzz\r\n"):
            with socket.create_connection(address, timeout=60) as connection:
                try:
                    connection.sendall(cut)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(100)
                except OSError:
                    pass  # the server may close first
        assert post(server, "/v1/chat/completions", json.loads(chat(max_tokens=2))).status == 200
        service = server.app.state.context.service
        assert wait(lambda: not service.open and not engine.has_work) and engine.stats().blocks_used == 0
