"""An engine without a model: it has the engine's face, and writes what a script says, a token of each choice at every step."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from fathom.engine.constraint import Grammars
from fathom.engine.grammar import Compiler
from fathom.engine.request import Output, Request, Stats, Written
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError, QueueFull
from fathom.text.tokenizer import BOS, EOS, THINK_END, USER, Tokenizer
from tests.models import small_config

BLOCK = 128  # tokens of a cache block
TEXTS = ("the quick brown fox jumps over the lazy dog and says hello world", "a city and its weather: sunny, 21 degrees", "0123456789")
Script = Callable[[Request, int], str]


def hello(request: Request, choice: int) -> str:
    """The answer of a model that thinks a little where it was asked to, and greets."""
    return f"a thought{THINK_END}hello world" if request.prompt[-1] == _TOKENIZER.special_ids["<think>"] else "hello world"


@dataclass
class Choice:
    """What one choice has yet to write: (token, text that becomes certain with it), and how it will end."""

    request_id: int
    index: int
    left: list[tuple[int, str]]
    finish: str
    stop: str | None


@dataclass
class Entry:
    """A request that waits or runs."""

    request: Request
    hit_tokens: int = 0
    blocks: int = 0
    choices: list[Choice] = field(default_factory=list)


class ScriptedEngine:
    """`script(request, choice)` gives the text to write; `delay` seconds pass at each step; counters as a real engine's."""

    def __init__(self, script: Script = hello, delay: float = 0.0, settings: EngineSettings | None = None, max_tokens: int = 4096,
                 compiler: Compiler | None = None):
        self.script, self.delay, self.max_tokens = script, delay, max_tokens
        self.tokenizer = _TOKENIZER
        self.compiler = compiler or Compiler(_TOKENIZER, _TOKENIZER.vocab_size, _TOKENIZER.eos_id)
        self.grammars = Grammars(_TOKENIZER, self.compiler.check)
        self.settings = settings or EngineSettings()
        self.config = small_config([4, 128], vocab_size=_TOKENIZER.vocab_size, max_position_embeddings=max_tokens)
        self.requests: list[Request] = []  # all that were ever added
        self.fail: Exception | None = None  # raised by the next step
        self.closed = False
        self._waiting: dict[int, Entry] = {}
        self._running: dict[int, Entry] = {}
        self._read: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self._counters = dict.fromkeys(("prompt_tokens", "hit_tokens", "generated_tokens"), 0)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> int:
        """Queue a request."""
        if not request.prompt or len(request.prompt) >= self.max_tokens:
            raise InputError(f"prompt has {len(request.prompt)} tokens; the model holds {self.max_tokens}")
        if len(self._waiting) >= self.settings.waiting:
            raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
        self.requests.append(request)
        self._waiting[len(self.requests)] = Entry(request)
        return len(self.requests)

    def cancel(self, request_id: int) -> None:
        """Forget a request."""
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def close(self) -> None:
        """Nothing can be done any more."""
        self.closed = True

    def stats(self) -> Stats:
        """Counters and gauges."""
        used = sum(entry.blocks for entry in self._running.values())
        return Stats(running=len(self._running), waiting=len(self._waiting), blocks=1000, blocks_used=used, **self._counters)

    def step(self) -> list[Output]:
        """Admit what fits, then one token of every choice."""
        if self.fail is not None:
            raise self.fail
        time.sleep(self.delay)
        while self._waiting and len(self._running) < self.settings.running:
            request_id = next(iter(self._waiting))
            self._running[request_id] = self._admit(request_id, self._waiting.pop(request_id))
        outputs = [self._write(entry, choice) for entry in self._running.values() for choice in entry.choices]
        for request_id, entry in list(self._running.items()):
            entry.choices = [choice for choice in entry.choices if choice.left]
            if not entry.choices:
                del self._running[request_id]
        return outputs

    def _admit(self, request_id: int, entry: Entry) -> Entry:
        request, read = entry.request, self._read[entry.request.tenant]
        entry.hit_tokens = max((_common(request.prompt, earlier) for earlier in read), default=0) // BLOCK * BLOCK
        read.append(request.prompt)
        entry.blocks = -(-len(request.prompt) // BLOCK)
        entry.choices = [self._choice(request_id, request, index) for index in range(request.choices)]
        self._counters["prompt_tokens"] += len(request.prompt)
        self._counters["hit_tokens"] += entry.hit_tokens
        return entry

    def _choice(self, request_id: int, request: Request, index: int) -> Choice:
        text, last, stop = self.script(request, index), EOS, None
        ends = [(text.index(stop), stop) for stop in request.sampling.stop if stop in text]
        if ends:
            text, last = text[:min(ends)[0]], min(ends)[1]
            stop = last
        stream = self.tokenizer.stream()
        left = [(token, stream.push(token)) for token in self.tokenizer.encode(text, special=True)]
        left += [(token, "") for token in self.tokenizer.encode(last, special=True)]
        limit = request.sampling.max_tokens
        return Choice(request_id, index, left[:limit], "length" if len(left) > limit else "stop", stop if len(left) <= limit else None)

    def _write(self, entry: Entry, choice: Choice) -> Output:
        token, text = choice.left.pop(0)
        written = Written(token)
        if entry.request.sampling.logprobs is not None:
            others = ((token + rank) % self.tokenizer.vocab_size for rank in range(entry.request.sampling.logprobs))
            written = Written(token, -0.5, tuple((other, -0.5 - rank) for rank, other in enumerate(others)))
        self._counters["generated_tokens"] += 1
        return Output(choice.request_id, choice.index, text, (written,), None if choice.left else choice.finish, entry.hit_tokens,
                      None if choice.left else choice.stop)


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """The length of the common beginning, less than the whole of `left`: the last token is always computed."""
    same = next((index for index, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    return min(same, len(left) - 1)


_TOKENIZER = Tokenizer.train([*TEXTS, BOS, USER], 400)
