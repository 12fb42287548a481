"""Answers read as a stream: as one piece however they are cut, as `parse` where that accepts them, always in linear time."""

import itertools
import json
import random
import time
from typing import NamedTuple

import pytest

from fathom.errors import ChatFormatError
from fathom.text.chat import encode, parse
from fathom.text.chat_stream import AnswerStream, Content, Reasoning, ToolCall, gather, read_answer
from fathom.text.templates import CALL_CLOSE, CALLS_CLOSE, CALLS_OPEN, PARAMETER_CLOSE
from fathom.text.tokenizer import BOS, DSML, EOS, THINK, THINK_END

HI = {"role": "user", "content": "hi"}
BLOCK_OPEN, BLOCK_CLOSE = CALLS_OPEN + ">", "\n" + CALLS_CLOSE
IN_NAME = BLOCK_OPEN + f'\n<{DSML}invoke name="'
IN_KEY = IN_NAME + f'f">\n<{DSML}parameter name="'
IN_VALUE = IN_KEY + 'a" string="true">'


class Case(NamedTuple):
    text: str
    thinking: bool
    tools: bool = True


# ---- the texts: valid answers, damaged ones, and heaps of markup

NEAR_MARKUP = (
    "</thin", "</", "<", "<t", "\n", "\n\n", "\n\n<", "\n\n<｜DSM", f"<{DSML[:-1]}", "<|DSML", "｜", "</invoke>", '">\n', "tool_calls>",
    EOS[:-1], "k>", '" string="true">', "/")
WORDS = ("so", " it is ", "é", "中文", "🙂", "a < b", "<b>", "{}", '"', "\r\n", "\u2028", "")
MARKUP = (
    THINK, THINK_END, DSML, BOS, EOS, BLOCK_OPEN, CALLS_OPEN, BLOCK_CLOSE, f'\n<{DSML}invoke name="', f'\n</{DSML}invoke>',
    f'\n<{DSML}parameter name="', PARAMETER_CLOSE, f'">\n\n</{DSML}invoke>', f'\n<{DSML}invoke name="f">\n\n</{DSML}invoke>',
    f'{BLOCK_OPEN}\n<{DSML}invoke name="g">\n\n</{DSML}invoke>')


def some(draw: random.Random, choices: tuple[str, ...], most: int) -> str:
    return "".join(draw.choice(choices) for _ in range(draw.randint(0, most)))


def prose(draw: random.Random) -> str:
    while True:
        text = some(draw, WORDS + NEAR_MARKUP, 6)
        if not any(token in text for token in (BOS, EOS, THINK, THINK_END, DSML)):
            return text


def a_call(draw: random.Random) -> dict:
    arguments = {}
    for _ in range(draw.choice((0, 1, 1, 2))):
        value = some(draw, WORDS + NEAR_MARKUP + MARKUP, 3).replace(PARAMETER_CLOSE, "")
        arguments[draw.choice(("a", "路", 'k"', ""))] = draw.choice((value, value, 1.5, [None, {"x": "\n"}], True))
    function = {"name": draw.choice(("f", "get_x", 'g">', "名")), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"type": "function", "function": function}


def valid_case(draw: random.Random) -> Case:
    mode = draw.choice(("thinking", "chat"))
    answer = {"role": "assistant", "content": prose(draw), "reasoning_content": prose(draw) if mode == "thinking" else "",
              "tool_calls": [a_call(draw) for _ in range(draw.choice((0, 1, 1, 2)))]}
    text = encode([HI, answer], mode).removeprefix(encode([HI], mode))
    assert parse(text, mode) == answer
    return Case(text.removesuffix(EOS) if answer["tool_calls"] and draw.random() < 0.3 else text, mode == "thinking")


def other_case(draw: random.Random) -> Case:
    thinking, tools = draw.random() < 0.5, draw.random() < 0.9
    if draw.random() < 0.2:
        return Case(some(draw, MARKUP + NEAR_MARKUP + WORDS, 9), thinking, tools)
    text, by_thinking, _ = valid_case(draw)
    for _ in range(draw.randint(1, 2)):
        start, stop = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
        kind = draw.random()
        if kind < 0.3:
            text = text[:stop]
        elif kind < 0.6:
            text = text[:start] + text[min(stop, start + draw.randint(1, 12)):]
        else:
            text = text[:start] + draw.choice(MARKUP + NEAR_MARKUP + WORDS) + text[start:]
    return Case(text, by_thinking if draw.random() < 0.9 else thinking, tools)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    draw = random.Random(5)
    return [valid_case(draw) if index % 5 < 2 else other_case(draw) for index in range(2000)]


