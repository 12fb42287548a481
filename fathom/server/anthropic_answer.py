"""Deltas of an answer -> a message in Anthropic's shape, whole or as the events of a stream. Pure functions, and one small state."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby

from fathom.server.anthropic_types import StopReason
from fathom.server.tasks import End
from fathom.text.chat_stream import Content, Reasoning, ToolCall

Event = Reasoning | Content | ToolCall
PING = {"type": "ping"}
_STOP_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KEYS = {Reasoning: "thinking", Content: "text"}


def message_json(message_id: str, model: str, events: Iterable[Event], end: End) -> str:
    """The whole answer. Inputs of tools stand in it as the model wrote them: reading numbers and writing them again may change them."""
    head = {"id": message_id, "type": "message", "role": "assistant", "model": model, **_stop(end), "usage": usage(end)}
    return f'{json.dumps(head)[:-1]}, "content": [{", ".join(_blocks(message_id, events))}]}}'


def usage(end: End) -> dict[str, int]:
    """Tokens read anew, read from the prefix cache, and written."""
    return _usage(end.prompt_tokens, end.hit_tokens, end.completion_tokens)


class MessageStream:
    """The events of a streamed answer: `start`, `more` for each delta, `finish`. One block is open at a time."""

    def __init__(self, message_id: str, model: str):
        self._id, self._model = message_id, model
        self._index, self._open = -1, None

    def start(self, prompt_tokens: int, hit_tokens: int) -> dict:
        """The first event."""
        return {"type": "message_start", "message": {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": [], "stop_reason": None,
            "stop_sequence": None, "usage": _usage(prompt_tokens, hit_tokens, 0)}}

    def more(self, event: Event) -> Iterator[dict]:
        """The events of more text, or of a tool call."""
        kind = type(event)
        if kind is not self._open or kind is ToolCall:
            yield from self._close()
            self._index, self._open = self._index + 1, kind
            yield {"type": "content_block_start", "index": self._index, "content_block": self._empty_block(event)}
        if kind is ToolCall:
            yield self._delta("input_json_delta", "partial_json", event.arguments)
        else:
            yield self._delta(f"{_KEYS[kind]}_delta", _KEYS[kind], event.text)

    def finish(self, end: End) -> Iterator[dict]:
        """The last events."""
        yield from self._close()
        yield {"type": "message_delta", "delta": _stop(end), "usage": usage(end)}
        yield {"type": "message_stop"}

    def _close(self) -> Iterator[dict]:
        if self._open is Reasoning:
            yield self._delta("signature_delta", "signature", self._id)
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _delta(self, kind: str, key: str, text: str) -> dict:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, key: text}}

    def _empty_block(self, event: Event) -> dict:
        match event:
            case Reasoning():
                return {"type": "thinking", "thinking": "", "signature": ""}
            case Content():
                return {"type": "text", "text": ""}
        return {"type": "tool_use", "id": _tool_id(self._id, event), "name": event.name, "input": {}}


def _blocks(message_id: str, events: Iterable[Event]) -> Iterator[str]:
    """The JSON of each content block: neighbouring texts of a kind as one."""
    for kind, group in groupby(events, type):
        if kind is ToolCall:
            for call in group:
                head = {"type": "tool_use", "id": _tool_id(message_id, call), "name": call.name}
                yield f'{json.dumps(head)[:-1]}, "input": {call.arguments}}}'
        else:
            signature = {"signature": message_id} if kind is Reasoning else {}
            yield json.dumps({"type": _KEYS[kind], _KEYS[kind]: "".join(event.text for event in group), **signature})


def _stop(end: End) -> dict:
    """Why the answer ended; a stop string comes first, for it is the caller's own."""
    return {"stop_reason": _STOP_REASONS[end.finish] if end.stop is None else "stop_sequence", "stop_sequence": end.stop}


def _usage(prompt_tokens: int, hit_tokens: int, output_tokens: int) -> dict[str, int]:
    return {"input_tokens": prompt_tokens - hit_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": hit_tokens,
            "output_tokens": output_tokens}


def _tool_id(message_id: str, call: ToolCall) -> str:
    return f"toolu_{call.index:02}_{message_id.removeprefix('msg_')}"
