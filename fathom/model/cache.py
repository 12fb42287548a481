"""The inference cache: what a sequence leaves behind for its later tokens (report 2.3.4, 3.5.1).

Per layer a ring of the last window keys and, where the layer compresses, a stream of entries with the raw tail of
its compressor; the indexer keeps a stream of its own. Only the entries grow with the sequence.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fathom import ops
from fathom.accounting import baseline_channels
from fathom.config import ModelConfig
from fathom.errors import InputError
from fathom.quant.records import EntryRecord, KeyRecord, PlainRecord


class Moves:
    """How one call's new tokens move the rings on: row b's first count_B[b] of `tokens` new items, at positions from start_B[b] on.

    `known` are `whole` and `longest` where tensors are not to be asked: whether no row is padded, and what no row has seen more of.
    """

    def __init__(self, start_B: Tensor, count_B: Tensor, tokens: int, known: tuple[bool, int] | None = None):
        self.start_B, self.count_B, self.tokens = start_B, count_B, tokens
        # what the longest row has seen before: no ring holds more
        self.whole, self.longest = known or (bool((count_B == tokens).all()), int(start_B.max()))
        self._writes: dict[int, tuple[Tensor, Tensor | None]] = {}

    def writes(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Slots [B, W] of a ring of this size that are written, and which new item goes there [B, W], negative for none.

        None for the second where no row is padded: then the last W new items do.
        """
        if size not in self._writes:
            written = min(size, self.tokens)
            index_BW = self.count_B[:, None] - written + torch.arange(written, device=self.count_B.device)
            self._writes[size] = (self.start_B[:, None] + index_BW) % size, None if self.whole else index_BW
        return self._writes[size]


class Tokens(NamedTuple):
    """The N new tokens and what each query may read where every token is kept as it is (the baselines): slots are places of a row."""

    row_N: Tensor
    step_N: Tensor
    slot_N: Tensor
    first_BS: Tensor
    count_BS: Tensor
    kept: int  # per row, for all queries of the call


def _zeros(*shape: int, record: PlainRecord, device: torch.device) -> Tensor:
    """Empty records; on the CPU they take memory only as they are written, so that a large pool costs nothing while unused."""
    shape = *shape, record.width
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=record.dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * record.dtype.itemsize, np.uint8)).view(record.dtype).view(shape)


class Ring:
    """The last R items of each row: position p lies in slot p mod R of `items_BRC`, as a record."""

    def __init__(self, batch: int, size: int, record: PlainRecord, device: torch.device):
        self.record = record
        self.items_BRC = _zeros(batch, size, record=record, device=device)

    def extend(self, new_BSC: Tensor, moves: Moves, rows_R: Tensor | None = None, slots: int | None = None) -> Tensor:
        """The old items followed by the new ones [B, R + S, C]; afterwards the ring holds the newest R of each row.

        Where given, the result has `rows_R` only, and of the old items those in the first `slots` slots. A single new item of a ring
        whose `slots` are given takes its slot first, and the result is those slots [B, R, C]: nothing is copied.
        """
        packed_BSC, in_place = ops.pack(new_BSC, self.record), slots is not None and moves.tokens == 1
        if in_place or (rows_R is not None and not len(rows_R)):
            joined = packed_BSC[:0]  # nobody reads it
        else:
            joined = torch.cat([self.items(rows_R, slots), packed_BSC if rows_R is None else packed_BSC[rows_R]], 1)
        slot_BW, index_BW = moves.writes(self.size)
        if index_BW is None:
            newest_BWC = packed_BSC[:, packed_BSC.shape[1] - slot_BW.shape[1]:]
        else:
            index_BWC = index_BW.clamp(min=0)[..., None].expand(-1, -1, packed_BSC.shape[2])
            newest_BWC = packed_BSC.gather(1, index_BWC).where(index_BW[..., None] >= 0, self.at(slot_BW))
        self.write(slot_BW, newest_BWC)
        return ops.unpack(self.items(rows_R, slots) if in_place else joined, self.record)

    @property
    def size(self) -> int:
        """The number R of slots."""
        return self.items_BRC.shape[1]

    def items(self, rows_R: Tensor | None, slots: int | None) -> Tensor:
        """The items of some rows, or all, in the first `slots` slots, or all."""
        items_BRC = self.items_BRC[:, :slots]
        return items_BRC if rows_R is None else items_BRC[rows_R]

    def at(self, slot_BW: Tensor) -> Tensor:
        """The items in these slots [B, W, C]."""
        return self.items_BRC.gather(1, slot_BW[..., None].expand(-1, -1, self.items_BRC.shape[2]))

    def write(self, slot_BW: Tensor, items_BWC: Tensor) -> None:
        """Replace the items in these slots."""
        self.items_BRC.scatter_(1, slot_BW[..., None].expand_as(items_BWC), items_BWC)