# ---- what they mean

def strictly(case: Case) -> dict | None:
    """The message by `parse`, which wants the end token; None where the text is not valid."""
    for text in (case.text, case.text + EOS):
        try:
            return parse(text, "thinking" if case.thinking else "chat")
        except ChatFormatError:
            pass
    return None


def by_definition(case: Case) -> dict:
    """What the stream should read: the longest start of a calls block that `parse` accepts once it is closed."""
    text, reasoning, calls = case.text.removesuffix(EOS), "", []
    if case.thinking:
        ends = [text.find(tag) for tag in (THINK_END, *[BLOCK_OPEN] * case.tools)]
        end = min((position for position in ends if position >= 0), default=len(text))
        reasoning, text = text[:end], text[end:].removeprefix(THINK_END)
    content, block = text, ""
    if case.tools and BLOCK_OPEN in text:
        start = text.index(BLOCK_OPEN)
        content, block = text[:start], text[start:]
    stop = 0
    for at in range(len(block) + 1):
        if block.endswith(CALL_CLOSE, 0, at):
            try:
                calls, stop = parse(block[:at] + BLOCK_CLOSE, "chat")["tool_calls"], at
            except ChatFormatError:
                pass
    rest = block[stop:]
    if calls:
        rest = "" if BLOCK_CLOSE.startswith(rest) else rest.removeprefix(BLOCK_CLOSE)
    return {"role": "assistant", "content": content + rest, "reasoning_content": reasoning, "tool_calls": calls}


def stream(case: Case, pieces) -> list:
    reader = AnswerStream(case.thinking, case.tools)
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    assert reader.calls == [event for event in events if isinstance(event, ToolCall)]
    return events


def whole(case: Case) -> dict:
    return read_answer(case.text, case.thinking, case.tools)


# ---- the properties

def test_the_texts_are_of_every_kind(cases):
    read = [(case, strictly(case), whole(case)) for case in cases]
    valid = [message for case, message, _ in read if message is not None]
    broken = [(case, message) for case, strict, message in read if strict is None and case.tools]
    assert len(valid) >= 900 and sum(bool(message["tool_calls"]) for message in valid) >= 500
    assert len(broken) >= 500
    assert sum(bool(message["tool_calls"]) and DSML in message["content"] for _, message in broken) >= 50
    assert sum(not message["tool_calls"] and DSML in message["content"] for _, message in broken) >= 150
    assert sum(THINK_END not in case.text and case.thinking for case, _ in broken) >= 50


def test_valid_texts_give_what_the_strict_parser_gives_and_no_markup(cases):
    for case in cases:
        expected = strictly(case)
        if expected is not None and case.tools:
            message = whole(case)
            assert message == expected == whole(case._replace(text=case.text.removesuffix(EOS))), case
            assert not any(tag in message["content"] + message["reasoning_content"] for tag in (DSML, THINK_END, EOS)), case


def test_any_text_gives_its_valid_calls_and_the_rest_as_it_stands(cases):
    for case in cases:
        assert whole(case) == by_definition(case), case


def test_every_cut_into_two_pieces_gives_the_same(cases):
    for case in cases:
        expected = whole(case)
        for cut in range(len(case.text) + 1):
            assert gather(stream(case, (case.text[:cut], case.text[cut:]))) == expected, (case, cut)


def test_single_characters_and_random_cuts_give_the_same(cases):
    draw = random.Random(6)
    for case in cases:
        expected = whole(case)
        for longest in (1, 3, 12, 40):
            pieces, at = [], 0
            while at < len(case.text):
                size = draw.randint(min(longest - 1, 1), longest) if longest > 1 else 1
                pieces.append(case.text[at:at + size])
                at += size
            events = stream(case, [*pieces, ""])
            assert gather(events) == expected, (case, pieces)
            assert all(isinstance(event, ToolCall) or event.text for event in events)


def test_events_come_in_the_order_of_the_text(cases):
    for case in cases:
        kinds = [type(event) for event in stream(case, case.text)]
        calls = [index for index, kind in enumerate(kinds) if kind is ToolCall]
        assert Reasoning not in kinds[kinds.count(Reasoning):]
        assert calls == list(range(calls[0], calls[0] + len(calls))) if calls else True


