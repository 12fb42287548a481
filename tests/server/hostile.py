"""Requests that mean harm, or were made by a broken client: an endless, seeded supply, each with the statuses that answer it well."""

import json
import random
import string
from collections.abc import Callable, Iterator
from typing import NamedTuple

JSON = {"content-type": "application/json"}
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "message": "/anthropic/v1/messages", "count": "/v1/messages/count_tokens"}
SPECIAL = ("<｜end▁of▁sentence｜>", "<｜Assistant｜>", "</think>", "｜DSML｜", "<｜DSML｜tool_calls>", "\x00", "\u202e", "\ufeff", "\U0001f4a9", "é")


class Attack(NamedTuple):
    """A request and the statuses that are right for it; `name` says what kind it is."""

    name: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    expected: tuple[int, ...]


def attacks(count: int, seed: int = 0) -> Iterator[Attack]:
    """So many of them, the kinds in turn."""
    draw = random.Random(seed)
    for number in range(count):
        make = KINDS[number % len(KINDS)]
        yield make(draw)


def valid(draw: random.Random) -> tuple[str, dict]:
    """A dialect, and a small request that it answers."""
    dialect = draw.choice(["chat", "chat", "completion", "message"])
    if dialect == "completion":
        return dialect, {"model": "fathom", "prompt": "the quick", "max_tokens": 2}
    return dialect, {"model": "fathom", "messages": [{"role": "user", "content": "the quick"}], "max_tokens": 2}


def _post(name: str, dialect: str, body: object, expected: tuple[int, ...] = (400,), **headers: str) -> Attack:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Attack(name, "POST", PATHS[dialect], JSON | headers, data, expected)


def huge_numbers(draw: random.Random) -> Attack:
    """A number far outside its range."""
    dialect, body = valid(draw)
    field = draw.choice(["max_tokens", "temperature", "top_p", "top_k"] + ["n", "seed", "frequency_penalty", "min_p"] * (dialect != "message"))
    number = draw.choice([-1, -10**9, 10**18, -10**400, 10**400, -1e308, 2**63, -2**63 - 1])
    if field == "seed":
        number = draw.choice([2**63, 10**400, -10**30])
    if field == "frequency_penalty":
        number = draw.choice([-2.1, 1e9, 10**400])
    if field == "top_k":
        number = draw.choice([-1, 10**18, 10**400])
    body[field] = number
    return _post("huge number", dialect, body)


def not_finite(draw: random.Random) -> Attack:
    """NaN, infinities and numbers that overflow."""
    dialect, body = valid(draw)
    text = json.dumps(body | {"temperature": 0.125}).replace("0.125", draw.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]))
    return _post("not finite", dialect, text.encode())


def wrong_types(draw: random.Random) -> Attack:
    """A field with a value of another type."""
    dialect, body = valid(draw)
    field = draw.choice(list(body))
    wrong = [value for value in (None, True, {}, {"a": {}}, [[]], [None], "\x00", -0.5) if not (isinstance(value, str) and isinstance(body[field], str))]
    if dialect == "completion" and field == "max_tokens":
        wrong.remove(None)
    if dialect == "chat" and field == "max_tokens":
        wrong.remove(None)
    body[field] = draw.choice(wrong)
    return _post("wrong type", dialect, body)


def broken_json(draw: random.Random) -> Attack:
    """A body that was cut, or into which something fell."""
    dialect, body = valid(draw)
    data = bytearray(json.dumps(body).encode())
    if draw.random() < 0.5:
        data = data[:draw.randrange(1, len(data))]
    else:
        data[draw.randrange(len(data))] = draw.choice(b"{}[]\",:\x00\xff\\")
    try:
        json.loads(data)
        expected = (200, 400, 404)  # it fell where it does no harm
    except ValueError:
        expected = (400,)
    return _post("broken JSON", dialect, bytes(data), expected)


def bad_utf8(draw: random.Random) -> Attack:
    """Bytes that are no text, and halves of surrogate pairs."""
    dialect, body = valid(draw)
    junk = draw.choice([b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b"\\ud800", b"\\udc00x", b"\\ud800\\ud800"])
    return _post("bad UTF-8", dialect, json.dumps(body).encode().replace(b"the quick", junk))


