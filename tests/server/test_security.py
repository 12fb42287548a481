"""Who may ask what, and what nobody is told: keys, paths, headers, logs, other people's prompts."""

import json
import logging
import re
from importlib.resources import files
from pathlib import Path

import pytest

from fathom.engine.engine import Engine
from fathom.server.app import create_app
from fathom.server.guards import check_json
from fathom.server.failures import Failure
from fathom.server.settings import ServerSettings
from tests.server.asgi import chat
from tests.server.conftest import KEY, post, request
from tests.server.scripted import ScriptedEngine
from tests.server.tiny import tiny_engine

CHAT = "/v1/chat/completions"
OTHER_KEY = "other-key-0123456789"
JSON = {"content-type": "application/json"}
PAGE = files("fathom.server") / "web"


@pytest.fixture
def closed(serve):
    """A server that two keys open."""
    return serve(ScriptedEngine(), ServerSettings(api_keys=(KEY, OTHER_KEY)))


def routes(app):
    """Every method and path that the application has, with the parameters filled in."""
    def walk(found):
        for route in found:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            if inner:
                yield from walk(inner)
            elif getattr(route, "methods", None):
                yield from ((method, re.sub(r"\{[^}]*\}", "fathom", route.path)) for method in route.methods)
    return sorted(set(walk(app.routes)))


def test_every_route_but_health_and_the_page_asks_for_a_key(closed):
    found = routes(closed.app)
    assert len(found) >= 20 and ("POST", CHAT) in found and ("GET", "/metrics") in found and ("GET", "/openapi.json") in found
    for method, path in found:
        for headers in ({}, {"authorization": "Bearer wrong-key-123"}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY[:-1]}, {"authorization": KEY},
                        {"authorization": "Bearer "}, {"cookie": f"key={KEY}"}):
            status = request(closed, method, path, b"{}" if method == "POST" else None, JSON | headers).status
            assert status == (200 if path == "/health" and method in ("GET", "HEAD") else 401), (method, path, headers)
    for path in ("/v1/models?api_key=" + KEY, "/v1//models", "//v1/models", "/V1/models", "/v1/models/", "/health/../v1/models", "/v1/..%2fhealth", "/nothing", "/health/"):
        assert request(closed, "GET", path).status == 401, path
    assert request(closed, "POST", "/health").status == 401


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {OTHER_KEY} "}, {"x-api-key": KEY}])
def test_a_key_opens_in_either_dialects_header(closed, headers):
    assert request(closed, "GET", "/v1/models", None, headers).status == 200
    assert post(closed, "/v1/messages", {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}, **headers).status == 200


def test_a_wrong_key_is_not_shown_but_for_its_end(closed):
    reply = request(closed, "GET", "/v1/models", None, {"authorization": "Bearer sk-very-secret-5678"})
    assert "****5678" in reply.json()["error"]["message"] and b"very-secret" not in reply.body and reply.headers["www-authenticate"] == "Bearer"
    assert b"short" not in request(closed, "GET", "/v1/models", None, {"authorization": "Bearer short"}).body


@pytest.mark.parametrize("keys", [("short",), ("with space in it",), ("tab\tin-the-key",), ("schlüssel-mit-umlaut",)])
def test_keys_that_could_be_misread_are_refused(keys):
    with pytest.raises(Exception, match="api_key is unusable"):
        ServerSettings(api_keys=keys)


# ---- the page


def test_the_page_and_only_the_page_is_open(closed):
    for path in Path(str(PAGE)).rglob("*"):
        if path.is_file():
            reply = request(closed, "GET", f"/{path.relative_to(str(PAGE)).as_posix()}")
            assert (reply.status, reply.body) == (200, path.read_bytes())
            assert "default-src 'none'" in reply.headers["content-security-policy"] and reply.headers["x-frame-options"] == "DENY"
    assert request(closed, "GET", "/").body == (PAGE / "index.html").read_bytes()


