"""Deltas of an answer -> completions in OpenAI's shape, whole or as the chunks of a stream. Pure functions, and two small states."""

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fathom.engine.request import Written
from fathom.server.tasks import Delta, End
from fathom.text.chat_stream import Content, Reasoning, ToolCall
from fathom.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # stands for -infinity, which JSON does not have
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Head:
    """What all parts of one answer begin with."""

    id: str
    created: int
    model: str
    fingerprint: str
    object: str

    def json(self, chunk: bool = False) -> dict:
        """The first fields of the whole answer, or of a chunk of it."""
        kind = f"{self.object}.chunk" if chunk else self.object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}


def sse(chunk: dict) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def usage(prompts: Iterable[Sequence[End]]) -> dict:
    """Tokens of an answer to one prompt or several, from the ends of each prompt's choices; a prompt counts once."""
    ends = [list(choices) for choices in prompts]
    read, hit = sum(choices[0].prompt_tokens for choices in ends), sum(choices[0].hit_tokens for choices in ends)
    written = sum(end.completion_tokens for choices in ends for end in choices)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_cache_hit_tokens": hit, "prompt_cache_miss_tokens": read - hit,
        "prompt_tokens_details": {"cached_tokens": hit},
        "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for choices in ends for end in choices)}}


# ---- chats


@dataclass
class _ChatChoice:
    """One choice of a chat, gathered."""

    thinking: bool
    texts: dict[type, list[str]] = field(default_factory=lambda: {Reasoning: [], Content: []})
    calls: list[dict] = field(default_factory=list)
    written: dict[str, list[dict]] = field(default_factory=lambda: {"content": [], "reasoning_content": []})

    def take(self, delta: Delta, tokenizer: Tokenizer) -> None:
        if isinstance(delta.event, ToolCall):
            self.calls.append({"id": _call_id(delta.event), **_call_json(delta.event.name, delta.event.arguments)})
        else:
            self.texts[type(delta.event)].append(delta.event.text)
        self.written[_list_of(delta)] += logprobs_json(delta.written, tokenizer)

    def json(self, end: End, logprobs: bool) -> dict:
        content, reasoning = "".join(self.texts[Content]), "".join(self.texts[Reasoning])
        message = {"role": "assistant", "content": content or (None if self.calls else "")}
        message |= {"reasoning_content": reasoning} if self.thinking else {}
        message |= {"tool_calls": self.calls} if self.calls else {}
        return {"index": end.choice, "message": message, "finish_reason": end.finish, "logprobs": self.written if logprobs else None}


def chat_json(head: Head, items: Iterable[Delta | End], choices: int, thinking: bool, logprobs: bool, tokenizer: Tokenizer) -> bytes:
    """The whole answer to a chat."""
    gathered, ends = [_ChatChoice(thinking) for _ in range(choices)], {}
    for item in items:
        if isinstance(item, End):
            ends[item.choice] = item
        else:
            gathered[item.choice].take(item, tokenizer)
    parts = [gathered[index].json(ends[index], logprobs) for index in range(choices)]
    return json.dumps(head.json() | {"choices": parts, "usage": usage([[*ends.values()]])}).encode()


