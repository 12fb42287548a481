"""Decoding as recorded steps: a step is recorded once and replayed without what it costs to find out what to call. On a GPU a recording is a CUDA graph,
on a CPU a tape (`fathom.ops.tape`).

A recording has fixed shapes. `Graphs` fills rows up to a power of two by a spare row, whose slot and block nobody else has, and a row's blocks to a power of
two by the spare block, which also takes the entries of blocks that are not complete (`fathom.model.step_layout`). `Steps` decodes the rows of a plain cache.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.engine.paged_cache import PagedCache, Row, tokens_of_block
from fathom.model.cache import Cache
from fathom.model.step_layout import StepLayout
from fathom.model.transformer import Transformer
from fathom.ops.dispatch import preferred
from fathom.ops.tape import Tape, Unrecordable

Replay = Callable[[], object]
_MOST = 48  # recordings of a CPU, which share no memory
_TAPE_BYTES = 1 << 24


class Record(Protocol):
    """Records a step. `apart`: steps that complete blocks are recorded apart from those that complete none and do less."""

    apart: bool

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """What a step gives, in memory where every replay leaves it, and what replays it; Unrecordable where there can be no such thing."""


class GraphRecorder:
    """Records steps as CUDA graphs that share their memory, since only one runs at a time."""

    apart = False

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """As Record."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles kernels, makes what libraries keep
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = step()
        return out, graph.replay


class TapeRecorder:
    """Records steps on a CPU; none that keeps more than 16 MiB: Python's share of it is small."""

    apart = True

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """As Record."""
        step()  # makes what is kept
        with Tape(_TAPE_BYTES) as tape:
            out = step()
        return out, tape.replay


def usual_recorder(model: Transformer) -> TapeRecorder | None:
    """What records the steps of a model where nothing else is asked for: on a CPU, and with V4's attention."""
    return TapeRecorder() if model.head.weight.device.type == "cpu" and model.config.attention == "v4" else None


