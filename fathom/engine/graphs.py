"""Decoding as CUDA graphs: a step is recorded once for its number of rows and of blocks, and replayed without the cost of a thousand launches.

A recording has fixed shapes. Rows are filled up to a power of two by a spare row, whose slot and block nobody else has, and a row's blocks to a power
of two by the spare block, which also takes the entries of blocks that are not complete (`fathom.model.step_layout`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.engine.paged_cache import PagedCache, Row
from fathom.model.step_layout import StepLayout
from fathom.model.transformer import Transformer

Replay = Callable[[], object]


class Recording(NamedTuple):
    """A recorded step: of each row its token, length, slot and blocks go in, and its logits come out."""

    numbers_BN: Tensor
    logits_BV: Tensor
    replay: Replay


class Recorder:
    """Records steps as CUDA graphs that share their memory, since only one runs at a time."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """What a step gives, in memory where every replay leaves it, and what replays it."""
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


class Graphs:
    """The steps of one model and cache. The slot and the block of `spare`, its only one, belong to no sequence."""

    def __init__(self, model: Transformer, cache: PagedCache, spare: Row, record: Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]):
        self.model, self.cache, self.spare = model, cache, spare
        self._record = record
        self._recordings: dict[tuple[int, int], Recording] = {}

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        """Logits [B, V] after one new token of each row; they hold until the next step. All entries of the rows are written, none is frozen."""
        B, P = _filled(len(rows)), _filled(max(len(row.blocks) for row in rows))
        if (B, P) not in self._recordings:
            self._recordings[B, P] = self._new_recording(B, P)
        recording, (spare_block,) = self._recordings[B, P], self.spare.blocks
        numbers = [[token, row.length, row.slot, *row.blocks, *[spare_block] * (P + 1 - len(row.blocks))]
                   for row, token in zip([*rows, *[self.spare] * (B - len(rows))], [*tokens, *[0] * (B - len(rows))], strict=True)]
        recording.numbers_BN.copy_(torch.tensor(numbers))
        recording.replay()
        return recording.logits_BV[:len(rows)]

    def _new_recording(self, B: int, P: int) -> Recording:
        spare = [0, self.spare.length, self.spare.slot, *self.spare.blocks * (P + 1)]
        numbers_BN = torch.tensor([spare] * B, device=self.cache.device)

        def step() -> Tensor:
            token_B1, length_B, slot_B, block_BP = numbers_BN[:, :1], numbers_BN[:, 1], numbers_BN[:, 2], numbers_BN[:, 3:]
            view = self.cache.step_view(length_B, slot_B, block_BP)
            with torch.inference_mode():
                layout = StepLayout(self.model.config, view, P * self.cache.block_tokens)
            return self.model(token_B1, cache=view, layout=layout).logits[:, 0]

        return Recording(numbers_BN, *self._record(step))


def _filled(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