@pytest.mark.parametrize("path", [
    "/../app.py", "/..%2fapp.py", "/%2e%2e/app.py", "/..%5capp.py", "/..\\app.py", "/web/../../app.py", "/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/..;/app.py", "//etc/passwd",
    "/app.js/../../app.py", "/....//app.py", "/%c0%ae%c0%ae/app.py", "/app.py", "/__init__.py", "/app.js%00", "/.", "/..", "/%2f%2fetc%2fpasswd", "/index.html/", "/app.js/x"])
@pytest.mark.parametrize("key", [KEY, None])
def test_no_path_leads_out_of_the_page(closed, path, key):
    reply = request(closed, "GET", path, None, {"x-api-key": key} if key else {})
    assert reply.status == (404 if key else 401) and b"import" not in reply.body and b"root:" not in reply.body


# ---- headers


def test_nothing_of_a_request_becomes_a_header(serve):
    server = serve(ScriptedEngine(), ServerSettings(any_model=True))
    names = set(post(server, CHAT, json.loads(chat())).headers)
    for text in ("x\r\nset-cookie: a=b", "x\nset-cookie: a=b", "\r\n\r\n<html>"):
        for body in ({"model": text}, {"user": text}, {"messages": [{"role": text, "content": "x"}]}, {text: text}, {"stop": text}):
            assert set(post(server, CHAT, json.loads(chat()) | body).headers) - {"content-length"} <= names
    for path in ("/v1/models/x%0d%0aset-cookie:%20a=b", "/v1/x%0aset-cookie:a"):
        assert "set-cookie" not in request(server, "GET", path).headers


@pytest.mark.parametrize(("given", "kept"), [("abc-DEF_123", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("<x>", False), ("é", False), ("", False)])
def test_a_request_id_is_taken_over_if_it_is_harmless(serve, given, kept):
    server = serve(ScriptedEngine())
    reply = request(server, "GET", "/health", None, {"x-request-id": given.encode()})
    assert (reply.headers["x-request-id"] == given) == kept and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", reply.headers["x-request-id"])


def test_other_origins_are_let_in_only_where_it_was_said(serve):
    ask = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in request(serve(ScriptedEngine()), "OPTIONS", CHAT, None, ask).headers
    server = serve(ScriptedEngine(), ServerSettings(cors_origins=("https://good.example",), api_keys=(KEY,)))
    assert "access-control-allow-origin" not in request(server, "OPTIONS", CHAT, None, ask).headers
    assert request(server, "OPTIONS", CHAT, None, ask | {"origin": "https://good.example"}).headers["access-control-allow-origin"] == "https://good.example"
    assert request(server, "POST", CHAT, chat(), JSON | {"origin": "https://good.example"}).status == 401


# ---- logs and metrics


def test_logs_and_metrics_hold_no_text_no_key_and_no_name(serve, caplog):
    caplog.set_level(logging.DEBUG)
    engine = ScriptedEngine(lambda request, choice: "the-answer")
    server = serve(engine, ServerSettings(api_keys=(KEY,)))
    auth = {"authorization": f"Bearer {KEY}"}
    body = json.loads(chat(user="the-user")) | {"messages": [{"role": "system", "content": "the-system-text"}, {"role": "user", "content": "the-prompt"}]}
    assert post(server, CHAT, body, **auth).status == 200
    assert post(server, CHAT, body | {"stream": True}, **auth).status == 200
    assert post(server, CHAT, body | {"temperature": "the-wrong-value"}, **auth).status == 400
    assert post(server, CHAT, body, authorization="Bearer the-wrong-key").status == 401
    assert request(server, "GET", "/the-path?the-query", None, auth).status == 404
    engine.fail = RuntimeError("a bug")
    assert post(server, CHAT, body, **auth).status == 500
    metrics = request(server, "GET", "/metrics", None, auth).body.decode()
    own = [record for record in caplog.records if record.name.startswith(("fathom", "uvicorn"))]
    text = "\n".join(logging.Formatter().format(record) for record in own)
    for secret in (KEY, "the-answer", "the-user", "the-system-text", "the-prompt", "the-wrong-value", "the-wrong-key", "the-path", "the-query"):
        assert secret not in text and secret not in metrics, secret
    lines = [json.loads(record.getMessage()) for record in own if record.levelno == logging.INFO and record.getMessage().startswith("{")]
    assert [line["status"] for line in lines if line["method"] == "POST"] == [200, 200, 400, 401, 500]
    assert lines[0]["route"] == CHAT and lines[0]["prompt_tokens"] > 0 and lines[0]["output_tokens"] > 0 and len(lines[0]["tenant"]) == 8
    assert 'fathom:http_requests_total{handler="unmatched",method="GET",status="404"} 1.0' in metrics
    assert "Traceback" in text  # a bug is not hidden from whoever runs the server


# ---- other people's prompts


@pytest.mark.parametrize("identity", ["user", "key"])
def test_nobody_learns_from_the_cache_what_others_asked(serve, identity):
    """The same prompt by another user, or under another key: no token comes from the cache, in any dialect."""
    server = serve(tiny_engine(kind=Engine), ServerSettings(api_keys=(KEY, OTHER_KEY)))
    secret = "the quick brown fox " * 40

    def ask(who, path=CHAT):
        key, user = (KEY, who) if identity == "user" else ({"ann": KEY, "bob": OTHER_KEY}[who], "same")
        body = {"model": "fathom", "max_tokens": 2, "thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": secret}]}
        if path == "/v1/completions":
            body = {"model": "fathom", "max_tokens": 2, "prompt": secret}
        body |= {"metadata": {"user_id": user}} if path == "/v1/messages" else {"user": user}
        usage = post(server, path, body, authorization=f"Bearer {key}").json()["usage"]
        return usage["cache_read_input_tokens"] if path == "/v1/messages" else usage["prompt_cache_hit_tokens"]

    for path in (CHAT, "/v1/completions"):
        assert (ask("ann", path), ask("bob", path)) == (0, 0)
        assert ask("ann", path) >= 128 and ask("bob", path) >= 128
    assert ask("ann", "/v1/messages") >= 128  # the same user's prompt in another dialect is the same prompt


