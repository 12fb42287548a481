"""Generated text -> message while it is being written: `parse` as a stream, lenient where `parse` is strict.

For every text that `parse` accepts, the events add up to its message, however the text is cut into pieces. Any other text
is read as far as it follows the format, and the rest of it is handed out as it stands:

- Reasoning ends at the first `</think>`, or where a calls block opens: blank line and `<｜DSML｜tool_calls>`. Without
  either, all of the text is reasoning. Any other special token in reasoning or content is ordinary text.
- A call is given out as soon as its invoke element is closed and valid. Where a calls block breaks the format, or the text
  ends inside it, everything after its last valid call is content, to the end of the text; without a valid call that
  starts with the block's blank line. Of a block whose last tag is cut off right after a valid call, the cut tag is dropped.
- What follows a complete calls block is content, further blocks included: an answer has one.
- The end token's spelling is dropped at the very end of the text. Anywhere else it is ordinary text: the engine knows
  the end token by its id, so it was spelled by other tokens.

Time is linear in the text however it is cut. Outside a calls block only what may be the start of a tag is held back.
"""

import re
from collections.abc import Callable, Generator, Iterable
from functools import cache
from typing import NamedTuple

from fathom.errors import ChatFormatError
from fathom.text.chat_parse import parse
from fathom.text.templates import CALL_CLOSE, CALL_OPEN, CALLS_CLOSE, CALLS_OPEN, PARAMETER_CLOSE, PARAMETER_OPEN
from fathom.text.tokenizer import DSML, EOS, THINK_END

# Tags with the whitespace that the format demands around them. A name or key has no DSML token before its end.
BLOCK_OPEN, BLOCK_CLOSE = CALLS_OPEN + ">", "\n" + CALLS_CLOSE
NEXT_CALL, NEXT_PARAMETER, CLOSE_OF_CALL = "\n" + CALL_OPEN, "\n" + PARAMETER_OPEN, "\n" + CALL_CLOSE
NAME_ENDS = tuple(f'">{blank}{tag}' for blank in ("", "\n") for tag in (NEXT_PARAMETER, CLOSE_OF_CALL))
KEY_ENDS = ('" string="true">', '" string="false">')


class Reasoning(NamedTuple):
    """More of the reasoning."""

    text: str


class Content(NamedTuple):
    """More of the answer's text."""

    text: str


class ToolCall(NamedTuple):
    """A whole tool call: its place among the answer's calls, from 0, and its arguments as a JSON object in a string."""

    index: int
    name: str
    arguments: str


Event = Reasoning | Content | ToolCall  # told apart by type: as tuples, Reasoning("a") == Content("a")


