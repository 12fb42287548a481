"""A pool of cache blocks and state slots behind the interface of `fathom.model.cache` (report 3.5.1).

A block holds what `block_tokens` tokens leave behind in every layer: entries and index keys. It never changes once its tokens are
complete, so sequences may share it. A slot holds one sequence's fixed state: the window rings and the compressors' tails.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.cache import LayerCache, LayerFormat, Moves, Ring, Stream


class Row(NamedTuple):
    """One sequence of a batch: its slot, its blocks in order, the tokens seen so far, and how many tokens' entries stay as they are.

    `frozen` tokens are being read again only to rebuild the window: their entries are complete and are not written.
    """

    slot: int
    blocks: Sequence[int]
    length: int
    frozen: int = 0


def tokens_of_block(config: ModelConfig) -> int:
    """Tokens of a block: the least common multiple of all compression ratios."""
    return math.lcm(*config.ratios) if config.ratios else 128


class PagedCache:
    """Pools for `blocks` blocks and `slots` sequences, of all layers and the first `mtp` MTP blocks."""

    def __init__(self, config: ModelConfig, blocks: int, slots: int, dtype: torch.dtype, device: torch.device,
                 quantized: bool = False, mtp: int = 0):
        self.block_tokens = tokens_of_block(config)
        self.trunk_layers, self.device = config.num_hidden_layers, device
        formats = [LayerFormat.of(config, layer, dtype, quantized) for layer in range(self.trunk_layers + mtp)]
        self._formats = formats
        self._pages = [LayerCache(form, 1, blocks * self.block_tokens, device) for form in formats]
        self._states = [LayerCache(form, slots, max(form.ratio, 1), device) for form in formats]

    def view(self, rows: Sequence[Row], max_tokens: int, mtp: bool = False, undo: bool = False) -> "PagedView":
        """The rows as the cache of one call; with `mtp` the MTP blocks' layers. `undo` makes `PagedView.forget` possible."""
        part = slice(self.trunk_layers, None) if mtp else slice(0, self.trunk_layers)
        length_B = torch.tensor([row.length for row in rows], device=self.device)
        return PagedView(length_B, _table(rows, self.block_tokens, self.device), max_tokens, self._formats[part], self._pages[part],
                         self._states[part], undo)

    def step_view(self, length_B: Tensor, slot_B: Tensor, block_BP: Tensor) -> "PagedView":
        """Rows that lie in tensors, as the cache of one decoded token each; no number of them is looked at."""
        table, part = _Table(slot_B, slot_B, block_BP, None, False, slot_B, self.block_tokens), slice(0, self.trunk_layers)
        return PagedView(length_B, table, block_BP.shape[1] * self.block_tokens, self._formats[part], self._pages[part], self._states[part], False)

    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(page.nbytes for _, page in self._block(0))

    def state_bytes(self) -> int:
        """Bytes of one slot in all layers."""
        return sum(state.nbytes for _, state in self._slot(0))

    def read_block(self, block: int) -> dict[str, Tensor]:
        """A copy of a block's records, by layer and part."""
        return {name: page.clone() for name, page in self._block(block)}

    def write_block(self, block: int, records: dict[str, Tensor]) -> None:
        """Put records back that `read_block` gave, for this or another block."""
        for name, page in self._block(block):
            page.copy_(records[name])

    def read_state(self, slot: int) -> dict[str, Tensor]:
        """A copy of a slot's rings, by layer and part."""
        return {name: state.clone() for name, state in self._slot(slot)}

    def write_state(self, slot: int, state: dict[str, Tensor]) -> None:
        """Put a state back that `read_state` gave, for this or another slot."""
        for name, ring in self._slot(slot):
            ring.copy_(state[name])

    def clear_state(self, slot: int) -> None:
        """The state before the first token."""
        for _, ring in self._slot(slot):
            ring.zero_()

    def _block(self, block: int) -> Iterator[tuple[str, Tensor]]:
        for layer, pages in enumerate(self._pages):
            for part, stream in (("entries", pages.entries), ("keys", pages.keys)):
                if stream is not None:
                    count = self.block_tokens // self._formats[layer].ratio
                    yield f"{layer}.{part}", stream.records_BMC[0, block * count:(block + 1) * count]

    def _slot(self, slot: int) -> Iterator[tuple[str, Tensor]]:
        for layer, states in enumerate(self._states):
            rings = [("window", states.window)]
            rings += [(part, stream.tail) for part, stream in (("entry_tail", states.entries), ("key_tail", states.keys)) if stream]
            yield from ((f"{layer}.{part}", ring.items_BRC[slot]) for part, ring in rings)


class PagedView:
    """Some sequences as the cache of one call of the model, in the shape of `fathom.model.cache.Cache`."""

    def __init__(self, length_B: Tensor, table: "_Table", max_tokens: int, formats: list[LayerFormat], pages: list[LayerCache],
                 states: list[LayerCache], undo: bool):
        self.length_B, self.max_tokens = length_B, max_tokens
        self.rings: list[_PooledRing] = []
        self.layers = [_PagedLayer(form, page, state, table, undo, self.rings)
                       for form, page, state in zip(formats, pages, states, strict=True)]

    def advance(self, count_B: Tensor) -> None:
        """Record that each row has seen count_B more tokens."""
        self.length_B = self.length_B + count_B

    def forget(self, keep_B: Tensor, moves: Moves) -> None:
        """Undo what the call wrote into the rings for each row's new tokens from the keep_B-th on; entries need no undoing."""
        for ring in self.rings:
            ring.forget(keep_B, moves)


