"""The official openai client against a server: tools, and answers of a given form."""

import json

import openai
import pytest

from fathom.server.settings import ServerSettings
from fathom.text.tokenizer import THINK_END
from tests.server.openai_kit import CALL, HELLO, OFF, WEATHER, allows, calls_weather, chat, client, prompt_of  # noqa: F401  (a fixture)
from tests.server.scripted import ScriptedEngine


# ---- tools

@pytest.fixture
def calling(serve):
    return calls_weather(serve, days=2)


@pytest.mark.parametrize("extra", [{}, OFF])
def test_a_round_trip_with_tools(calling, extra):
    ask = client(calling).chat.completions.create
    first = ask(model="fathom", messages=HELLO, tools=[WEATHER], extra_body=extra).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", "let me see")
    calls = first.message.tool_calls
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("function", "weather", {"city": "Paris", "days": 2}), ("function", "weather", {"city": "Rome"})]
    assert len({call.id for call in calls}) == 2 and calls[1].id.startswith("call_01_")
    assert "You can use" in prompt_of(calling) or '"name": "weather"' in prompt_of(calling)
    results = [{"role": "tool", "tool_call_id": call.id, "content": city} for call, city in reversed([*zip(calls, ("21 degrees", "rain"))])]
    second = ask(model="fathom", messages=[*HELLO, first.message, *results], tools=[WEATHER], extra_body=extra)
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("it is sunny", "stop")
    assert prompt_of(calling).index("21 degrees") < prompt_of(calling).index("rain")  # in the order of the calls
    assert ("I look</think>let me see" in prompt_of(calling)) == (not extra)


def test_streamed_calls_come_with_index_id_and_name_first(calling):
    chunks = [*client(calling).chat.completions.create(model="fathom", messages=HELLO, tools=[WEATHER], stream=True)]
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
    assert [(piece.index, piece.id is not None, piece.function.name) for piece in pieces] == [
        (0, True, "weather"), (0, False, None), (1, True, "weather"), (1, False, None)]
    assert json.loads("".join(piece.function.arguments for piece in pieces if piece.index == 0)) == {"city": "Paris", "days": 2}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "DSML" not in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_the_clients_own_accumulator_reads_the_stream(calling):
    with client(calling).chat.completions.stream(model="fathom", messages=HELLO, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Paris", "Rome"]


@pytest.mark.parametrize("broken", ["\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n oops", "\n\n<｜DSML｜tool_calls>"])
def test_a_malformed_call_is_handed_back_as_text(serve, broken):
    server = serve(ScriptedEngine(lambda request, choice: "look" + broken))
    choice = client(server).chat.completions.create(model="fathom", messages=HELLO, tools=[WEATHER], extra_body=OFF).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("look" + broken, None, "stop")


def test_tool_choice_decides_the_grammar_and_the_parser(calling):
    ask, engine = client(calling).chat.completions.create, calling.engine
    for choice, constrained in (("auto", True), ("none", False), ("required", True), ({"type": "function", "function": {"name": "weather"}}, True)):
        answer = ask(model="fathom", messages=HELLO, tools=[WEATHER], tool_choice=choice, extra_body=OFF).choices[0]
        assert (engine.requests[-1].constraint is not None) == constrained
        assert (answer.message.tool_calls is None) == (choice == "none")
    tokens = engine.tokenizer.encode("no call at all")
    matcher = engine.compiler.start(engine.requests[-1].constraint)
    for token in tokens:
        matcher.accept(token)
    assert not matcher.allowed()[engine.tokenizer.eos_id]  # the named tool has to be called


@pytest.mark.parametrize(("wishes", "param", "words"), [
    (dict(tool_choice="required"), "tool_choice", "needs tools"),
    (dict(tool_choice={"type": "function", "function": {"name": "other"}}, tools=[WEATHER]), "tool_choice.function.name", "none of the tools"),
    (dict(tools=[WEATHER, WEATHER]), "tools", "different names"),
    (dict(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "pattern"),
    (dict(tools=[{"type": "web_search"}]), "tools[0].type", "function"),
    (dict(tools=[{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "string"}}}]), None, "object"),
    (dict(messages=[*HELLO, {"role": "assistant", "content": "", "tool_calls": [CALL]}, *HELLO]), "messages[2]", "insufficient tool messages"),
    (dict(messages=[*HELLO, {"role": "assistant", "content": "", "tool_calls": [CALL]}]), "messages[1]", "insufficient tool messages"),
    (dict(messages=[*HELLO, {"role": "tool", "tool_call_id": "x", "content": "y"}]), "messages[1].tool_call_id", "preceding message"),
])
def test_tools_that_make_no_sense_are_refused(chat, wishes, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refusal:
        chat(**wishes)
    assert refusal.value.param == param


def test_reasoning_can_be_demanded_back(serve):
    server = serve(ScriptedEngine(), ServerSettings(require_reasoning=True))
    ask = client(server).chat.completions.create
    history = [*HELLO, {"role": "assistant", "content": "hi"}, *HELLO]
    with pytest.raises(openai.BadRequestError, match="must be passed back") as refusal:
        ask(model="fathom", messages=history, tools=[WEATHER])
    assert refusal.value.param == "messages[1].reasoning_content"
    history[1]["reasoning_content"] = ""
    ask(model="fathom", messages=history, tools=[WEATHER])
    del history[1]["reasoning_content"]
    ask(model="fathom", messages=history)
    ask(model="fathom", messages=history, tools=[WEATHER], extra_body=OFF)


# ---- answers of a given form

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}


@pytest.mark.parametrize(("form", "good", "bad"), [
    ({"type": "json_object"}, '{"a": [1, 2]}', "[1]"),
    ({"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}, '{"city": "Rome"}', '{"town": "Rome"}'),
    ({"type": "json_schema", "json_schema": {"name": "place"}}, '{"any": 1}', "1"),
    ({"type": "regex", "pattern": "[0-9]{3}"}, "123", "12")])
@pytest.mark.parametrize("extra", [{}, OFF])
def test_a_format_bounds_the_answer(chat, server, form, good, bad, extra):
    chat(response_format=form, extra_body=extra)
    before = "" if extra else f"some thoughts{THINK_END}"
    assert allows(server.engine, before + good) and not allows(server.engine, before + bad)
    assert ("## Response Format" in prompt_of(server)) == ("schema" in form.get("json_schema", {}))


def test_text_as_a_format_bounds_nothing(chat, server):
    chat(response_format={"type": "text"})
    assert server.engine.requests[-1].constraint is None


@pytest.mark.parametrize(("form", "words"), [
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}, "json schema"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
    ({"type": "regex", "pattern": "("}, "regex"), ({"type": "xml"}, "response_format"),
    ({"type": "regex", "pattern": "a" * 5000}, "allowed: up to 4096")])
def test_a_format_that_cannot_be_followed_is_refused(chat, form, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(response_format=form)
