"""Documents packed into training rows: best fit, little padding, no document cut without need.

Report section 4.1 (packing with sample-level attention). A batch says where each document starts by its positions
alone, which restart at 0. Knows no corpus, tokenizer or model; a batch depends on the seed and its number only.
"""

import dataclasses
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fathom.errors import DataError
from fathom.ops import IGNORE


class Tokens(Protocol):
    """Documents end to end: `tokens` [total] integer ids, `lengths` [documents] int64."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One training batch, all int64 [B, S]; padding is a document of its own that predicts nothing."""

    tokens_BS: Tensor
    targets_BS: Tensor  # the next token of the same document, or IGNORE
    positions_BS: Tensor  # restart at 0 where a document, or a piece of a long one, begins

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)})


@dataclass
class PackedData:
    """Rows of `sequence_length` from all documents, in a new order every epoch.

    A document is cut into pieces of at most `sequence_length` inputs that overlap by one token, so that every token
    but a document's first is a target exactly once an epoch. `is_target` [total] bool, if given, limits the targets.
    """

    store: Tokens
    sequence_length: int
    seed: int
    pad_id: int
    is_target: np.ndarray | None = None

    def __post_init__(self):
        if self.sequence_length < 1:
            raise DataError(f"sequence length {self.sequence_length} must be at least 1")
        starts, lengths = cut_pieces(self.store.lengths, self.sequence_length)
        if not len(lengths):
            raise DataError("no document has two tokens, so there is nothing to predict; check the sources")
        rows, self._row_ends = best_fit(lengths, self.sequence_length)
        self._starts, self._lengths = starts[rows], lengths[rows]

    @property
    def efficiency(self) -> float:
        """Share of the positions that hold a token rather than padding."""
        return int(self._lengths.sum()) / (len(self._row_ends) * self.sequence_length)

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows that hold every piece once; the same in every epoch, since only the order changes."""
        return len(self._row_ends)

    def batch(self, step: int, batch_size: int) -> Batch:
        """Batch number `step` (from 0) of `batch_size` rows: a pure function of the seed and its arguments."""
        return self.rows(step * batch_size, batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows from row `first` on, counted over all epochs: what a growing batch size asks for."""
        S, total = self.sequence_length, len(self._row_ends)
        epochs, within = np.divmod(np.arange(first, first + count), total)
        row_B = np.concatenate([_epoch_order(self.seed, epoch, total)[within[epochs == epoch]]
                                for epoch in np.unique(epochs).tolist()])
        ends_B = self._row_ends[row_B]
        pieces_B = ends_B - np.where(row_B > 0, self._row_ends[row_B - 1], 0)
        piece_P = _ranges(ends_B - pieces_B, pieces_B)
        lengths_P = self._lengths[piece_P]
        # A row's pieces lie side by side from its left edge: one running count of positions, less the earlier rows'.
        before_P = np.cumsum(lengths_P) - lengths_P
        row_of_P = np.repeat(np.arange(count), pieces_B)
        first_of_P = np.repeat(before_P[np.cumsum(pieces_B) - pieces_B], pieces_B)
        to = _ranges(row_of_P * S + before_P - first_of_P, lengths_P)
        source = _ranges(self._starts[piece_P], lengths_P)

        tokens, targets, positions = (np.full(count * S, fill, dtype=np.int64) for fill in (self.pad_id, IGNORE, 0))
        tokens[to] = self.store.tokens[source]
        targets[to] = self.store.tokens[source + 1]
        positions[to] = _ranges(np.zeros_like(lengths_P), lengths_P)
        if self.is_target is not None:
            targets[to[~self.is_target[source + 1]]] = IGNORE
        return Batch(*(torch.from_numpy(array.reshape(count, S)) for array in (tokens, targets, positions)))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def cut_pieces(document_lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Start in the token stream and number of inputs of every piece, both int64 [pieces], in document order."""
    inputs = np.maximum(document_lengths - 1, 0)
    counts = -(-inputs // sequence_length)
    document = np.repeat(np.arange(len(inputs)), counts)
    offset = _ranges(np.zeros_like(counts), counts) * sequence_length
    starts = (np.cumsum(document_lengths) - document_lengths)[document] + offset
    return starts, np.minimum(sequence_length, inputs[document] - offset)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces, longest first, each into the fullest row that still takes it.

    Returns the pieces [pieces] row after row, and where each row ends in that list [rows], both int64.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows with that room
    rooms: list[int] = []  # the keys of by_room, sorted
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - length
        if left and left in by_room:
            by_room[left].append(row)
        elif left:
            by_room[left] = [row]
            insort(rooms, left)
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated arange(start, start + length), int64 [sum of lengths]."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