# ---- single rules

def call(name="f", *parameters):
    return f'\n<{DSML}invoke name="{name}">\n' + "\n".join(parameters) + f"\n</{DSML}invoke>"


def parameter(value, string="true", name="a"):
    return f'<{DSML}parameter name="{name}" string="{string}">{value}</{DSML}parameter>'


GOOD, TWICE = call("f", parameter("x")), call("g", parameter("x"), parameter("y"))


@pytest.mark.parametrize("rest", [
    call("g", parameter("tru", "false")),  # not JSON
    TWICE,  # one key twice
    call("g", parameter("x"))[:-1],
    call("g", parameter("x")).replace(' string="true"', ""),
    call("g", parameter("x") + " "),
    call("g", f"<{DSML}argument>"),
    call("g", parameter("[" * 100_000, "false")),
    "\n" + call("g"),  # an empty line between calls
    "\nnonsense", f"\n</{DSML}tool_call>", f"\n</{DSML}tool_calls", "\n<", THINK_END + "then"], ids=itertools.count())
def test_after_a_break_of_the_format_all_is_content_and_earlier_calls_stay(rest):
    rest += BLOCK_CLOSE + " and" + BLOCK_OPEN + GOOD + BLOCK_CLOSE
    assert read_answer(f"why</think>hi{BLOCK_OPEN}{rest}", True) == {
        "role": "assistant", "reasoning_content": "why", "content": f"hi{BLOCK_OPEN}{rest}", "tool_calls": []}
    message = read_answer(f"hi{BLOCK_OPEN}{GOOD}{rest}", False)
    assert message["content"] == "hi" + rest
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}]


@pytest.mark.parametrize("broken", [
    BLOCK_OPEN + "nonsense", IN_NAME + f"f<{DSML}", IN_NAME + f'f">\n<{DSML}argument', IN_KEY + f"a</{DSML}",
    IN_VALUE + PARAMETER_CLOSE + "nonsense", BLOCK_OPEN + TWICE])
def test_a_break_of_the_format_is_noticed_where_it_is(broken):
    reader = AnswerStream(thinking=False)
    assert gather(reader.push(broken))["content"] == broken
    assert reader.push("\n\nmore") == [Content("\n\nmore")]


def test_a_call_is_given_out_with_the_last_character_of_its_element():
    reader = AnswerStream(thinking=False)
    assert reader.push(BLOCK_OPEN + GOOD[:-1]) == []
    assert reader.push(">") == [ToolCall(0, "f", '{"a": "x"}')]
    assert reader.push(call("g", parameter('{"k": [1]}', "false")) + "\n</") == [ToolCall(1, "g", '{"a": {"k": [1]}}')]
    assert reader.finish() == [] and [made.name for made in reader.calls] == ["f", "g"]


@pytest.mark.parametrize("cut", range(len(BLOCK_CLOSE) + 1))
def test_a_cut_off_end_of_a_block_is_no_content(cut):
    assert read_answer(BLOCK_OPEN + GOOD + BLOCK_CLOSE[:cut], False)["content"] == ""


def test_text_is_given_out_at_once_unless_it_may_start_a_tag():
    reader = AnswerStream(thinking=True)
    assert reader.push("so </b> it\n") == [Reasoning("so </b> it")]
    assert reader.push("</thin") == [Reasoning("\n")]
    assert reader.push("g</think") == [Reasoning("</thing")] and reader.reasoning_open
    assert reader.push(">") == [] and not reader.reasoning_open
    assert [*map(type, reader.push("a </thin\n\n"))] == [Content]
    assert reader.push(f"<{DSML}tool_call") == []
    assert reader.push("ed") == [Content(f"\n\n<{DSML}tool_called")]
    assert reader.push("x" + EOS[:5]) == [Content("x")] and reader.finish() == [Content(EOS[:5])]


def test_one_piece_may_hold_reasoning_content_and_calls():
    reader = AnswerStream(thinking=True)
    events = reader.push(f"why</think>hi{BLOCK_OPEN}{GOOD}{BLOCK_CLOSE}bye")
    assert events == [("why",), ("hi",), (0, "f", '{"a": "x"}'), ("bye",)]
    assert [*map(type, events)] == [Reasoning, Content, ToolCall, Content]