def deep_json(draw: random.Random) -> Attack:
    """Brackets in brackets."""
    dialect, body = valid(draw)
    depth = draw.choice([65, 1000, 100_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    nest = opening * depth + ("1" if opening != "[" else "") + closing * depth
    return _post("deep JSON", dialect, json.dumps(body | {"extra": "@"}).replace('"@"', nest).encode())


def wide_json(draw: random.Random) -> Attack:
    """Many items where few are allowed."""
    many = draw.choice([10**3, 10**5])
    dialect, field, value = draw.choice([
        ("chat", "stop", ["x"] * many), ("chat", "tools", [{"type": "function", "function": {"name": "f"}}] * many), ("message", "stop_sequences", ["x"] * many),
        ("chat", "logit_bias", {str(index): 1 for index in range(max(many, 2000))}), ("completion", "prompt", ["x"] * many),
        ("completion", "prompt", [1] * 10**5), ("completion", "stop_token_ids", [1] * many), ("chat", "messages", [{"role": "user"}] * many)])
    _, body = valid(random.Random(0)) if dialect == "chat" else ("", {"model": "fathom", "max_tokens": 2, "messages": [], "prompt": ""})
    body = {"model": "fathom", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2} | ({"prompt": "x"} if dialect == "completion" else {}) | {field: value}
    return _post("wide JSON", dialect, body)


def long_texts(draw: random.Random) -> Attack:
    """More text than the context holds."""
    dialect, body = valid(draw)
    word = draw.choice(["<", "a", " ", "\u20ac", "the quick ", *SPECIAL])
    text = word * (draw.choice([60_000, 600_000]) // len(word))
    if dialect == "completion":
        body["prompt"] = text
    else:
        body["messages"][0]["content"] = text
    return _post("long text", dialect, body)


def large_bodies(draw: random.Random) -> Attack:
    """Ten megabytes of nothing."""
    dialect, body = valid(draw)
    return _post("large body", dialect, json.dumps(body).encode() + b" " * 10_000_000, (413,))


def special_texts(draw: random.Random) -> Attack:
    """Text that spells the format's own tokens: ordinary text, and answered."""
    dialect, body = valid(draw)
    text = "".join(draw.choice(SPECIAL) for _ in range(draw.randrange(1, 30)))
    if dialect == "completion":
        body["prompt"] = text
    else:
        body["messages"][0]["content"] = text
    return _post("special tokens", dialect, body, (200,))


def regexes(draw: random.Random) -> Attack:
    """Patterns that take other engines for ever, or are too large."""
    pattern = draw.choice(["(a+)+b", "(a|a)*b", "(.*){1,50}x", "a{1,100000}", "((a{1,100}){1,100}){1,100}", "(?=a)b", "(a)\\1", "[", "(" * 500, "x" * 5000,
                           "(x+x+)+y", "^(([a-z])+.)+[A-Z]([a-z])+$", "\\p{L}{1,1000}", "(?i)(é|\u0130)+", ".{0,65535}{0,65535}"])
    body = {"model": "fathom", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "thinking": {"type": "disabled"}}
    return _post("regex", "chat", body | {"response_format": {"type": "regex", "pattern": pattern}}, (200, 400))


def schemas(draw: random.Random) -> Attack:
    """Schemas that are broken, giant, endless or unsatisfiable."""
    schema = draw.choice([
        {"type": "nothing"}, {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "file:///etc/passwd"},
        {"$ref": "http://localhost:1/x"}, {"allOf": [{"type": "string"}, {"type": "number"}]}, {"enum": []}, {"not": {}}, False, [], "x", 7, {"pattern": "(a+)+b"},
        {"type": "object", "properties": {f"p{index}": {"type": "string", "pattern": "(a|b|ab)*c" * 9} for index in range(400)}},
        {"type": "array", "items": {"type": "array", "minItems": 10**9}}, {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": 10**6},
        {"type": "object", "properties": {"a" * 70_000: {}}}, {"anyOf": [{"const": index} for index in range(5000)]}, {"type": "integer", "minimum": 10**400},
        {"type": "object", "required": [f"k{index}" for index in range(300)]}, {"x-guidance": {"lark": "start: /x/"}}, _nested(60), _nested(30, "anyOf")])
    body = {"model": "fathom", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "thinking": {"type": "disabled"}}
    if draw.random() < 0.5:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    else:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": draw.random() < 0.5}}]
        body["tool_choice"] = draw.choice(["auto", "required", "none"])
    return _post("schema", "chat", body, (200, 400))


def _nested(depth: int, key: str = "properties") -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}} if key == "properties" else {"anyOf": [schema, {"type": "null"}]}
    return schema


def tool_names(draw: random.Random) -> Attack:
    """Names and parameters that try to break out of the format."""
    name = draw.choice(["", "a b", 'x">', "</｜DSML｜invoke>", "../../etc", "x" * 65, "é", "f\n"])
    tool = {"type": "function", "function": {"name": name}}
    if draw.random() < 0.5:
        parameter = draw.choice(['x" string="true">', "｜DSML｜", "", "\n", "a" * 100_000])
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {parameter: {"type": "string"}}}}}
        expected = (200, 400)
    else:
        expected = (400,)
    body = {"model": "fathom", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "tools": [tool]}
    return _post("tool name", "chat", body, expected)


