"""What two texts share: exact copies, near copies (MinHash and locality-sensitive hashing), copies of given texts.

Report section 4.1 (data construction). Texts become arrays of hashes of n words in a row, the same on every machine;
only those are compared. Knows no files and no tokens.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fathom.errors import DataError

try:
    import rensa
except ImportError:
    rensa = None

PERMUTATIONS, BANDS = 128, 32  # texts that share 0.8 of their shingles meet in some band all but once in 20 million
SHINGLE, OVERLAP = 5, 13  # words in a row: for near copies; for copies of evaluation sets, as in GPT-3 (appendix C)
_WORD, _SPACE, _CHUNK = re.compile(r"\w+"), re.compile(r"\s"), 1 << 20
_MULTIPLIER, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


class _Checksums(dict):
    """CRC-32 of a word, computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1 << 20:
            self.clear()
        self[word] = value = zlib.crc32(word.encode())
        return value


_CHECKSUMS = _Checksums()


def digest(text: str) -> int:
    """64 bits of the SHA-256 of a text, runs of white space counted as one blank."""
    return int.from_bytes(hashlib.sha256(" ".join(text.split()).encode()).digest()[:8], "big")


def word_hashes(text: str) -> np.ndarray:
    """A hash of each word, without case, in order: uint64 [words]."""
    parts, start = [], 0
    while start < len(text):
        space = _SPACE.search(text, start + _CHUNK)  # a long text in chunks: a list of all its words would be large
        end = space.end() if space else len(text)
        words = _WORD.findall(text[start:end].lower())
        parts.append(np.fromiter(map(_CHECKSUMS.__getitem__, words), dtype=np.uint64, count=len(words)))
        start = end
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n words in a row, uint64 [words - n + 1]; of all words together where there are fewer."""
    n = min(n, len(words))
    count = len(words) - n + 1 if n else 0
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _MULTIPLIER + words[offset:offset + count]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    return hashes ^ hashes >> np.uint64(32)


def signature(words: np.ndarray) -> np.ndarray:
    """The MinHash of a text's shingles, uint32 [PERMUTATIONS]; DataError where rensa is missing."""
    if rensa is None:
        raise DataError("near duplicates need more packages; run: pip install 'fathom[data]', or set near_duplicates=0")
    shingles = np.unique(ngram_hashes(words, SHINGLE))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, np.array([0, len(shingles)], dtype=np.uint64), PERMUTATIONS, 1)
    return np.array(matrix.to_rows()[0], dtype=np.uint32)


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each text the earlier one that it is a near copy of, or -1: int64 [texts].

    `signatures` is uint32 [texts, PERMUTATIONS]; two texts are near copies where they agree in at least `threshold`
    of the places, which estimates the share of their shingles that both have. The first of a family is nobody's copy.
    """
    twin = np.full(len(signatures), -1, dtype=np.int64)
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        keys = _row_hashes(signatures[:, band * width:(band + 1) * width])
        order = np.argsort(keys, kind="stable")
        borders = np.flatnonzero(np.diff(keys[order])) + 1
        for group in np.split(order, borders):
            while len(group) > 1:
                leader, group = group[0], group[1:]
                alike = (signatures[group] == signatures[leader]).mean(axis=1) >= threshold
                fresh = group[alike]
                twin[fresh] = np.where(twin[fresh] < 0, leader, np.minimum(twin[fresh], leader))
                group = group[~alike]
    return twin


def _row_hashes(rows: np.ndarray) -> np.ndarray:
    """One hash a row of a uint32 matrix [rows, columns]: uint64 [rows]."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        hashes = hashes * _MULTIPLIER + column
    return hashes


@dataclass(frozen=True)
class Contained:
    """Texts to be recognised inside others: their n-grams with the text each is from, sorted by hash."""

    hashes: np.ndarray  # uint64 [n-grams]
    items: np.ndarray  # int64 [n-grams]: which text
    sizes: np.ndarray  # int64 [texts]: n-grams of each
    too_short: int  # texts with fewer than OVERLAP words, which are not looked for

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Contained":
        """The texts' distinct n-grams."""
        hashes, sizes, too_short = [], [], 0
        for text in texts:
            words = word_hashes(text)
            if len(words) < OVERLAP:
                too_short += 1
                continue
            hashes.append(np.unique(ngram_hashes(words, OVERLAP)))
            sizes.append(len(hashes[-1]))
        flat = np.concatenate([*hashes, np.zeros(0, dtype=np.uint64)])
        items, order = np.repeat(np.arange(len(sizes)), sizes), np.argsort(flat, kind="stable")
        return cls(flat[order], items[order], np.array(sizes, dtype=np.int64), too_short)

    def found_in(self, words: np.ndarray) -> float:
        """The largest share (0 to 1) of any one text's n-grams that occur in a text of these word hashes [words]."""
        shared = self._shared(words)
        if not len(shared):
            return 0.0
        first, last = (np.searchsorted(self.hashes, shared, side) for side in ("left", "right"))
        places = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        counts = np.bincount(self.items[places], minlength=len(self.sizes))
        return float((counts / self.sizes).max())

    def covers(self, words: np.ndarray) -> float:
        """The share (0 to 1) of the n-grams of a text of these word hashes [words] that any of the texts has."""
        if len(words) < OVERLAP or not len(self.hashes):
            return 0.0
        return len(self._shared(words)) / len(np.unique(ngram_hashes(words, OVERLAP)))

    def _shared(self, words: np.ndarray) -> np.ndarray:
        if len(words) < OVERLAP or not len(self.hashes):
            return np.zeros(0, dtype=np.uint64)
        own = np.unique(ngram_hashes(words, OVERLAP))
        places = np.minimum(np.searchsorted(self.hashes, own), len(self.hashes) - 1)
        return own[self.hashes[places] == own]


def first_of_each(digests: Sequence[int] | np.ndarray) -> np.ndarray:
    """Whether each digest is the first of its value: bool [texts]."""
    digests = np.asarray(digests, dtype=np.uint64)
    first = np.zeros(len(digests), dtype=bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first
