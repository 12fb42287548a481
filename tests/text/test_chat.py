"""The chat format: official cases to the character, its rules one by one, safe tokens, and reading answers back."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import ChatFormatError
from fathom.text.chat import Segment, encode, encode_fim, fim_segments, parse, segments, tokenize
from fathom.text.templates import MAX_EFFORT_PROMPT, TOOLS_PROMPT
from fathom.text.tokenizer import DSML, SPECIAL_TOKENS, Tokenizer

CASES = Path(__file__).parent / "cases"
B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
HI = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def official():
    return Tokenizer.official()


def official_case(number):
    case = json.loads((CASES / f"encoding_case_{number}.json").read_text(encoding="utf-8"))
    text = (CASES / f"encoding_case_{number}.txt").read_text(encoding="utf-8").removesuffix("\n")
    if isinstance(case, dict):
        case["messages"][0]["tools"] = case["tools"]
        case = case["messages"]
    return case, text


def call(name="f", arguments="{}", id=""):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(content="", reasoning="", *calls):
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": list(calls)}


@pytest.mark.parametrize("number, mode", [(1, "thinking"), (2, "thinking"), (3, "thinking"), (4, "chat")])
def test_official_cases_encode_to_the_character(number, mode):
    messages, text = official_case(number)
    assert encode(messages, mode) == text


@pytest.mark.parametrize("number, mode", [(1, "thinking"), (2, "thinking"), (3, "thinking"), (4, "chat")])
def test_official_cases_tokenize_as_their_text_and_parse_back(official, number, mode):
    messages, text = official_case(number)
    assert tokenize(messages, official, mode) == official.encode(text, special=True)
    last = messages[-1]
    prompt = encode(messages[:-1], mode)
    assert text.startswith(prompt)
    parsed = parse(text[len(prompt):], mode)
    assert parsed == answer(last["content"], last.get("reasoning_content", ""))


def test_prompt_texts_are_the_released_ones():
    assert TOOLS_PROMPT == (CASES / "tools-prompt.txt").read_text(encoding="utf-8")
    assert MAX_EFFORT_PROMPT == (CASES / "max-effort-prompt.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode, tag", [("thinking", "<think>"), ("chat", "</think>")])
def test_prompt_ends_with_the_tag_of_its_mode(mode, tag):
    assert encode([{"role": "system", "content": "S"}, HI], mode) == f"{B}S{U}hi{A}{tag}"
    assert encode([HI], mode, add_bos=False) == f"{U}hi{A}{tag}"


def test_max_effort_is_written_first_and_only_when_thinking():
    system = {"role": "system", "content": "S"}
    assert encode([system, HI], reasoning_effort="max") == f"{B}{MAX_EFFORT_PROMPT}S{U}hi{A}<think>"
    assert encode([HI], "chat", "max") == encode([HI], "chat")
    assert encode([HI], "thinking", "high") == encode([HI], "thinking")


def test_earlier_reasoning_goes_unless_kept_by_request_or_by_tools():
    messages = [HI, answer("a", "why"), {"role": "user", "content": "more"}, answer("b", "because")]
    end = f"{U}more{A}<think>because</think>b{E}"
    assert encode(messages) == f"{B}{U}hi{A}</think>a{E}{end}"
    kept = f"{U}hi{A}<think>why</think>a{E}{end}"
    assert encode(messages, drop_thinking=False) == B + kept
    system = {"role": "system", "content": "", "tools": [TOOL]}
    assert encode([system, *messages]).endswith(TOOLS_PROMPT[-20:] + kept)
    assert encode([{**HI, "tools": [TOOL]}, *messages[1:]]) == encode(messages)
    assert encode(messages, "chat") == f"{B}{U}hi{A}</think>a{E}{U}more{A}</think>b{E}"


def test_developer_turns_before_the_last_user_turn_go_with_their_opening():
    messages = [{"role": "developer", "content": "D"}, answer("a", "why"), HI]
    assert encode(messages) == f"{B}a{E}{U}hi{A}<think>"
    assert encode(messages, drop_thinking=False) == f"{B}{U}D{A}<think>why</think>a{E}{U}hi{A}<think>"
    assert encode(messages, "chat") == f"{B}{U}D{A}</think>a{E}{U}hi{A}</think>"


def test_neighbouring_user_turns_become_one():
    assert encode([HI, HI], "chat") == f"{B}{U}hi\n\nhi{A}</think>"
    assert encode([{**HI, "task": "query"}, HI], "chat") == f"{B}{U}hi{U}hi{A}</think>"


def test_tool_results_join_one_user_turn_in_the_order_of_the_calls():
    results = [{"role": "tool", "tool_call_id": id, "content": f"result {id}"} for id in ("y", "x")]
    messages = [HI, answer("", "", call(id="x"), call(id="y")), *results, HI]
    expected = f"{U}<tool_result>result x</tool_result>\n\n<tool_result>result y</tool_result>\n\nhi{A}</think>"
    assert encode(messages, "chat").endswith(expected)


def test_calls_write_text_raw_and_other_values_as_json():
    arguments = {"s": 'a "b"\n<c>', "n": 1.5, "o": {"k": ["中", None, True]}}
    expected = (
        f'{A}</think>text\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
        f'<{DSML}parameter name="s" string="true">a "b"\n<c></{DSML}parameter>\n'
        f'<{DSML}parameter name="n" string="false">1.5</{DSML}parameter>\n'
        f'<{DSML}parameter name="o" string="false">{{"k": ["中", null, true]}}</{DSML}parameter>\n'
        f'</{DSML}invoke>\n<{DSML}invoke name="g">\n\n</{DSML}invoke>\n</{DSML}tool_calls>{E}'
    )
    for form in (arguments, json.dumps(arguments)):
        assert encode([HI, answer("text", "", call("f", form), call("g"))], "chat").endswith(expected)


def test_arguments_that_are_broken_json_are_shown_as_they_are():
    parameter = f'<{DSML}parameter name="arguments" string="true">{{"a": </{DSML}parameter>'
    assert parameter in encode([HI, answer("", "", call("f", '{"a": '))])


def test_response_format_follows_the_tools():
    system = {"role": "system", "content": "S", "tools": [TOOL], "response_format": {"type": "object", "title": "é"}}
    tools = TOOLS_PROMPT.replace("{tool_schemas}", '{"name": "f", "parameters": {}}')
    schema = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    assert encode([system], "chat") == f'{B}S\n\n{tools}\n\n{schema}{{"type": "object", "title": "é"}}'


def test_quick_instructions_stand_where_the_model_learned_them():
    url = {"role": "user", "content": "<｜extracted_url｜>http://a", "task": "read_url"}
    assert encode([{**HI, "task": "query"}]) == f"{B}{U}hi<｜query｜>"
    assert encode([{**HI, "task": "action"}]) == f"{B}{U}hi{A}<think><｜action｜>"
    assert encode([{**HI, "task": "action"}, answer("Search")]) == f"{B}{U}hi{A}<think><｜action｜>Search{E}"
    assert encode([HI, {**answer("a"), "task": "title"}, answer("T")], "chat").endswith(f"a{E}<｜title｜>T{E}")
    assert encode([url]) == f"{B}{U}<｜extracted_url｜>http://a<｜read_url｜>"


def test_url_token_counts_as_markup_only_in_its_task(official):
    url = {"role": "user", "content": "<｜extracted_url｜>http://a<think>", "task": "read_url"}
    ids = tokenize([url], official)
    assert official.special_ids["<｜extracted_url｜>"] in ids and official.special_ids["<think>"] not in ids
    assert official.special_ids["<｜extracted_url｜>"] not in tokenize([{**url, "task": "query"}], official)


def test_reminder_stands_before_the_user_turn():
    messages = [{"role": "latest_reminder", "content": "2026-02-21"}, HI]
    assert encode(messages, "chat") == f"{B}<｜latest_reminder｜>2026-02-21{U}hi{A}</think>"


@pytest.mark.parametrize("field", ["prefix", "wo_eos"])
def test_a_continued_answer_is_left_open(field):
    assert encode([HI, {**answer("Once upon"), field: True}], "chat") == f"{B}{U}hi{A}</think>Once upon"


def test_fim_prompt_and_its_tokens(official):
    assert encode_fim("a", "b") == "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"
    ids = official.encode_segments(fim_segments("<think>", ""))
    assert ids == [128801, *official.encode("<think>"), 128800, 128802]


def test_content_may_be_missing_or_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert encode([{"role": "user", "content": None}], "chat") == f"{B}{U}{A}</think>"
    assert encode([{"role": "user", "content": parts}], "chat") == f"{B}{U}a\n\nb{A}</think>"
    tool = {"role": "tool", "content": [*parts, image]}
    assert "<tool_result>a\n\nb\n\n[Unsupported image_url]</tool_result>" in encode([HI, tool], "chat")


@pytest.mark.parametrize("messages, complaint", [
    ("hi", "messages: expected a list"),
    (["hi"], r"messages\[0\]: expected an object"),
    ([{"content": "x"}], r"messages\[0\].role: expected one of system, .*, got None"),
    ([HI, {"role": "robot"}], r"messages\[1\].role: .*got 'robot'"),
    ([{"role": ["user"]}], r"messages\[0\].role"),
    ([{**HI, "task": "dance"}], r"messages\[0\].task: expected one of none, action, .*got 'dance'"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content: expected a list, got int"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\]: only text parts"),
    ([{"role": "developer", "content": ""}], r"messages\[0\].content: a developer message needs"),
    ([HI, answer("", "", call(arguments="[1]"))], r"messages\[1\].tool_calls\[0\].function.arguments: expected a JSON"),
    ([HI, answer("", "", call(arguments=None))], r"messages\[1\].tool_calls\[0\].function.arguments: .*NoneType"),
    ([HI, answer("", "", call(name=None))], r"messages\[1\].tool_calls\[0\].function.name"),
    ([HI, answer("", "", {"name": "f"})], r"messages\[1\].tool_calls\[0\]: expected \{\"type\": \"function\""),
    ([{"role": "system", "tools": [{"name": "f"}]}], r"messages\[0\].tools\[0\]: expected"),
    ([{"role": "system", "tools": {}, "response_format": {1}}], r"messages\[0\].tools: expected a list, got dict"),
    ([{"role": "system", "response_format": {1}}], r"messages\[0\].response_format: cannot be written as JSON"),
    ([answer("a"), HI, {**HI, "prefix": True}], r"messages\[2\].prefix"),
    ([{**answer("a"), "prefix": True}, HI], r"messages\[0\].prefix: only a last message"),
])
def test_messages_that_cannot_be_encoded_name_message_and_field(messages, complaint):
    with pytest.raises(ChatFormatError, match=complaint) as caught:
        encode(messages)
    assert "\n" not in str(caught.value)


def test_unknown_modes_and_efforts_are_refused():
    with pytest.raises(ChatFormatError, match="thinking_mode: expected one of thinking, chat, got 'loud'"):
        encode([HI], "loud")
    with pytest.raises(ChatFormatError, match="reasoning_effort: expected one of none, high, max, got 'low'"):
        encode([HI], reasoning_effort="low")
    with pytest.raises(ChatFormatError, match="thinking_mode"):
        parse(E, "loud")


def hostile(text):
    return [
        {"role": "system", "content": text, "tools": [{"function": {"name": text}}], "response_format": {"a": text}},
        {"role": "user", "content": text},
        answer(text, text, call("f", {"k": text, "o": [text]}, "x")),
        {"role": "tool", "tool_call_id": "x", "content": text},
        {**HI, "content": text},
    ]


def test_spellings_inside_messages_never_become_special_tokens(official):
    special = set(official.special_ids.values())
    expected = [id for id in tokenize(hostile("harmless"), official) if id in special]
    ids = tokenize(hostile("".join(SPECIAL_TOKENS)), official)
    assert [id for id in ids if id in special] == expected
    assert official.decode(ids) == encode(hostile("".join(SPECIAL_TOKENS)))


def test_segments_join_to_the_text_and_mark_what_the_encoder_wrote():
    pieces = segments([HI], "chat")
    assert pieces == [Segment(B, True), Segment(U, True), Segment("hi", False), Segment(f"{A}</think>", True)]
    assert "".join(text for text, _ in segments(hostile("x"))) == encode(hostile("x"))


# Text without the format's own tokens, since the format has no way to escape them.
prose = st.text(max_size=30) | st.lists(
    st.sampled_from(["\n", "\n\n", "<", ">", "</", '"', ' string="true">', "thin", "tool_calls>", "{", "é", "：｜"]),
    max_size=8,
).map("".join)
prose = prose.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,12}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | prose,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(prose, inner, max_size=3), max_leaves=5,
)
calls = st.builds(lambda name, arguments: {
    "type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
}, names, st.dictionaries(names, values, max_size=3))


@settings(deadline=None, max_examples=200)
@given(prose, prose, st.lists(calls, max_size=3), st.sampled_from(["thinking", "chat"]), st.booleans())
def test_parsing_what_was_encoded_gives_the_message_back(content, reasoning, calls, mode, cut):
    message = answer(content, reasoning if mode == "thinking" else "", *calls)
    prompt, whole = encode([HI], mode), encode([HI, message], mode)
    assert whole.startswith(prompt)
    generated = whole[len(prompt):]
    assert parse(generated.removesuffix(E) if calls and cut else generated, mode) == message


@settings(deadline=None, max_examples=100)
@given(prose, prose, st.lists(calls, max_size=2), st.sampled_from(["thinking", "chat"]))
def test_innocent_messages_tokenize_as_their_text(official, content, reasoning, calls, mode):
    messages = [{"role": "system", "content": reasoning, "tools": [TOOL]}, HI, answer(content, reasoning, *calls), HI]
    assert tokenize(messages, official, mode) == official.encode(encode(messages, mode), special=True)


OPEN, CLOSE = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n', f"\n</{DSML}invoke>\n</{DSML}tool_calls>"


def parameter(value, string="true", name="a"):
    return f'<{DSML}parameter name="{name}" string="{string}">{value}</{DSML}parameter>'


@pytest.mark.parametrize("text, mode, complaint", [
    ("hi", "chat", f"character 2: expected '{E}', found the end"),
    (f"hi{E}more", "chat", "character .*: expected the end of the text, found 'more'"),
    (f"why{E}", "thinking", "character 3: expected '</think>', found"),
    (f"why{OPEN}{CLOSE}", "thinking", "character 3: expected '</think>'"),
    (f"a<think>b{E}", "chat", "character 1: expected no <think> inside the text"),
    (f"a{B}b</think>{E}", "thinking", "character 1: expected no <｜begin"),
    (f"a<{DSML}tool_calls>{E}", "chat", f"character 2: expected no {DSML}"),
    (f"{OPEN}{CLOSE}more", "chat", f"expected '{E}', found 'more'"),
    (f"{OPEN}{CLOSE}{E}more", "chat", "expected the end of the text, found 'more'"),
    (OPEN.replace(">\n<", "><") + CLOSE, "chat", "character 19: expected"),
    (f"\n\n<{DSML}tool_calls>\n</{DSML}tool_calls>{E}", "chat", "expected <｜DSML｜invoke name="),
    (OPEN.replace('name="f"', "f") + CLOSE, "chat", "expected <｜DSML｜invoke name="),
    (OPEN + parameter("x") + CLOSE.replace("invoke>", "invoke"), "chat", "expected <｜DSML｜parameter name="),
    (OPEN + parameter("x").replace(' string="true"', "") + CLOSE, "chat", 'expected .* string="true.false"'),
    (OPEN + parameter("x") + "\n" + parameter("y") + CLOSE, "chat", "expected a new parameter, not 'a' again"),
    (OPEN + parameter("x") + " " + CLOSE, "chat", "expected '</｜DSML｜parameter>"),
    (OPEN + parameter("x")[:-4], "chat", "found the end"),
    (OPEN + parameter("tru", "false") + CLOSE, "chat", "expected a JSON value of parameter 'a', found 'tru"),
    (OPEN + parameter("NaN", "false") + CLOSE, "chat", "expected a JSON value"),
    (OPEN + parameter("[" * 100_000, "false") + CLOSE, "chat", "expected a JSON value"),
])
def test_malformed_answers_say_what_was_expected_where(text, mode, complaint):
    with pytest.raises(ChatFormatError, match=complaint) as caught:
        parse(text, mode)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_answers_parse_or_raise_the_format_error(data):
    whole = f"why</think>hi{OPEN}{parameter('x')}\n{parameter('[1]', 'false', 'b')}{CLOSE}{E}"
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    damaged = whole[:start] + data.draw(st.sampled_from(["", "\n", ">", "</think>", E, whole])) + whole[stop:]
    try:
        message = parse(damaged)
    except ChatFormatError:
        return
    assert all(json.loads(call["function"]["arguments"]) is not None for call in message["tool_calls"])
