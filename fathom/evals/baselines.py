"""What a trained model must beat: compressors and a byte n-gram, all in bits per byte of held-out text.

Section 4 of the report counts in bits per byte too. Knows bytes only: no tokens, no model.
"""

import gzip
import lzma
from dataclasses import dataclass

import numpy as np

from fathom.errors import DataError

LONGEST_ORDER = 8  # bytes in a 64-bit code


def gzip_bits_per_byte(held_out: bytes) -> float:
    """Bits per byte of `gzip -9` on the held-out text alone; its 32 KB window could not hold training text anyway."""
    _require(held_out, "held-out")
    return 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)


def lzma_bits_per_byte(held_out: bytes, train: bytes) -> float:
    """Bits per byte that held-out text adds to the LZMA (xz) archive of the training text: a window over all of it."""
    _require(held_out, "held-out")
    window = min(max(len(train) + len(held_out), 1 << 16), 1 << 30)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    sizes = [len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters)) for text in (train, train + held_out)]
    return 8 * (sizes[1] - sizes[0]) / len(held_out)


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int) -> float:
    """Bits per byte of an interpolated Kneser-Ney byte n-gram: each byte from the `order` - 1 before it.

    `order` is 1 to 8. The counts come from `train` only. Chen and Goodman (1999), one discount per level.
    """
    _require(held_out, "held-out")
    return float(-np.log2(byte_probabilities(ngram_levels(train, order), held_out)).mean())


@dataclass(frozen=True)
class Level:
    """Counts of the n-grams of one length, as sorted 64-bit codes (the last byte lowest).

    `gram` and `count` [grams]; `context` (the gram without its last byte), `total` (sum of the counts below it) and
    `followers` (distinct next bytes) [contexts]; `discount` is taken from every count.
    """

    gram: np.ndarray
    count: np.ndarray
    context: np.ndarray
    total: np.ndarray
    followers: np.ndarray
    discount: float


def ngram_levels(train: bytes, order: int) -> list[Level]:
    """The levels of length 1 to `order`: occurrences at the top, below it how many bytes a gram is known to follow."""
    if not 1 <= order <= LONGEST_ORDER:
        raise DataError(f"n-gram order {order} must be 1 to {LONGEST_ORDER}")
    if len(train) < order:
        raise DataError(f"training text of {len(train)} bytes is shorter than n-gram order {order}; add text")
    gram, count = np.unique(_codes(train, order), return_counts=True)
    levels = [_level(gram, count)]
    for length in range(order - 1, 0, -1):
        gram, count = np.unique(gram & np.uint64((1 << 8 * length) - 1), return_counts=True)
        levels.append(_level(gram, count))
    return levels[::-1]


def byte_probabilities(levels: list[Level], text: bytes) -> np.ndarray:
    """Probability of every byte of `text` given those before it, float64 [bytes]; over 256 bytes they sum to 1.

    Per level: P(c | h) = (count(hc) - discount) / total(h) + discount followers(h) / total(h) P(c | h without its
    first byte); an unknown h changes nothing, and below the first level stands 1/256.
    """
    probability = np.full(len(text), 1 / 256)
    for length, level in enumerate(levels, start=1):
        code = _codes(text, length)
        (count,) = _look_up(level.gram, code, level.count)
        total, followers = _look_up(level.context, code >> np.uint64(8), level.total, level.followers)
        lower = probability[length - 1:]
        seen = np.maximum(count - level.discount, 0) + level.discount * followers * lower
        probability[length - 1:] = np.where(total > 0, seen / np.maximum(total, 1), lower)
    return probability


def _codes(text: bytes, length: int) -> np.ndarray:
    """The 64-bit code of the `length` bytes at every place, uint64 [bytes - length + 1]."""
    values = np.frombuffer(text, dtype=np.uint8)
    places = max(len(values) - length + 1, 0)
    code = np.zeros(places, dtype=np.uint64)
    for offset in range(length):
        code = code << np.uint64(8) | values[offset:offset + places]
    return code


def _level(gram: np.ndarray, count: np.ndarray) -> Level:
    context, first = np.unique(gram >> np.uint64(8), return_index=True)
    once, twice = (count == 1).sum(), (count == 2).sum()
    discount = (once + 1) / (once + 2 * twice + 2)  # Ney's estimate, kept off 0 and 1 where counts are few
    return Level(gram, count, context, np.add.reduceat(count, first), np.diff(first, append=len(gram)), float(discount))


def _look_up(keys: np.ndarray, wanted: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """For every wanted code the columns' entries, 0 where the code is unknown; `keys` are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    known = keys[place] == wanted
    return tuple(np.where(known, column[place], 0) for column in columns)


def _require(text: bytes, which: str) -> None:
    if not text:
        raise DataError(f"the {which} text is empty; raise the held-out share or add text")
