"""Generated text -> message: the inverse of the chat encoder for one assistant turn, strict.

As the released parser reads, except that errors say what was expected where, and that arguments are always JSON.
Users import it from `fathom.text.chat`. Knows nothing of tokens, and repairs nothing.
"""

import json
import re

from fathom.errors import ChatFormatError
from fathom.text.templates import (
    CALL_CLOSE, CALL_OPEN, CALLS_CLOSE, CALLS_OPEN, PARAMETER_CLOSE, PARAMETER_OPEN, THINKING_MODES,
)
from fathom.text.tokenizer import BOS, DSML, EOS, THINK, THINK_END

# Names are written unescaped: each ends at the first place where the format can go on. A call without arguments
# has an empty line where its parameters would be.
CALL_HEADER = re.compile(rf'{CALL_OPEN}((?:(?!{DSML}).)*?)">\n\n?(?=</?{DSML})', re.DOTALL)
PARAMETER_HEADER = re.compile(rf'{PARAMETER_OPEN}((?:(?!{DSML}).)*?)" string="(true|false)">', re.DOTALL)


def parse(text: str, thinking_mode: str = "thinking") -> dict:
    """The assistant message in `text`: role, content, reasoning_content and tool_calls (OpenAI's shape, without ids).

    `text` is what a model writes after the prompt of `encode`, up to the end token or the end of its tool calls.
    ChatFormatError says what was expected at which character.
    """
    if thinking_mode not in THINKING_MODES:
        raise ChatFormatError(f"thinking_mode: expected one of {', '.join(THINKING_MODES)}, got {thinking_mode!r}")
    reader, reasoning, calls = _Reader(text), "", []
    if thinking_mode == "thinking":
        reasoning = reader.prose(THINK_END)
        reader.expect(THINK_END)
    content = reader.prose()
    if reader.accept(CALLS_OPEN):
        reader.expect(">\n")
        calls.append(_parse_call(reader))
        while not reader.accept(CALLS_CLOSE):
            calls.append(_parse_call(reader))
    if not (calls and reader.at == len(text)):
        reader.expect(EOS)
    if reader.at < len(text):
        reader.fail("the end of the text")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _parse_call(reader: "_Reader") -> dict:
    (name,) = reader.match(CALL_HEADER, f'{CALL_OPEN}..."> with parameters')
    arguments: dict[str, str] = {}
    while not reader.accept(CALL_CLOSE + "\n"):
        start = reader.at
        key, is_text = reader.match(PARAMETER_HEADER, f'{PARAMETER_OPEN}..." string="true|false"> or {CALL_CLOSE}')
        if key in arguments:
            reader.fail(f"a new parameter, not {key!r} again,", start)
        start = reader.at
        value = reader.until(PARAMETER_CLOSE)
        reader.expect(PARAMETER_CLOSE + "\n")
        if is_text == "false" and not _is_json(value):
            reader.fail(f"a JSON value of parameter {key!r}", start)
        arguments[key] = json.dumps(value, ensure_ascii=False) if is_text == "true" else value
    written = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in arguments.items())
    return {"type": "function", "function": {"name": name, "arguments": "{" + written + "}"}}


class _Reader:
    """A position in a text that only moves over what was expected there."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def accept(self, literal: str) -> bool:
        found = self.text.startswith(literal, self.at)
        self.at += len(literal) if found else 0
        return found

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            self.fail(repr(literal))

    def match(self, pattern: re.Pattern, expected: str) -> tuple[str, ...]:
        found = pattern.match(self.text, self.at)
        if found is None:
            self.fail(expected)
        self.at = found.end()
        return found.groups()

    def until(self, *stops: str) -> str:
        """The text before the first stop, or all that is left."""
        start = self.at
        found = (self.text.find(stop, start) for stop in stops)
        self.at = min((position for position in found if position >= 0), default=len(self.text))
        return self.text[start:self.at]

    def prose(self, *stops: str) -> str:
        """Reasoning or content: the text before a stop, tool calls or the end token, free of the format's tokens."""
        start = self.at
        prose = self.until(EOS, CALLS_OPEN, *stops)
        for token in (BOS, THINK, THINK_END, DSML):
            if token in prose:
                self.fail(f"no {token} inside the text", start + prose.index(token))
        return prose

    def fail(self, expected: str, at: int | None = None) -> None:
        at = self.at if at is None else at
        found = repr(self.text[at:at + 24]) if at < len(self.text) else "the end"
        raise ChatFormatError(f"generated text, character {at}: expected {expected}, found {found}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=int)  # int() refuses NaN and Infinity, which JSON does not have
    except (ValueError, RecursionError):
        return False
    return True
