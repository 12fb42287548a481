"""The official anthropic client against a server: messages, streams, thinking, tools, formats, counting, errors."""

import json

import anthropic
import pytest

from fathom.server.settings import ServerSettings
from fathom.text.chat import encode
from fathom.text.tokenizer import THINK_END
from tests.server.conftest import KEY, post
from tests.server.openai_kit import allows, calls_weather, prompt_of
from tests.server.scripted import ScriptedEngine

HELLO = [{"role": "user", "content": "hello"}]
OFF = {"type": "disabled"}
WEATHER = {"name": "weather", "description": "The weather of a city.",
           "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


def client(server, key=KEY, path="/anthropic"):
    return anthropic.Anthropic(base_url=server.url + path, api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def ask(server):
    def create(messages=HELLO, **wishes):
        return client(server).messages.create(**{"model": "claude-sonnet", "max_tokens": 200, "messages": messages} | wishes)
    return create


def test_a_message_thinks_answers_and_counts(ask, server):
    answer = ask()
    thinking, text = answer.content
    assert (thinking.type, thinking.thinking, text.type, text.text) == ("thinking", "a thought", "text", "hello world")
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == ("assistant", "fathom", "end_turn", None)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(server.engine.requests[-1].prompt) and usage.output_tokens > 5
    assert prompt_of(server) == encode(HELLO)
    assert [block.type for block in ask(thinking=OFF).content] == ["text"]


def test_system_texts_turns_and_effort_reach_the_prompt(ask, server):
    turns = [{"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    ask(turns, system=[{"type": "text", "text": "x-anthropic-billing-header: a=1"}, {"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}])
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}, *turns[1:]]
    assert prompt_of(server) == encode(expected)
    ask(extra_body={"output_config": {"effort": "max"}})
    assert prompt_of(server) == encode(HELLO, reasoning_effort="max")
    ask([*HELLO, {"role": "assistant", "content": "hello wo"}], thinking=OFF)  # a last turn of the assistant is continued
    assert prompt_of(server).endswith(f"{THINK_END}hello wo")


def test_wishes_reach_the_engine(ask, server):
    ask(stop_sequences=["qq"], metadata={"user_id": "ann"}, max_tokens=33, extra_body={"temperature": 0.4, "top_p": 0.7, "top_k": 3})
    request = server.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop, sampling.max_tokens) == (0.4, 0.7, 3, ("qq",), 33)
    assert request.tenant == "/ann"


@pytest.mark.parametrize(("wishes", "reason", "sequence"), [
    ({}, "end_turn", None), ({"max_tokens": 3}, "max_tokens", None), ({"stop_sequences": ["wor"]}, "stop_sequence", "wor")])
def test_why_an_answer_ended(ask, wishes, reason, sequence):
    answer = ask(thinking=OFF, **wishes)
    assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)


def test_the_client_puts_a_stream_together_again(server):
    with client(server).messages.stream(model="m", max_tokens=200, messages=HELLO) as stream:
        events = [event.type for event in stream]
        answer = stream.get_final_message()
    assert [block.type for block in answer.content] == ["thinking", "text"] and answer.content[1].text == "hello world"
    assert (events[0], events[-1]) == ("message_start", "message_stop") and answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 5
    assert (events.count("content_block_start"), events.count("content_block_stop")) == (2, 2)


def test_the_bytes_of_a_stream_begin_with_a_ping(server):
    reply = post(server, "/v1/messages", {"model": "m", "max_tokens": 9, "messages": HELLO, "stream": True})
    names = [part.split(b"\n")[0].decode().removeprefix("event: ") for part in reply.body.split(b"\n\n")[:-1]]
    assert names[0] == "ping" and names[1] == "message_start" and names[-2:] == ["message_delta", "message_stop"]


@pytest.fixture
def calling(serve):
    return calls_weather(serve)