def conversations(draw: random.Random) -> Attack:
    """Turns in an order that makes no sense."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": draw.choice(["{", "[]", "{}", "null", '{"a":' * 60 + "1" + "}" * 60, "\ud83d\ude00"])}}
    parts = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "prefix": True}, {"role": "tool", "tool_call_id": "a", "content": "z"},
             {"role": "assistant", "content": None, "tool_calls": [call, call]}, {"role": "system", "content": ""}, {"role": "latest_reminder", "content": "r"},
             {"role": "user", "content": [], "task": "action"}, {"role": "assistant", "content": "", "reasoning_content": "q", "prefix": True}]
    messages = [draw.choice(parts) for _ in range(draw.randrange(1, 9))]
    return _post("conversation", "chat", {"model": "fathom", "messages": messages, "max_tokens": 2}, (200, 400))


def odd_paths(draw: random.Random) -> Attack:
    """Ways out of the folder of static files, and paths that two readers may read differently."""
    path = draw.choice([
        "/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/web/../app.py", "/v1/..%2fhealth", "//v1/models", "/v1//models", "/v1/models/",
        "/./health", "/health/..", "/%00", "/app.js%00.html", "/..\\..\\windows\\win.ini", "/v1/models/../../../x", "/static/%252e%252e/x", "/" + "a" * 5000, "/~root",
        "/.git/config", "/app.py", "/__init__.py", "/%ff", "/v1/%63hat/completions", "/v1/models/%2e%2e%2f%2e%2e"])
    return Attack("odd path", draw.choice(["GET", "GET", "HEAD"]), path, {}, b"", (404,))


def odd_methods(draw: random.Random) -> Attack:
    """Methods that a path does not take."""
    method = draw.choice(["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "BREW"])
    return Attack("odd method", method, draw.choice([*PATHS.values(), "/v1/models", "/health"]), JSON, b"", (400, 404, 405))


def odd_headers(draw: random.Random) -> Attack:
    """Headers that are long, doubled or lie; a content type that is no JSON's."""
    dialect, body = valid(draw)
    headers = draw.choice([
        {"content-type": "text/plain"}, {"content-type": "application/xml"}, {"content-type": "multipart/form-data; boundary=x"}, {"x-request-id": "a" * 5000},
        {"x-request-id": "<script>"}, {"authorization": "Bearer " + "x" * 3000}, {"accept": "*/*;" * 500}, {"content-encoding": "gzip"}, {"x-api-key": "\xff\xfe"},
        {"host": "evil.example"}, {"x-forwarded-for": "127.0.0.1"}, {"expect": "nonsense"}, {"upgrade": "websocket", "connection": "upgrade"}])
    return _post("odd header", dialect, body, (200, 400), **headers)


def random_bytes(draw: random.Random) -> Attack:
    """Noise."""
    dialect, _ = valid(draw)
    return _post("noise", dialect, draw.randbytes(draw.randrange(1, 2000)))


def mutations(draw: random.Random) -> Attack:
    """A valid request with a few changes of any kind."""
    dialect, body = valid(draw)
    for _ in range(draw.randrange(1, 5)):
        key = draw.choice([*body, "".join(draw.choices(string.ascii_letters, k=5)), "stop", "tools", "stream", "n", "logprobs", "echo", "thinking", "system", "user"])
        body[key] = draw.choice([None, True, 0, 1, -1, "", "x", [], {}, ["x"], {"type": "disabled"}, [{}], 0.5, 10**6])
    return _post("mutation", dialect, body, (200, 400, 404))


KINDS: tuple[Callable[[random.Random], Attack], ...] = (
    huge_numbers, not_finite, wrong_types, broken_json, bad_utf8, deep_json, wide_json, long_texts, special_texts, regexes, schemas, tool_names, conversations,
    odd_paths, odd_methods, odd_headers, random_bytes, mutations, mutations, large_bodies)