class Recording(NamedTuple):
    """A recorded step: where its numbers go in [B, N], where its logits come out [B, V], and what replays it."""

    numbers_BN: Tensor
    logits_BV: Tensor
    replay: Replay
    weights: list[Tensor]  # which kernels know by their places alone

    def run(self, numbers: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] for these numbers; they hold until the next run."""
        self.numbers_BN.copy_(torch.tensor(numbers))
        self.replay()
        return self.logits_BV


class _Recordings:
    """Recordings by what they depend on; None stands for what cannot be recorded. Of tapes the one that was not used for longest makes room.

    The model's weights may change where they lie. Those that come to lie elsewhere are recorded anew; a hook or a module that comes later is not seen.
    """

    def __init__(self, record: Record, model: Transformer):
        self.record = record
        self._weights = [*model.parameters(), *model.buffers()]
        self._made: dict[tuple, Recording | None] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, key: tuple, numbers: Sequence[Sequence[int]], device: torch.device, step: Callable[[Tensor], Tensor]) -> Recording | None:
        """The recording; if there is none, it is made with these numbers."""
        key = *key, torch.get_num_threads(), preferred(), tuple(weight.data_ptr() for weight in self._weights)
        if key not in self._made:
            numbers_BN, weights = torch.tensor(numbers, device=device), [weight.detach() for weight in self._weights]
            try:
                self._made[key] = Recording(numbers_BN, *self.record(lambda: step(numbers_BN)), weights)
            except Unrecordable:
                self._made[key] = None
            if self.record.apart and len(self._made) > _MOST:
                del self._made[next(iter(self._made))]
        self._made[key] = self._made.pop(key)
        return self._made[key]


class Graphs:
    """The steps of one model and cache. The slot and the block of `spare`, its only one, belong to no sequence."""

    def __init__(self, model: Transformer, cache: PagedCache, spare: Row, record: Record):
        self.model, self.cache, self.spare = model, cache, spare
        self.recordings = _Recordings(record, model)
        self._refused: set[tuple[int, int]] = set()  # rows and blocks that could not be recorded: more of both cannot, either

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor | None:
        """Logits [B, V] after one new token of each row; they hold until the next step. All entries of the rows are written, none is frozen.

        None, and nothing is done, where such a step cannot be recorded.
        """
        B, P, config = _filled(len(rows)), _filled(max(len(row.blocks) for row in rows)), self.model.config
        ratios = _completed(config, (row.length for row in rows)) if self.recordings.record.apart else None
        if any(B >= refused and P >= blocks for refused, blocks in self._refused):
            return None

        def step(numbers_BN: Tensor) -> Tensor:
            token_B1, length_B, slot_B, block_BP = numbers_BN[:, :1], numbers_BN[:, 1], numbers_BN[:, 2], numbers_BN[:, 3:]
            view = self.cache.step_view(length_B, slot_B, block_BP)
            with torch.inference_mode():
                layout = StepLayout(config, view, P * self.cache.block_tokens, ratios)
            return self.model(token_B1, cache=view, layout=layout).logits[:, 0]

        def numbers(row: Row, token: int) -> list[int]:
            return [token, row.length, row.slot, *row.blocks, *self.spare.blocks * (P + 1 - len(row.blocks))]

        spare = [[0, self.spare.length, self.spare.slot, *self.spare.blocks * (P + 1)]]
        recording = self.recordings.get((B, P, ratios), spare * B, self.cache.device, step)
        if recording is None:
            self._refused.add((B, P))
            return None
        own = [numbers(row, token) for row, token in zip(rows, tokens, strict=True)]
        return recording.run(own + spare * (B - len(rows)))[:len(rows)]


class Steps:
    """Decoding of all rows of a plain cache, a token each, as `model(token_B1, cache=cache)` does it, bit for bit, but recorded where it can be."""

    def __init__(self, model: Transformer, cache: Cache):
        record = usual_recorder(model)
        self.model, self.cache, self._recordings = model, cache, None if record is None else _Recordings(record, model)
        block = tokens_of_block(model.config)
        self._places = cache.max_tokens // block * block - block  # behind them every layer has a spare place

    @staticmethod
    def spare(config: ModelConfig) -> int:
        """How many places a cache should have behind those of its tokens, for all of them to be recorded."""
        return 2 * tokens_of_block(config)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits [B, V] after one new token of each row; they hold until the next step."""
        cache, config = self.cache, self.model.config
        lengths = [] if self._recordings is None else cache.length_B.tolist()
        ratios = _completed(config, lengths)

        def step(numbers_BN: Tensor) -> Tensor:
            view = _View(cache, numbers_BN[:, 1])
            return self.model(numbers_BN[:, :1], cache=view, layout=StepLayout(config, view, self._places, ratios)).logits[:, 0]

        numbers = [[token, length] for token, length in zip(tokens, lengths, strict=self._recordings is not None)]
        known = numbers and all(0 <= token < config.vocab_size for token in tokens) and max(lengths) < self._places
        recording = self._recordings.get((ratios,), numbers, cache.length_B.device, step) if known else None
        if recording is None:
            return self.model(torch.tensor(tokens, device=cache.length_B.device)[:, None], cache=cache).logits[:, 0]
        logits_BV = recording.run(numbers)
        cache.length_B += 1
        return logits_BV


class _View:
    """A cache whose rows have the lengths that stand in a tensor [B], and do not grow: a step may be made several times."""

    def __init__(self, cache: Cache, length_B: Tensor):
        self.layers, self.max_tokens, self.length_B = cache.layers, cache.max_tokens, length_B

    def advance(self, count_B: Tensor) -> None:
        """Nothing."""


def _completed(config: ModelConfig, lengths: Iterable[int]) -> tuple[int, ...]:
    """The compression ratios of which one more token completes a block of some row."""
    lengths = list(lengths)
    return tuple(ratio for ratio in sorted(config.ratios) if any((length + 1) % ratio == 0 for length in lengths))


def _filled(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