class AnswerStream:
    """Reads one answer piece by piece: `push` and `finish` return what has become certain.

    With `thinking` the text begins inside the reasoning. Without `tools` a calls block is ordinary text. `calls` are the
    tool calls so far; `reasoning_open` says whether what has been given out so far ends inside the reasoning.
    """

    def __init__(self, thinking: bool, tools: bool = True):
        self.calls: list[ToolCall] = []
        self.reasoning_open = thinking
        self._events: list[Event] = []
        self._block: list[str] = []  # what has been read of the calls block after its last call
        self._text, self._at, self._end = "", 0, 0  # text still needed; read up to _at, readable up to _end
        self._ended = False
        self._reader = self._read_answer((BLOCK_OPEN,) if tools else ())

    def push(self, text: str) -> list[Event]:
        """The events of some more text."""
        self._text, self._at = self._text[self._at:] + text, 0
        end_token = END_TOKEN.search(self._text)
        self._end = end_token.start() if end_token else len(self._text)
        return self._read_on()

    def finish(self) -> list[Event]:
        """The events of what was held back: the text has ended, and `push` may not be called again."""
        self._end, self._ended = len(self._text.removesuffix(EOS)), True
        return self._read_on()

    def _read_on(self) -> list[Event]:
        next(self._reader, None)
        events, self._events = self._events, []
        return events

    # The format as a program: the generators below yield where they need more text, and not once it has ended.

    def _read_answer(self, block_open: tuple[str, ...]) -> Generator[None, None, None]:
        tag = None
        if self.reasoning_open:
            tag = yield from self._until(self._give_reasoning, THINK_END, *block_open)
            self.reasoning_open = tag is None
        if tag != BLOCK_OPEN:
            tag = yield from self._until(self._give_content, *block_open)
        if tag == BLOCK_OPEN:
            self._block.append(BLOCK_OPEN)
            yield from self._read_block()
            self._give_content("".join(self._block))
            yield from self._until(self._give_content)

    def _read_block(self) -> Generator[None, None, None]:
        """To the end of the calls block, or to where it breaks the format."""
        tag = yield from self._accept(NEXT_CALL)
        while tag == NEXT_CALL:
            closed = yield from self._read_call()
            if not (closed and self._give_call()):
                return
            tag = yield from self._accept(NEXT_CALL, BLOCK_CLOSE)
        if tag == BLOCK_CLOSE:
            self._block.clear()
        elif self._ended and self.calls and BLOCK_CLOSE.startswith(self._text[self._at:self._end]):
            self._at = self._end

    def _read_call(self) -> Generator[None, None, bool]:
        """From a call's name to the end of its closing tag; whether there is one."""
        tag = yield from self._hold_until(*NAME_ENDS, DSML)
        while tag is not None and tag.endswith(PARAMETER_OPEN):
            if (yield from self._hold_until(*KEY_ENDS, DSML)) not in KEY_ENDS:
                return False
            yield from self._hold_until(PARAMETER_CLOSE)
            tag = yield from self._accept(NEXT_PARAMETER, CLOSE_OF_CALL)
        return tag is not None and tag.endswith(CALL_CLOSE)

    def _hold_until(self, *tags: str) -> Generator[None, None, str | None]:
        tag = yield from self._until(self._block.append, *tags)
        self._block.append(tag or "")
        return tag

    def _until(self, give: Callable[[str], None], *tags: str) -> Generator[None, None, str | None]:
        """Gives the text before the first of the tags, reads past that and returns it; None at the end of the text."""
        finder = _finder(tags)
        while True:
            found = finder.search(self._text, self._at, self._end)
            tag = found[0] if found and found[0] in tags else None
            stop = found.start() if found and (tag or not self._ended) else self._end
            if self._at < stop:
                give(self._text[self._at:stop])
            self._at = stop + len(tag or "")
            if tag or self._ended:
                return tag
            yield

    def _accept(self, *tags: str) -> Generator[None, None, str | None]:
        """Reads past the tag that comes next, holds and returns it; None where none of them does."""
        while True:
            for tag in tags:
                if self._text.startswith(tag, self._at, self._end):
                    self._at += len(tag)
                    self._block.append(tag)
                    return tag
            rest = self._text[self._at:self._end]
            if self._ended or not any(tag.startswith(rest) for tag in tags):
                return None
            yield

    def _give_reasoning(self, text: str) -> None:
        self._events.append(Reasoning(text))

    def _give_content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _give_call(self) -> bool:
        """Gives out the call in `_block` if `parse` finds it valid: no key twice, and JSON where it should be."""
        opening = BLOCK_OPEN if self.calls else ""
        try:
            (call,) = parse(opening + "".join(self._block) + BLOCK_CLOSE, "chat")["tool_calls"]
        except ChatFormatError:
            return False
        self._block.clear()
        self.calls.append(ToolCall(len(self.calls), **call["function"]))
        self._events.append(self.calls[-1])
        return True


def read_answer(text: str, thinking: bool, tools: bool = True) -> dict:
    """The assistant message in a whole text, in the shape that `parse` returns; reads any text, as `AnswerStream` does."""
    stream = AnswerStream(thinking, tools)
    return gather([*stream.push(text), *stream.finish()])


def gather(events: Iterable[Event]) -> dict:
    """The assistant message that events add up to: role, content, reasoning_content and tool_calls (without ids)."""
    texts, calls = {Reasoning: [], Content: []}, []
    for event in events:
        if isinstance(event, ToolCall):
            calls.append({"type": "function", "function": {"name": event.name, "arguments": event.arguments}})
        else:
            texts[type(event)].append(event.text)
    content, reasoning = "".join(texts[Content]), "".join(texts[Reasoning])
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _or_start(tag: str) -> str:
    """A pattern of the tag, or of as much of its start as the text ends with, one character at least."""
    pattern = ""
    for character in reversed(tag[1:]):
        pattern = rf"(?:{re.escape(character)}{pattern}|\Z)"
    return re.escape(tag[0]) + pattern


@cache
def _finder(tags: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(_or_start, tags)) or "(?!)")


END_TOKEN = re.compile(rf"{_or_start(EOS)}\Z")