@pytest.mark.parametrize("stream", [False, True])
def test_a_round_trip_with_tools(calling, stream):
    api = client(calling).messages
    wishes = {"model": "m", "max_tokens": 400, "tools": [WEATHER]}
    if stream:
        with api.stream(messages=HELLO, **wishes) as running:
            first = running.get_final_message()
    else:
        first = api.create(messages=HELLO, **wishes)
    assert first.stop_reason == "tool_use" and [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    calls = first.content[2:]
    assert [call.input for call in calls] == [{"city": "Paris"}, {"city": "Rome"}] and calls[0].id != calls[1].id
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": word} for call, word in zip(reversed(calls), ("rain", "21 degrees"))]
    history = [*HELLO, {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]}, {"role": "user", "content": results}]
    second = api.create(messages=history, **wishes)
    assert (second.content[-1].text, second.stop_reason) == ("it is sunny", "end_turn")
    prompt = prompt_of(calling)
    assert prompt.index("21 degrees") < prompt.index("rain") and "I look</think>let me see" in prompt


@pytest.mark.parametrize(("choice", "constrained", "called"), [
    ({"type": "auto"}, True, True), ({"type": "any"}, True, True), ({"type": "none"}, False, False), ({"type": "tool", "name": "weather"}, True, True)])
def test_tool_choice_decides_the_grammar_and_the_parser(calling, choice, constrained, called):
    answer = client(calling).messages.create(model="m", max_tokens=400, messages=HELLO, tools=[WEATHER], tool_choice=choice, thinking=OFF)
    assert (calling.engine.requests[-1].constraint is not None, answer.stop_reason == "tool_use") == (constrained, called)


def test_a_schema_bounds_the_answer(ask, server):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
    ask(thinking=OFF, extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}})
    assert allows(server.engine, '{"city": "Rome"}') and not allows(server.engine, '{"town": "Rome"}')


def test_a_repeated_prompt_is_read_from_the_cache(ask):
    messages = [{"role": "user", "content": "another one of a kind " * 60}]
    first, again = ask(messages).usage, ask(messages).usage
    assert (first.cache_read_input_tokens, again.cache_read_input_tokens) == (0, first.input_tokens // 128 * 128)
    assert again.input_tokens + again.cache_read_input_tokens == first.input_tokens


def test_tokens_are_counted_without_an_answer(server):
    made = len(server.engine.requests)
    for path in ("/anthropic", ""):
        count = client(server, path=path).messages.count_tokens(model="m", messages=HELLO, system="be brief", tools=[WEATHER])
        message = client(server, path=path).messages.create(model="m", max_tokens=5, messages=HELLO, system="be brief", tools=[WEATHER])
        assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert len(server.engine.requests) == made + 2


@pytest.mark.parametrize(("wishes", "words"), [
    (dict(messages=[]), "messages"), (dict(messages=[{"role": "assistant", "content": "x"}]), "must be of the user"),
    (dict(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}]), "messages[0].content[0]"), (dict(temperature=3), "temperature"),
    (dict(max_tokens=0), "max_tokens"), (dict(max_tokens=10**9), "maximum context length"), (dict(top_p=0), "top_p"), (dict(stop_sequences=["x"] * 17), "stop_sequences"),
    (dict(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools[0]"), (dict(tool_choice={"type": "any"}), "any needs tools"),
    (dict(tools=[WEATHER], tool_choice={"type": "tool", "name": "x"}), "none of the tools"),
    (dict(messages=[*HELLO, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}]), "answers no tool_use"),
    (dict(messages=[*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]), "has no tool_result"),
    (dict(metadata={"user_id": "x" * 513}), "metadata.user_id")])
def test_what_is_wrong_with_a_message_is_named(server, wishes, words):
    reply = post(server, "/anthropic/v1/messages", {"model": "m", "max_tokens": 9, "messages": HELLO} | wishes)
    error = reply.json()
    assert (reply.status, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in error["error"]["message"] and len(reply.body) < 1000


def test_errors_have_anthropics_types(serve):
    engine = ScriptedEngine()
    server = serve(engine, ServerSettings(api_keys=(KEY,)))
    with pytest.raises(anthropic.AuthenticationError) as refusal:
        client(server, key="wrong-key-000").messages.create(model="m", max_tokens=1, messages=HELLO)
    assert refusal.value.body["error"]["type"] == "authentication_error"
    assert client(server).messages.create(model="m", max_tokens=200, messages=HELLO).content
    engine.fail = RuntimeError("a bug")
    with pytest.raises(anthropic.InternalServerError) as refusal:
        client(server).messages.create(model="m", max_tokens=1, messages=HELLO)
    assert json.loads(refusal.value.response.text)["error"]["type"] == "api_error"