@pytest.mark.parametrize("text, reasoning, content", [
    ("why", "why", ""),
    ("why</think", "why</think", ""),
    ("why" + EOS, "why", ""),
    ("why" + BLOCK_OPEN + GOOD + BLOCK_CLOSE, "why", ""),
    (f"why{BLOCK_OPEN}</think>hi", "why", f"{BLOCK_OPEN}</think>hi"),
    (f"why{BLOCK_OPEN[:-1]}", f"why{BLOCK_OPEN[:-1]}", ""),
    (f"<think>why<{DSML}tool_calls>", f"<think>why<{DSML}tool_calls>", ""),  # no blank line, no block
    ("</think></think>", "", "</think>")])
def test_reasoning_ends_at_its_tag_or_at_a_calls_block(text, reasoning, content):
    reader = AnswerStream(thinking=True)
    message = gather([*reader.push(text), *reader.finish()])
    assert (message["reasoning_content"], message["content"]) == (reasoning, content)
    assert reader.reasoning_open == (text.removesuffix(EOS) == reasoning)


def test_a_second_block_is_content():
    second = "more" + BLOCK_OPEN + GOOD + BLOCK_CLOSE
    message = read_answer(BLOCK_OPEN + GOOD + BLOCK_CLOSE + second, False)
    assert message["content"] == second and len(message["tool_calls"]) == 1


def test_without_tools_a_block_is_ordinary_text():
    block = BLOCK_OPEN + GOOD + BLOCK_CLOSE
    assert gather(stream(Case("a" + block + "b", False, False), ["a" + block + "b"]))["content"] == "a" + block + "b"
    message = read_answer(f"why{block}</think>{block}", True, tools=False)
    assert (message["reasoning_content"], message["content"], message["tool_calls"]) == ("why" + block, block, [])


@pytest.mark.parametrize("text, content", [
    ("hi" + EOS, "hi"), (EOS, ""), (f"a{EOS}b", f"a{EOS}b"), (EOS * 2, EOS), (EOS[:-1], EOS[:-1]),
    (BLOCK_OPEN + EOS, BLOCK_OPEN), (BLOCK_OPEN + GOOD + BLOCK_CLOSE + EOS, "")])
def test_the_end_token_is_dropped_only_at_the_very_end(text, content):
    for pieces in ([text], text):
        assert gather(stream(Case(text, False), pieces))["content"] == content


def test_an_end_token_in_a_value_belongs_to_the_value():
    message = read_answer(BLOCK_OPEN + call("f", parameter("a" + EOS)) + BLOCK_CLOSE, False)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "a" + EOS}


def test_an_empty_text_is_an_empty_answer():
    for thinking in (False, True):
        reader = AnswerStream(thinking)
        assert reader.push("") == reader.finish() == reader.finish() == reader.calls == []
        assert reader.reasoning_open == thinking


# ---- linear time

def growth(text: str, size: int) -> float:
    """CPU seconds for the text in pieces of `size`, against those for its first quarter."""
    def seconds(part: str) -> float:
        start = time.process_time()
        reader = AnswerStream(thinking=True)
        for at in range(0, len(part), size):
            reader.push(part[at:at + size])
        reader.finish()
        return time.process_time() - start

    tries = 3 if size > 1 else 1  # whole pieces take milliseconds
    quarter, full = (min(seconds(part) for _ in range(tries)) for part in (text[:len(text) // 4], text))
    return full / quarter


@pytest.mark.parametrize("start, filler", [("", "<"), (IN_VALUE, "x"), (IN_VALUE, f"\n</{DSML}"), (IN_NAME, '">')])
def test_a_million_single_characters_take_linear_time(start, filler):
    text = start + filler * (1_000_000 // len(filler))
    assert growth(text, 1) < 9  # four times the text; quadratic time would be 16 times


@pytest.mark.parametrize("start, filler", [
    ("", "<"), (THINK_END, "<"), ("", "\n\n<"), (THINK_END, "\n\n<"), ("", "</think"), ("", EOS), (IN_NAME, '">\n'),
    (IN_KEY, '" string="'), (IN_VALUE, "x"), (IN_VALUE, f"</{DSML}param"), (IN_NAME + 'f">', "\n" + parameter("")),
    (BLOCK_OPEN, GOOD), (BLOCK_OPEN, call("f")), (BLOCK_OPEN + GOOD + BLOCK_CLOSE, BLOCK_OPEN)])
def test_a_million_characters_at_once_take_linear_time(start, filler):
    text = start + filler * (1_000_000 // len(filler))
    assert growth(text, len(text)) < 9
