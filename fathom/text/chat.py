"""Messages <-> text: the released chat format with thinking, DSML tools, quick instructions and FIM (section 5.1.1).

`segments` is the one program that writes the format; `encode` joins what it yields, `tokenize` turns it into ids in
which special tokens come only from the format itself. `parse` (chat_parse.py) reads an answer back. Knows no model
and no server.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fathom.errors import ChatFormatError
from fathom.text.chat_parse import parse
from fathom.text.templates import (
    CALL_CLOSE, CALL_OPEN, CALLS_CLOSE, CALLS_OPEN, MAX_EFFORT_PROMPT, PARAMETER_CLOSE, PARAMETER_OPEN,
    RESPONSE_FORMAT_PROMPT, RESULT_CLOSE, RESULT_OPEN, THINKING_MODES, TOOLS_PROMPT,
)
from fathom.text.tokenizer import (
    ASSISTANT, BOS, EOS, EXTRACTED_URL, FIM_BEGIN, FIM_END, FIM_HOLE, LATEST_REMINDER, TASKS, THINK, THINK_END, USER,
    Tokenizer,
)

__all__ = ["Segment", "encode", "encode_fim", "fim_segments", "parse", "segments", "tokenize"]

REASONING_EFFORTS = (None, "high", "max")
OPENINGS = {"system": "", "user": USER, "developer": USER, "latest_reminder": LATEST_REMINDER, "assistant": ""}
ROLES = (*OPENINGS, "tool")


class Segment(NamedTuple):
    """A stretch of the encoded text: markup is what the encoder wrote itself, the rest came from the caller."""

    text: str
    markup: bool


class Block(NamedTuple):
    """A part of a turn: text, or the result of the tool call with this id."""

    text: str
    call_id: str | None = None


class Call(NamedTuple):
    """A tool call of an assistant turn."""

    id: str
    name: str
    arguments: dict


@dataclass
class Turn:
    """One checked message; tool messages are user turns whose blocks carry the id of their call."""

    role: str
    blocks: list[Block]
    task: str | None
    reasoning: str
    calls: list[Call]
    open: bool
    schemas: list[str] = field(default_factory=list)
    response_format: str | None = None


def encode(
    messages: list[dict],
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> str:
    """The text a model reads for these OpenAI-style messages, as the released encoder writes it.

    Ends where the model should go on: after a user turn with the assistant's opening, after a last assistant message
    with `prefix: true` in the middle of its text. ChatFormatError names the message and field that cannot be encoded.
    """
    return "".join(text for text, _ in segments(messages, thinking_mode, reasoning_effort, drop_thinking, add_bos))


def tokenize(
    messages: list[dict],
    tokenizer: Tokenizer,
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> list[int]:
    """Token ids of `encode`, where a special token's spelling inside a message stays ordinary text."""
    return tokenizer.encode_segments(segments(messages, thinking_mode, reasoning_effort, drop_thinking, add_bos))