class _Table(NamedTuple):
    """Which slot and which blocks each row has; `run` is the first block of a single row whose blocks lie one behind the other."""

    slots: slice | Tensor
    slot_B: Tensor
    block_BP: Tensor
    run: int | None
    frozen: bool
    frozen_B: Tensor
    block_tokens: int


def _table(rows: Sequence[Row], block_tokens: int, device: torch.device) -> _Table:
    slots, longest = [row.slot for row in rows], max(len(row.blocks) for row in rows)
    slot_B = torch.tensor(slots, device=device)
    padded = [[*row.blocks, *[0] * (longest - len(row.blocks))] for row in rows]
    return _Table(
        slots=slice(slots[0], slots[0] + len(slots)) if _consecutive(slots) else slot_B, slot_B=slot_B,
        block_BP=torch.tensor(padded, device=device).reshape(len(rows), longest),
        run=rows[0].blocks[0] if len(rows) == 1 and longest and _consecutive(rows[0].blocks) else None,
        frozen=any(row.frozen for row in rows), frozen_B=torch.tensor([row.frozen for row in rows], device=device), block_tokens=block_tokens)


def _consecutive(numbers: Sequence[int]) -> bool:
    return all(number == numbers[0] + index for index, number in enumerate(numbers))


class _PooledRing(Ring):
    """Some slots of a pool of rings."""

    def __init__(self, pool: Ring, table: _Table, undo: bool):
        self.record, self.pool_SRC, self.table = pool.record, pool.items_BRC, table
        self.old_BWC: Tensor | None = None
        self._undo = undo

    @property
    def size(self) -> int:
        return self.pool_SRC.shape[1]

    def items(self, rows_R: Tensor | None, slots: int | None) -> Tensor:
        return self.pool_SRC[:, :slots][self.table.slots if rows_R is None else self.table.slot_B[rows_R]]

    def at(self, slot_BW: Tensor) -> Tensor:
        return self.pool_SRC[self.table.slot_B[:, None], slot_BW]

    def write(self, slot_BW: Tensor, items_BWC: Tensor) -> None:
        index = self.table.slot_B[:, None], slot_BW
        if self._undo:
            self.old_BWC = self.pool_SRC[index]
        self.pool_SRC[index] = items_BWC

    def forget(self, keep_B: Tensor, moves: Moves) -> None:
        if self.old_BWC is None:  # nothing was written: a layer without a window
            return
        slot_BW, index_BW = moves.writes(self.size)
        if index_BW is None:
            index_BW = (moves.tokens - slot_BW.shape[1] + torch.arange(slot_BW.shape[1], device=slot_BW.device)).expand_as(slot_BW)
        index = self.table.slot_B[:, None], slot_BW
        self.pool_SRC[index] = self.old_BWC.where((index_BW >= keep_B[:, None])[..., None], self.pool_SRC[index])


class _PagedStream(Stream):
    """The entries of some sequences, spread over the blocks of a pool."""

    def __init__(self, pages: Stream, tail: Ring, ratio: int, table: _Table):
        self.record, self.tail, self.table, self.ratio = pages.record, tail, table, ratio
        self.count = table.block_tokens // ratio  # entries of a block
        self.pool_EC = pages.records_BMC[0]

    def put(self, row_N: Tensor, slot_N: Tensor, entries_ND: Tensor) -> None:
        if self.table.frozen:
            new_N = slot_N >= self.table.frozen_B[row_N] // self.ratio
            row_N, slot_N, entries_ND = row_N[new_N], slot_N[new_N], entries_ND[new_N]
        place_N = self.table.block_BP[row_N, slot_N // self.count] * self.count + slot_N % self.count
        self.pool_EC[place_N] = ops.pack(entries_ND, self.record)

    @property
    def lies_ready(self) -> bool:
        return super().lies_ready and self.table.run is not None

    def at(self, slot_BM: Tensor) -> Tensor:
        return self.pool_EC[self.table.block_BP.gather(1, slot_BM // self.count) * self.count + slot_BM % self.count]

    def records(self, count: int) -> Tensor:
        if self.table.run is not None:
            begin = self.table.run * self.count
            return self.pool_EC[None, begin:begin + count]
        blocks = -(-count // self.count)
        pages = self.pool_EC.unflatten(0, (-1, self.count))[self.table.block_BP[:, :blocks]]
        return pages.flatten(1, 2)[:, :count]


class _PagedLayer:
    """One layer of a view, in the shape of `fathom.model.cache.LayerCache`."""

    def __init__(self, form: LayerFormat, pages: LayerCache, states: LayerCache, table: _Table, undo: bool, rings: list[_PooledRing]):
        def ring(pool: Ring) -> _PooledRing:
            rings.append(_PooledRing(pool, table, undo))
            return rings[-1]

        self.window = ring(states.window)
        self.entries = self.keys = None
        if form.ratio:
            self.entries = _PagedStream(pages.entries, ring(states.entries.tail), form.ratio, table)
        if form.overlap:
            self.keys = _PagedStream(pages.keys, ring(states.keys.tail), form.ratio, table)