def test_a_user_cannot_name_another_keys_users(serve):
    """Key and user are told apart however the user is called."""
    server = serve(ScriptedEngine(), ServerSettings(api_keys=(KEY, OTHER_KEY)))
    for key, user in ((KEY, "a/b"), (OTHER_KEY, "a/b"), (KEY, ""), (KEY, "/"), (OTHER_KEY, "/a")):
        post(server, CHAT, json.loads(chat(user=user)), authorization=f"Bearer {key}")
    tenants = [request.tenant for request in server.engine.requests]
    assert len(set(tenants)) == len(tenants) and not any(KEY in tenant for tenant in tenants)


# ---- bodies


@pytest.mark.parametrize(("body", "words"), [
    (b"\xff", "not UTF-8 at byte 0"), (b"[" * 65 + b"]" * 65, "nested more than 64 deep"), (b"[" * 10**6, "more than 1000 values"),
    (b"[" + b"1," * 1000 + b"1]", "more than 1000 values"), (b'{"a": NaN}', "NaN"), (b"[-Infinity]", "NaN"), (b'"\\ud800"', "surrogate"), (b'["\\ude00\\ud83d"]', "surrogate")])
def test_a_body_that_no_reader_should_try_is_refused(body, words):
    with pytest.raises(Failure, match=words):
        check_json(body, 1000)


@pytest.mark.parametrize("body", [
    b'"' + b"[" * 1000 + b'"', b'"\\"' + b"{" * 1000 + b'\\\\"', b'{"NaN": "Infinity"}', b'"\\ud83d\\ude00"', b"[" * 64 + b"]" * 64, '"é\u20ac"'.encode(), b'"' + b"," * 5000 + b'"'])
def test_a_harmless_body_is_let_through(body):
    check_json(body, 1000)


def test_bodies_are_limited_with_and_without_a_length(serve):
    server = serve(ScriptedEngine(), ServerSettings(body_bytes=1000))
    assert post(server, CHAT, json.loads(chat())).status == 200
    assert post(server, CHAT, json.loads(chat(user="x" * 1000))).status == 413
    pieces = iter([chat()[:-1], b', "user": "', b"x" * 1000, b'"}'])
    reply = request(server, "POST", CHAT, pieces, JSON)  # in chunks
    assert reply.status == 413 and reply.headers["connection"] == "close"