def segments(
    messages: list[dict],
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> list[Segment]:
    """`encode` in pieces that tell the encoder's own markup from text of users, tools and models."""
    _check_choice("thinking_mode", thinking_mode, THINKING_MODES)
    _check_choice("reasoning_effort", reasoning_effort, REASONING_EFFORTS)
    if not isinstance(messages, list):
        raise ChatFormatError(f"messages: expected a list of messages, got {type(messages).__name__}")
    turns = _merge([_read_turn(message, f"messages[{index}]") for index, message in enumerate(messages)])
    for index, message in enumerate(messages):
        if message.get("prefix") and (message["role"] != "assistant" or index + 1 < len(messages)):
            raise ChatFormatError(f"messages[{index}].prefix: only a last message of the assistant can be continued")
    thinking = thinking_mode == "thinking"
    dropping = thinking and drop_thinking and not any(turn.schemas for turn in turns)
    if dropping:  # developer turns before the last user turn go as a whole
        last = _last_user(turns)
        turns = [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= last]
    written = [Segment(BOS, True)] if add_bos else []
    if turns and thinking and reasoning_effort == "max":
        written.append(Segment(MAX_EFFORT_PROMPT, True))
    written += _write(turns, thinking, dropping)
    return [segment for segment in written if segment.text]


def encode_fim(prefix: str, suffix: str) -> str:
    """The fill-in-the-middle prompt: the model continues with what belongs between prefix and suffix. No BOS."""
    return "".join(text for text, _ in fim_segments(prefix, suffix))


def fim_segments(prefix: str, suffix: str) -> list[Segment]:
    """`encode_fim` in pieces, for `Tokenizer.encode_segments`."""
    texts = (FIM_BEGIN, prefix, FIM_HOLE, suffix, FIM_END)
    return [Segment(text, markup=index % 2 == 0) for index, text in enumerate(texts)]


def _write(turns: list[Turn], thinking: bool, dropping: bool) -> Iterator[Segment]:
    last_user = _last_user(turns)
    for index, turn in enumerate(turns):
        following = turns[index + 1] if index + 1 < len(turns) else None
        after_task = index > 0 and turns[index - 1].task is not None
        yield Segment(OPENINGS[turn.role], True)
        if turn.role == "assistant" and thinking and not after_task and (not dropping or index > last_user):
            yield Segment(turn.reasoning, False)
            yield Segment(THINK_END, True)
        yield from _write_blocks(turn)
        if turn.role == "assistant":
            yield from _write_calls(turn.calls)
            yield Segment("" if turn.open else EOS, True)
        elif turn.role in ("system", "developer"):
            yield from _write_instructions(turn)
        if following is not None and following.role not in ("assistant", "latest_reminder"):
            continue
        if turn.task == "action":
            yield Segment(ASSISTANT + (THINK if thinking else THINK_END) + TASKS["action"], True)
        elif turn.task is not None:
            yield Segment(TASKS[turn.task], True)
        elif turn.role in ("user", "developer"):
            thinks = thinking and (not dropping or index >= last_user)
            yield Segment(ASSISTANT + (THINK if thinks else THINK_END), True)


def _write_blocks(turn: Turn) -> Iterator[Segment]:
    for index, block in enumerate(turn.blocks):
        if index:
            yield Segment("\n\n", True)
        if block.call_id is not None:
            yield Segment(RESULT_OPEN, True)
            yield Segment(block.text, False)
            yield Segment(RESULT_CLOSE, True)
        elif turn.task == "read_url":  # the format asks the caller to put this one token before each address
            for number, text in enumerate(block.text.split(EXTRACTED_URL)):
                yield Segment(EXTRACTED_URL if number else "", True)
                yield Segment(text, False)
        else:
            yield Segment(block.text, False)


def _write_instructions(turn: Turn) -> Iterator[Segment]:
    if turn.schemas:
        before, after = TOOLS_PROMPT.split("{tool_schemas}")
        yield Segment("\n\n" + before, True)
        yield Segment("\n".join(turn.schemas), False)
        yield Segment(after, True)
    if turn.response_format is not None:
        yield Segment("\n\n" + RESPONSE_FORMAT_PROMPT, True)
        yield Segment(turn.response_format, False)


def _write_calls(calls: list[Call]) -> Iterator[Segment]:
    for index, call in enumerate(calls):
        yield Segment((CALLS_OPEN + ">\n" if index == 0 else "\n") + CALL_OPEN, True)
        yield Segment(call.name, False)
        yield Segment('">\n', True)
        for number, (name, value) in enumerate(call.arguments.items()):
            is_text = isinstance(value, str)
            yield Segment(("\n" if number else "") + PARAMETER_OPEN, True)
            yield Segment(str(name), False)
            yield Segment(f'" string="{"true" if is_text else "false"}">', True)
            yield Segment(value if is_text else _json(value, f"argument {name!r} of {call.name}"), False)
            yield Segment(PARAMETER_CLOSE, True)
        yield Segment("\n" + CALL_CLOSE, True)
    if calls:
        yield Segment("\n" + CALLS_CLOSE, True)


def _last_user(turns: list[Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _merge(turns: list[Turn]) -> list[Turn]:
    """Join neighbouring user turns and tool results, and put results in the order of the calls they answer.

    As released: a turn with a task takes results but no more text, and a turn that is joined loses its own task.
    """
    merged: list[Turn] = []
    order: dict[str, int] = {}
    for turn in turns:
        previous = merged[-1] if merged else None
        if previous is not None and turn.role == previous.role == "user":
            if previous.task is None or turn.blocks[0].call_id is not None:
                previous.blocks += turn.blocks
                continue
        merged.append(turn)
    for turn in merged:
        if turn.calls:
            order = {call.id: index for index, call in enumerate(turn.calls) if call.id}
        results = [block for block in turn.blocks if block.call_id is not None]
        ordered = iter(sorted(results, key=lambda block: order.get(block.call_id, 0)))
        turn.blocks = [block if block.call_id is None else next(ordered) for block in turn.blocks]
    return merged


def _read_turn(message: dict, where: str) -> Turn:
    if not isinstance(message, dict):
        raise ChatFormatError(f"{where}: expected an object with role and content, got {type(message).__name__}")
    role, task = message.get("role"), message.get("task")
    _check_choice(f"{where}.role", role, ROLES)
    _check_choice(f"{where}.task", task, (None, *TASKS))
    text = _text(message.get("content"), f"{where}.content", lenient=role == "tool")
    if role == "developer" and not text:
        raise ChatFormatError(f"{where}.content: a developer message needs some text")
    if role == "tool":
        call_id = _text(message.get("tool_call_id"), f"{where}.tool_call_id")
        return Turn("user", [Block(text, call_id)], None, "", [], False)
    turn = Turn(role, [Block(text)], task, "", [], False)
    if role == "assistant":
        turn.reasoning = _text(message.get("reasoning_content"), f"{where}.reasoning_content")
        calls = _list(message.get("tool_calls"), f"{where}.tool_calls")
        turn.calls = [_read_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        turn.open = bool(message.get("prefix") or message.get("wo_eos"))
    if role != "user":  # tools of any other message keep reasoning, even where they are not written
        tools = _list(message.get("tools"), f"{where}.tools")
        turn.schemas = [_json(_function(tool, f"{where}.tools[{index}]"), where) for index, tool in enumerate(tools)]
    if message.get("response_format"):
        turn.response_format = _json(message["response_format"], f"{where}.response_format")
    return turn


def _read_call(call: dict, where: str) -> Call:
    function = _function(call, where)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise ChatFormatError(f"{where}.function.name: expected the name of a tool, got {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):  # as released: broken JSON is shown to the model as it is
            arguments = {"arguments": arguments}
    if not isinstance(arguments, dict):
        raise ChatFormatError(f"{where}.function.arguments: expected a JSON object, got {type(arguments).__name__}")
    return Call(_text(call.get("id") or function.get("id"), f"{where}.id"), name, arguments)


def _function(entry: dict, where: str) -> dict:
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(function, dict):
        raise ChatFormatError(f'{where}: expected {{"type": "function", "function": {{...}}}}')
    return function


def _text(value: str | list | None, where: str, lenient: bool = False) -> str:
    """Text, none, or a list of text parts as one string; `lenient` names parts of other types instead of refusing."""
    if value is None or isinstance(value, str):
        return value or ""
    parts = []
    for index, part in enumerate(_list(value, where)):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text", ""), str):
            parts.append(part.get("text", ""))
        elif lenient:
            parts.append(f"[Unsupported {kind}]")
        else:
            raise ChatFormatError(f"{where}[{index}]: only text parts can be encoded, got type {kind!r}")
    return "\n\n".join(parts)


def _list(value: list | None, where: str) -> list:
    if value is not None and not isinstance(value, list):
        raise ChatFormatError(f"{where}: expected a list, got {type(value).__name__}")
    return value or []


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatFormatError(f"{where}: cannot be written as JSON: {error}") from error


def _check_choice(where: str, value: object, choices: tuple) -> None:
    if value not in choices:
        names = ", ".join("none" if choice is None else choice for choice in choices)
        raise ChatFormatError(f"{where}: expected one of {names}, got {value!r}")
