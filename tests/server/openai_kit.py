"""What tests with the official clients share: messages, tools, and a model that calls them."""

import json

import openai
import pytest

from fathom.text.chat import encode
from fathom.text.tokenizer import THINK_END
from tests.server.conftest import KEY
from tests.server.scripted import ScriptedEngine

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}
CALL = {"id": "call_00_x", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
OFF = {"thinking": {"type": "disabled"}}


def client(server, path="/v1", key=KEY):
    return openai.OpenAI(base_url=server.url + path, api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def chat(server):
    def ask(messages=HELLO, model="fathom", **wishes):
        return client(server).chat.completions.create(model=model, messages=messages, **wishes)
    return ask


def prompt_of(server):
    """The text of the last prompt that the engine was given."""
    return server.engine.tokenizer.decode(server.engine.requests[-1].prompt)


def written_calls(*calls):
    """What a model writes to make these calls: (name, arguments)."""
    message = {"role": "assistant", "content": "", "tool_calls": [
        {"id": str(index), "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for index, (name, arguments) in enumerate(calls)]}
    return encode([{"role": "user", "content": ""}, message], "chat").split(THINK_END)[1].removesuffix("<｜end▁of▁sentence｜>")


def allows(engine, text):
    """Whether the last request's constraint takes this text as a whole answer."""
    matcher, tokenizer = engine.compiler.start(engine.requests[-1].constraint), engine.tokenizer
    for token in tokenizer.encode(text, special=True):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return bool(matcher.allowed()[tokenizer.eos_id])


def calls_weather(serve, **more):
    """A server whose model calls two tools when it is asked, the first with `more` arguments, and tells what they said when they have answered."""
    def script(request, choice):
        text = engine.tokenizer.decode(request.prompt)
        opening = f"I look{THINK_END}" if text.endswith("<think>") else ""
        if "<tool_result>" in text.split("<｜User｜>")[-1]:
            return opening + "it is sunny"
        return opening + "let me see" + written_calls(("weather", {"city": "Paris"} | more), ("weather", {"city": "Rome"}))

    engine = ScriptedEngine(script)
    return serve(engine)