class ChatStream:
    """The chunks of a streamed chat: `more` for each delta, `finish` for each choice's end.

    Usage stands in the last chunk, as in DeepSeek's API, with `include_usage` as null in the ones before; or, with
    `separate_usage`, as in OpenAI's: in a chunk of its own without choices, if it was asked for.
    """

    def __init__(self, head: Head, choices: int, logprobs: bool, include_usage: bool, separate_usage: bool, tokenizer: Tokenizer):
        self._head, self._choices, self._logprobs, self._tokenizer = head.json(chunk=True), choices, logprobs, tokenizer
        self._no_usage = {"usage": None} if include_usage else {}
        self._include, self._separate = include_usage, separate_usage
        self._started: set[int] = set()
        self._ends: list[End] = []

    def more(self, delta: Delta) -> Iterator[dict]:
        """The chunks of more text, or of a tool call."""
        yield from self._start(delta.choice)
        lists = {"content": [], "reasoning_content": []}
        lists[_list_of(delta)] = logprobs_json(delta.written, self._tokenizer)
        logprobs = lists if self._logprobs else None
        match delta.event:
            case ToolCall(index, name, arguments):
                call = {"index": index, "id": _call_id(delta.event), **_call_json(name, "")}
                yield self._chunk(delta.choice, {"tool_calls": [call]})
                yield self._chunk(delta.choice, {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}, logprobs=logprobs)
            case Reasoning(text):
                yield self._chunk(delta.choice, {"reasoning_content": text}, logprobs=logprobs)
            case Content(text):
                yield self._chunk(delta.choice, {"content": text}, logprobs=logprobs)

    def finish(self, end: End) -> Iterator[dict]:
        """The last chunk of a choice, and after the last of all what may follow it."""
        yield from self._start(end.choice)
        self._ends.append(end)
        chunk = self._chunk(end.choice, {"content": ""}, end.finish)
        if len(self._ends) < self._choices:
            yield chunk
        elif not self._separate:
            yield chunk | {"usage": usage([self._ends])}
        else:
            yield chunk
            if self._include:
                yield self._head | {"choices": [], "usage": usage([self._ends])}

    def _start(self, choice: int) -> Iterator[dict]:
        if choice not in self._started:
            self._started.add(choice)
            yield self._chunk(choice, {"role": "assistant", "content": ""})

    def _chunk(self, choice: int, delta: dict, finish: str | None = None, logprobs: dict | None = None) -> dict:
        return self._head | {
            "choices": [{"index": choice, "delta": delta, "finish_reason": finish, "logprobs": logprobs}], **self._no_usage}


def logprobs_json(written: Sequence[Written], tokenizer: Tokenizer) -> list[dict]:
    """Tokens in the form of chats; none where log-probabilities were not asked for."""
    def entry(token: int, logprob: float) -> dict:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": [*data]}

    return [entry(each.token, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
            for each in written if each.logprob is not None]


def _list_of(delta: Delta) -> str:
    return "reasoning_content" if isinstance(delta.event, Reasoning) else "content"


def _call_id(call: ToolCall) -> str:
    return f"call_{call.index:02}_{secrets.token_hex(12)}"


def _call_json(name: str, arguments: str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# ---- completions


class CompletionText:
    """What one choice of a completion has written: `text` with the prompt before it if it is to be repeated, and its tokens' log-probabilities."""

    def __init__(self, echo: str, tokenizer: Tokenizer):
        self._echo, self._offset = echo, len(echo)
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()

    def take(self, delta: Delta | None) -> tuple[str, dict]:
        """The new text and its log-probabilities."""
        echo, self._echo = self._echo, ""
        return echo + (delta.event.text if delta else ""), self._logprobs(delta.written if delta else ())

    def _logprobs(self, written: Sequence[Written]) -> dict:
        lists: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for each in written:
            lists["text_offset"].append(self._offset)
            lists["tokens"].append(_shown(each.token, self._tokenizer))
            lists["token_logprobs"].append(max(each.logprob, LEAST_LOGPROB))
            lists["top_logprobs"].append({_shown(token, self._tokenizer): max(value, LEAST_LOGPROB) for token, value in each.top})
            self._offset += len(self._stream.push(each.token))
        return lists


def _shown(token: int, tokenizer: Tokenizer) -> str:
    """A token's text, or its bytes where they are part of a character only."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_choice(index: int, text: str, finish: str | None, logprobs: dict | None) -> dict:
    """A choice of a completion, or of a chunk of one."""
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}


def joined_logprobs(parts: Iterable[dict]) -> dict:
    """The lists of several pieces as one."""
    lists: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for part in parts:
        for name, values in part.items():
            lists[name] += values
    return lists
