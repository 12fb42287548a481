"""The face of the engine: requests in, their answers out, step by step, many at a time over one model."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.devices import use_device
from fathom.engine.answer import Answer
from fathom.engine.block_pool import BlockPool
from fathom.engine.constraint import Grammars
from fathom.engine.disk_cache import DiskCache
from fathom.engine.fingerprint import model_fingerprint
from fathom.engine.grammar import Compiler
from fathom.engine.graphs import GraphRecorder, Graphs, Record, TapeRecorder, usual_recorder
from fathom.engine.paged_cache import PagedCache, Row
from fathom.engine.prefix_cache import PrefixCache
from fathom.engine.request import Limits, Output, Request, Stats
from fathom.engine.runner import Runner
from fathom.engine.sampler import Sampling
from fathom.engine.scheduler import Place, Scheduler, Start
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError, QueueFull
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

MOST_BLOCKS = 1 << 20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name; InputError for one that models are not computed in."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


class Engine:
    """A model with its tokenizer, ready to generate. One thread at a time may use it.

    `disk` is the prefix cache's second half; the engine closes it. InputError where the settings do not suit the model.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, quantized_cache: bool = False,
                 settings: EngineSettings = EngineSettings(), disk: DiskCache | None = None):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.config = config = model.config
        if settings.drafts and not model.mtp:
            raise InputError(f"drafts is {settings.drafts}, but this model has no MTP block; use drafts 0")
        record = _recorder(model, settings)
        slots, blocks = _sizes(model, quantized_cache, settings, record is not None)
        more = int(record is not None)  # the last slot and block are no sequence's
        self._cache = _paged_cache(model, blocks + more, slots + more, quantized_cache, settings.drafts)
        graphs = Graphs(model, self._cache, Row(slots, [blocks], 0), record) if record is not None else None
        self.block_tokens, spare = self._cache.block_tokens, 2 * settings.drafts
        self._pool = BlockPool(blocks, self._forget)
        self._interval = self.block_tokens if settings.window == "full" else settings.interval
        self._prefix = PrefixCache(self._cache, self._pool, config.sliding_window * config.num_hidden_layers,
                                   settings.state_bytes, disk) if settings.prefix_cache else None
        self._scheduler = Scheduler(self._pool, slots, self.block_tokens, self._park)
        self.slots = slots  # requests that can run at the same time
        room = min(config.max_position_embeddings, blocks * self.block_tokens)
        known = min(tokenizer.vocab_size, config.vocab_size)
        self.limits = Limits(room - spare, config.max_position_embeddings, config.vocab_size, known)
        self._runner = Runner(model, self._cache, room, known, settings.drafts, graphs)
        self._answers: dict[Place, Answer] = {}
        self._twins: dict[int, list[Answer]] = {}  # by request: choices that wait for the first one's prompt
        self._open: dict[int, int] = {}  # by request: choices that are not finished
        self._mail: dict[int, deque[Output]] = {}  # outputs of requests that `run` follows
        self._requests = self._prompt_tokens = self._hit_tokens = self._generated = 0

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", packed: bool = False,
             settings: EngineSettings = EngineSettings()) -> "Engine":
        """Open a model folder, or the newest checkpoint of a run folder; it must hold a tokenizer.

        `packed` computes as the release does: FP8 and FP4 weights stay as stored, and the cache is in FP8 and FP4. InputError for a device that
        is not here.
        """
        folder, where = find_model(path), use_device(device)
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder, dtype, where, packed=packed, simulate_quantization=packed)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
        disk = None
        if settings.disk is not None and settings.prefix_cache:
            name = model_fingerprint(folder, str(dtype), f"packed {packed}", f"drafts {bool(settings.drafts)}")
            disk = DiskCache(settings.disk, settings.disk_bytes, name)
        return cls(model, tokenizer, packed, settings, disk)

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.limits.max_tokens

    @cached_property
    def compiler(self) -> Compiler:
        """Turns constraints into masks."""
        return Compiler(self.tokenizer, self.limits.known, self.config.eos_token_id)

    @cached_property
    def grammars(self) -> Grammars:
        """Writes constraints for requests."""
        return Grammars(self.tokenizer, self.compiler.check)

    @property
    def has_work(self) -> bool:
        """Whether a step would advance anything."""
        return bool(self._open)

    def add(self, request: Request) -> int:
        """Queue a request; its number. InputError for a prompt that the model cannot take, QueueFull where too many wait."""
        self.limits.check(request)
        if len(self._scheduler.waiting) >= self.settings.waiting:
            raise QueueFull(f"{self.settings.waiting} requests wait already; try again later")
        sampling = request.sampling
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else {self.config.eos_token_id})
        limit = min(len(request.prompt) + sampling.max_tokens, self.max_tokens)
        choices = range(request.first_choice, request.first_choice + request.choices)
        matchers = [self.compiler.start(request.constraint) if request.constraint is not None else None for _ in choices]
        self._requests += 1
        first, *twins = [Answer(self._requests, choice, request, limit, ends, self.tokenizer, matcher)
                         for choice, matcher in zip(choices, matchers, strict=True)]
        self._open[self._requests], self._twins[self._requests] = request.choices, twins
        self._queue(first)
        return self._requests

    def step(self) -> list[Output]:
        """Start who can start, read one piece of two prompts at most, write one token or more for each answer that is being written."""
        while (place := self._scheduler.admit(self._find)) is not None:
            self._start(self._answers[place])
        prompts = [answer for answer in map(self._answers.get, self._scheduler.running) if self._reads(answer)]
        shortest = min(prompts, key=lambda answer: answer.place.missing, default=None)
        for answer in dict.fromkeys([*prompts[:1], *([shortest] if shortest else [])]):
            self._look_again(answer)
            self._read(answer)
        self._write([answer for answer in map(self._answers.get, self._scheduler.running) if not self._reads(answer)])
        outputs = [output for answer in [*self._answers.values()] if (output := self._collect(answer)) is not None]
        for output in outputs:
            if output.request in self._mail:
                self._mail[output.request].append(output)
        return [output for output in outputs if output.request not in self._mail]

    def cancel(self, request_id: int) -> None:
        """Forget a request and free its memory at once; it has no further output. Unknown and finished ones are ignored."""
        for answer in [answer for answer in self._answers.values() if answer.request_id == request_id]:
            self._scheduler.leave(answer.place)
            del self._answers[answer.place]
        self._open.pop(request_id, None)
        self._twins.pop(request_id, None)

    def run(self, request: Request) -> Iterator[Output]:
        """The outputs of one request, stepping as needed; errors as of `add`, before the first. Closing it cancels the request."""
        self.limits.check(request)
        return self._follow(request)

    def stream(self, prompt: Sequence[int], sampling: Sampling, stop_ids: Sequence[int] = ()) -> Iterator[int]:
        """Generated token ids, one by one; ends after the model's end token or one of `stop_ids` (also yielded),
        after sampling.max_tokens, or where the context is full. Errors as of `run`.
        """
        return self._tokens(self.run(Request(tuple(prompt), sampling.stopping_at(stop_ids))))

    def text(self, prompt: str, sampling: Sampling, special: bool = False) -> Iterator[str]:
        """Continue plain text, piece by piece; the end token is not written. `special` reads special tokens in the prompt."""
        ids = self.tokenizer.encode(prompt, special=special)
        if not ids:
            raise InputError("the prompt is empty; give at least one character")
        yield from (output.text for output in self.run(Request((self.tokenizer.bos_id, *ids), sampling)))

    def stats(self) -> Stats:
        """Counters and gauges as of now."""
        scheduler, prefix, runner = self._scheduler, self._prefix, self._runner
        disk = prefix.disk if prefix is not None else None
        return Stats(
            running=len(scheduler.running), waiting=len(scheduler.waiting), blocks=self._pool.blocks,
            blocks_used=self._pool.blocks - self._pool.available, blocks_cached=self._pool.kept,
            block_bytes=self._cache.block_bytes(), state_bytes=prefix.held_bytes if prefix is not None else 0,
            prompt_tokens=self._prompt_tokens, hit_tokens=self._hit_tokens, generated_tokens=self._generated,
            preemptions=scheduler.preemptions, drafted_tokens=runner.drafted, accepted_tokens=runner.accepted,
            **({"disk_bytes": disk.nbytes, "disk_errors": disk.errors, "disk_dropped": disk.dropped} if disk is not None else {}))

    def close(self) -> None:
        """Forget all requests, and let the disk cache finish writing."""
        for request_id in [*self._open]:
            self.cancel(request_id)
        if self._prefix is not None and self._prefix.disk is not None:
            self._prefix.disk.close()

    def _queue(self, answer: Answer) -> None:
        self._answers[answer.place] = answer
        self._scheduler.add(answer.place)

    def _find(self, place: Place) -> Start:
        """Where this sequence can start, by the prefix cache."""
        answer = self._answers[place]
        if self._prefix is None:
            return Start(0, 0, [])
        self._hash(answer)
        answer.found = self._prefix.find(answer.hashes, answer.tokens)
        return answer.found.start

    def _start(self, answer: Answer) -> None:
        place = answer.place
        if self._prefix is None:
            self._cache.clear_state(place.slot)
        else:
            self._take_up(answer)
            answer.unread = True
        if not answer.started:
            answer.started, answer.hit_tokens = True, place.computed
            self._prompt_tokens += len(answer.request.prompt)
            self._hit_tokens += place.computed

    def _take_up(self, answer: Answer) -> None:
        """Begin at what was found in the prefix cache."""
        place = answer.place
        self._prefix.restore(answer.found, place.slot, place.blocks)
        answer.marks, answer.kept_blocks = self._marks(answer), place.frozen // self.block_tokens
        answer.found = None

    def _look_again(self, answer: Answer) -> None:
        """Before an answer's first piece is read: others that were admitted with it may have read the beginning of its prompt since."""
        if not answer.unread or answer.place.slot < 0:
            return
        answer.unread, place, begun = False, answer.place, answer.place.computed
        answer.found = self._prefix.find(answer.hashes, answer.tokens)
        further = answer.found.start.computed - begun
        if further > 0:
            self._scheduler.restart(place, answer.found.start)
            self._take_up(answer)
            if answer.hit_tokens == begun:  # otherwise it gave way before, and its hits are counted
                answer.hit_tokens += further
                self._hit_tokens += further
        else:
            self._pool.release(answer.found.start.blocks)
            answer.marks, answer.found = self._marks(answer), None

    def _marks(self, answer: Answer) -> list[int]:
        """Where the state is to be kept on the way through the known tokens."""
        if self.settings.window == "zero":
            return []
        end = answer.request.input_end
        marks = {*range(self._interval, answer.place.length, self._interval), answer.found.junction, len(answer.request.prompt) - 1 if end is None else end}
        # A first block is read as fast as a state.
        return sorted(mark for mark in marks if max(answer.place.computed, self.block_tokens - 1) < mark < answer.place.length)

    def _reads(self, answer: Answer) -> bool:
        """Whether it still has a prompt to read; a last token alone is read together with answers that are being written."""
        return answer.place.missing > 1 or bool(answer.choice == answer.request.first_choice and self._twins.get(answer.request_id))

    def _read(self, answer: Answer) -> None:
        place, chunk = answer.place, self.settings.prefill_chunk
        if place.slot < 0:  # it gave way in this step
            return
        ends = [(place.computed // chunk + 1) * chunk, place.length, *(mark for mark in answer.marks if mark > place.computed)]
        if not self._scheduler.grow(place, min(ends) + 2 * self.settings.drafts):
            return
        logits_V = self._runner.prefill(answer, min(ends))
        self._settle(answer)
        if logits_V is None:
            return
        for twin in self._twins.pop(answer.request_id, ()):
            self._fork(answer, twin, logits_V)

    def _fork(self, answer: Answer, twin: Answer, logits_V: torch.Tensor) -> None:
        """A further choice goes on from a prompt that was read, or waits where there is no room."""
        twin.started, twin.hit_tokens = True, answer.hit_tokens
        place = self._scheduler.fork(answer.place)
        if place is None:
            self._queue(twin)
            return
        place.length = len(twin.tokens)
        twin.place, twin.hashes, twin.kept_blocks = place, [*answer.hashes], answer.kept_blocks
        self._answers[place] = twin
        self._cache.write_state(place.slot, self._cache.read_state(answer.place.slot))
        whole = place.computed // self.block_tokens
        if place.computed % self.block_tokens:
            self._cache.write_block(place.blocks[whole], self._cache.read_block(answer.place.blocks[whole]))
        self._runner.choose([twin], logits_V[None])

    def _write(self, answers: list[Answer]) -> None:
        answers = [answer for answer in answers if answer.finish is None]
        for answer in answers:
            if answer.place.slot >= 0:
                self._scheduler.grow(answer.place, answer.place.length + 2 * self.settings.drafts)
        answers = [answer for answer in answers if answer.place.slot >= 0]
        self._runner.decode(answers)
        for answer in answers:
            self._settle(answer)

    def _settle(self, answer: Answer) -> None:
        """Let the prefix cache have what an advance has completed."""
        place, prefix = answer.place, self._prefix
        if prefix is None:
            return
        begin, end = answer.kept_blocks, place.computed // self.block_tokens
        if begin < end:
            self._hash(answer)
            prefix.keep_blocks(answer.hashes, place.blocks, begin, end)
            answer.kept_blocks = end
        periodic = self.settings.window != "zero" and place.computed % self._interval == 0
        if place.computed >= place.frozen and (periodic or place.computed in answer.marks):  # before, the window is incomplete
            prefix.keep_state(answer.hashes, answer.tokens, place.computed, place.slot, place.blocks)

    def _hash(self, answer: Answer) -> None:
        answer.hashes = answer.hashes or [self._prefix.root(answer.request.tenant)]
        self._prefix.extend(answer.hashes, answer.tokens)

    def _park(self, place: Place) -> None:
        """Keep the state of a sequence whose memory goes to others, or that is finished."""
        answer = self._answers[place]
        answer.drafts, answer.kept_blocks = [], 0
        kept = self._prefix is not None and self.settings.window != "zero" and place.slot >= 0
        if kept and place.computed >= max(place.frozen, self.block_tokens):
            self._hash(answer)
            self._prefix.keep_state(answer.hashes, answer.tokens, place.computed, place.slot, place.blocks)

    def _collect(self, answer: Answer) -> Output | None:
        output = answer.collect()
        if output is not None:
            self._generated += len(output.tokens)
        if answer.finish is not None:
            self._park(answer.place)
            self._scheduler.leave(answer.place)
            del self._answers[answer.place]
            self._open[answer.request_id] -= 1
            if not self._open[answer.request_id]:
                del self._open[answer.request_id]
                self._twins.pop(answer.request_id, None)
        return output

    def _forget(self, block: int) -> None:
        self._prefix.forget(block)

    def _follow(self, request: Request) -> Iterator[Output]:
        request_id = self.add(request)
        mail = self._mail[request_id] = deque()
        try:
            while mail or request_id in self._open:
                while mail:
                    yield mail.popleft()
                if request_id in self._open:
                    self.step()
        finally:
            del self._mail[request_id]
            self.cancel(request_id)

    @staticmethod
    def _tokens(outputs: Iterator[Output]) -> Iterator[int]:
        for output in outputs:
            yield from (written.token for written in output.tokens)


def _paged_cache(model: Transformer, blocks: int, slots: int, quantized: bool, drafts: int) -> PagedCache:
    weight = model.embed.weight
    return PagedCache(model.config, blocks, slots, weight.dtype, weight.device, quantized, 1 if drafts else 0)


def _sizes(model: Transformer, quantized: bool, settings: EngineSettings, recorded: bool) -> tuple[int, int]:
    """Slots and blocks that fit into cache_bytes: states of running requests take half of it at most."""
    one = _paged_cache(model, 1, 1, quantized, settings.drafts)
    state, block = one.state_bytes(), one.block_bytes()
    spare = (state + block) * recorded  # for the rows and blocks that fill up a recorded step
    slots = min(settings.running, (settings.cache_bytes - spare) // max(2 * state, 1))
    blocks = min((settings.cache_bytes - spare - slots * state) // max(block, 1), MOST_BLOCKS) if slots > 0 else 0
    if blocks < 1:
        raise InputError(f"cache_bytes is {settings.cache_bytes}; this model needs at least {2 * state + block + spare} bytes")
    return slots, blocks


def _recorder(model: Transformer, settings: EngineSettings) -> Record | None:
    """What records decoding, if anything does; InputError where it should and cannot."""
    device = model.head.weight.device
    if settings.graphs is None:
        return None if settings.drafts else usual_recorder(model)
    if not settings.graphs:
        return None
    if model.config.attention != "v4":
        raise InputError(f"attention {model.config.attention!r} reads as many keys as there are tokens, which no recorded step does; leave graphs out")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"steps are recorded on CUDA's devices and on CPUs, but the model is on {device}; leave graphs out")
    return TapeRecorder() if device.type == "cpu" else GraphRecorder()