class Stream:
    """What one compressor has produced, `records_BMC`, and the raw tokens its next blocks still need, `tail`."""

    def __init__(self, batch: int, entries: int, record: PlainRecord, tail: Ring):
        self.record, self.tail = record, tail
        self.records_BMC = _zeros(batch, entries, record=record, device=tail.items_BRC.device)

    def put(self, row_N: Tensor, slot_N: Tensor, entries_ND: Tensor) -> None:
        """Keep N new entries."""
        self.records_BMC[row_N, slot_N] = ops.pack(entries_ND, self.record)

    def entries(self, count: int) -> Tensor:
        """The first `count` entries of each row [B, M, D]."""
        return ops.unpack(self.records(count), self.record)

    def records(self, count: int) -> Tensor:
        """The records of each row's first `count` entries [B, M, width]."""
        return self.records_BMC[:, :count]

    def read(self, count: int, selected_BSK: Tensor | None) -> tuple[Tensor | ops.Recorded, Tensor | None]:
        """What queries read of each row's first `count` entries, and the selection's slots there (-1: none).

        That is all of them [B, M, D] or, where those would be copied and a selection is smaller, its own [B, S K, D], query by query.
        Packed index keys stay so: one pass over them is all that they are for.
        """
        if type(self.record) is KeyRecord:
            return ops.Recorded(self.records(count), self.record), None
        if selected_BSK is None or self.lies_ready or math.prod(selected_BSK.shape[1:]) >= count:
            return self.entries(count), selected_BSK
        slot_BM = selected_BSK.flatten(1)
        place_SK = torch.arange(slot_BM.shape[1], device=slot_BM.device).view(selected_BSK.shape[1:])
        return ops.unpack(self.at(slot_BM.clamp(min=0)), self.record), place_SK.where(selected_BSK >= 0, -1)

    @property
    def lies_ready(self) -> bool:
        """Whether `entries` copies nothing."""
        return type(self.record) is PlainRecord

    def at(self, slot_BM: Tensor) -> Tensor:
        """The records in these slots [B, M, width]."""
        return self.records_BMC[torch.arange(len(slot_BM), device=slot_BM.device)[:, None], slot_BM]

    def extend(self, new_BSD: Tensor, tokens: Tokens) -> Tensor:
        """Keep every new token as an entry of its own; all so far [B, M, D]."""
        self.put(tokens.row_N, tokens.slot_N, new_BSD[tokens.row_N, tokens.step_N])
        return self.entries(tokens.kept)


class LayerFormat(NamedTuple):
    """How one layer's state lies in memory: records of window keys, entries and index keys, and of the compressors' raw tokens."""

    window: PlainRecord
    window_size: int
    ratio: int  # 0: no entries
    overlap: bool  # CSA: with index keys
    entry: PlainRecord
    key: PlainRecord
    entry_tail: PlainRecord
    key_tail: PlainRecord

    @classmethod
    def of(cls, config: ModelConfig, layer: int, dtype: torch.dtype, quantized: bool) -> "LayerFormat":
        """The format of a layer; layers from num_hidden_layers on are the MTP blocks."""
        entry, key = PlainRecord(config.head_dim, dtype), PlainRecord(config.index_head_dim, dtype)
        if config.attention != "v4":  # every token is an entry, and there is no window and no tail
            entry, nothing = PlainRecord(baseline_channels(config), dtype), PlainRecord(0, dtype)
            return cls(nothing, 1, 1, config.attention == "dsa", entry, key, nothing, nothing)
        if quantized:
            entry = EntryRecord(config.head_dim, config.qk_rope_head_dim, dtype)
            key = KeyRecord(config.index_head_dim, dtype)
        overlap = config.kind(layer) == "csa"
        raw = 4 if overlap else 2  # value and score, in halves where blocks overlap
        tails = (PlainRecord(raw * channels, torch.promote_types(dtype, torch.float32))
                 for channels in (config.head_dim, config.index_head_dim))
        return cls(entry, config.sliding_window, config.ratio(layer), overlap, entry, key, *tails)

    @property
    def tail_size(self) -> int:
        """Raw tokens that a compressor keeps: of the unfinished block and, with overlap, of the one before."""
        return 2 * self.ratio if self.overlap else self.ratio


class LayerCache:
    """One layer's window ring, entries and indexer keys."""

    def __init__(self, form: LayerFormat, batch: int, max_tokens: int, device: torch.device):
        def stream(record: PlainRecord, tail: PlainRecord) -> Stream:
            return Stream(batch, max_tokens // form.ratio, record, Ring(batch, form.tail_size, tail, device))

        self.window = Ring(batch, form.window_size, form.window, device)
        self.entries = stream(form.entry, form.entry_tail) if form.ratio else None
        self.keys = stream(form.key, form.key_tail) if form.overlap else None


class Cache:
    """The state of `batch` sequences of up to `max_tokens` tokens each; `length_B` says how many each row has seen.

    `quantized` keeps window keys and entries in FP8 with BF16 rotary channels, and index keys in MXFP4, as released.
    Raises InputError where max_tokens exceeds max_position_embeddings.
    """

    def __init__(self, config: ModelConfig, batch: int, max_tokens: int, dtype: torch.dtype, device: torch.device,
                 quantized: bool = False):
        if batch < 1 or max_tokens < 1:
            raise InputError(f"a cache needs a batch and a length of at least 1, not {batch} and {max_tokens}")
        if max_tokens > config.max_position_embeddings:
            raise InputError(f"a cache of {max_tokens} tokens exceeds the model's max_position_embeddings of "
                             f"{config.max_position_embeddings}")
        self.max_tokens = max_tokens
        self.length_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.layers = [LayerCache(LayerFormat.of(config, layer, dtype, quantized), batch, max_tokens, device)
                       for layer in range(config.num_hidden_layers)]

    def advance(self, count_B: Tensor) -> None:
        """Record that each row has seen count_B more tokens."""
        self.length_B += count_B

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the cache."""
        rings = [layer.window.items_BRC for layer in self.layers]
        streams = [stream for layer in self.layers for stream in (layer.entries, layer.keys) if stream is not None]
        return sum(tensor.nbytes for tensor in
                   rings + [stream.records_BMC for stream in streams] + [stream.tail.items_BRC for stream in streams])
