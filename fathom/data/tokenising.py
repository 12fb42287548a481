"""A part's documents as token stores: what is trained on, what is held out, and the long ones once more.

Report section 4.1: fill in the middle and token splitting touch only what is trained on.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fathom.data.augment import MIDDLES, TokenSplitter, fill_in_the_middle, tokenizer_pieces
from fathom.data.corpora import Document
from fathom.data.duplicates import Contained, word_hashes
from fathom.data.mixing import Choice
from fathom.data.reading import SUMMARY, Losses, Part
from fathom.data.store import StoreWriter
from fathom.errors import CheckpointError, DataError
from fathom.files import new_folder
from fathom.text.tokenizer import Tokenizer

STORES = ("train", "held_out", "long")
BATCH = 1 << 20  # characters handed to the tokenizer at once
COPIED = 0.5  # share of a document's 13-grams in held-out text from which on it counts as a copy


@dataclass(frozen=True)
class Rates:
    """How documents become tokens: rates (0 to 1) of documents and of tokens, and the seed that picks them."""

    seed: int
    fim: float
    splitting: float
    long_tokens: int | None  # of documents that go to the long store, too


def tokenise_part(folder: Path, part: Part, choice: Choice, tokenizer: Tokenizer, rates: Rates, held_out: Contained | None,
                  key: str, progress: Callable[[int], None]) -> None:
    """Write the stores of a part; `held_out`, if given, is the text of which no trained document may be a copy.

    `progress` is called with the bytes of text done since the last time.
    """
    splitter = TokenSplitter(tokenizer, rates.splitting) if rates.splitting else None
    lost = Losses()
    try:
        with new_folder(folder) as partial:
            writers = {}
            for name in STORES:
                (partial / name).mkdir()
                writers[name] = StoreWriter(partial / name, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
            for document, ids, name, rng in _encoded(_wanted(part, choice, held_out, lost), tokenizer, rates):
                if name == "train" and splitter:
                    ids = splitter.split(ids, rng)
                length = writers[name].add(ids, document)
                if name == "train" and rates.long_tokens is not None and length >= rates.long_tokens:
                    writers["long"].add(ids, document)
                progress(len(document.text.encode()))
            for writer in writers.values():
                writer.finish()
            (partial / SUMMARY).write_text(json.dumps(dict(key=key, dropped=lost.table())), encoding="utf-8")
    except CheckpointError as error:
        raise DataError(f"{error}; free some space or choose another folder") from error


def _wanted(part: Part, choice: Choice, held_out: Contained | None, lost: Losses) -> Iterator[tuple[Document, str, list[int]]]:
    """Every document that is stored, each as often as it is trained on: with its store's name and the seed of its copy."""
    for document, digest, copies, held in zip(part.documents(), part.digests.tolist(), choice.copies.tolist(),
                                              choice.held_out.tolist(), strict=True):
        if held:
            yield document, "held_out", [digest, 0]
        elif copies and held_out and held_out.covers(word_hashes(document.text)) >= COPIED:
            lost.add("copy of held-out text", len(document.text.encode()))
        else:
            for copy in range(copies):
                yield document, "train", [digest, copy]


def _encoded(wanted: Iterator[tuple[Document, str, list[int]]], tokenizer: Tokenizer,
             rates: Rates) -> Iterator[tuple[Document, np.ndarray, str, np.random.Generator]]:
    """Each document with its ids (without bos and eos), its store and its own random numbers; in the same order."""
    middles = [tokenizer.special_ids[token] for token in MIDDLES]
    batch: list[tuple[Document, str, np.random.Generator, tuple[str, ...]]] = []
    size = 0
    for document, name, seed in wanted:
        rng = np.random.default_rng([rates.seed, *seed])
        whole = name == "held_out" or rng.random() >= rates.fim
        batch.append((document, name, rng, (document.text,) if whole else fill_in_the_middle(document.text, rng)))
        size += len(document.text)
        if size >= BATCH:
            yield from _encode(batch, tokenizer, middles)
            batch, size = [], 0
    yield from _encode(batch, tokenizer, middles)


def _encode(batch: Sequence[tuple[Document, str, np.random.Generator, tuple[str, ...]]], tokenizer: Tokenizer,
            middles: list[int]) -> Iterator[tuple[Document, np.ndarray, str, np.random.Generator]]:
    pieces = [[tokenizer_pieces(text) for text in texts] for _, _, _, texts in batch]
    ids = encode_pieces([piece for texts in pieces for text in texts for piece in text], tokenizer)
    for (document, name, rng, texts), cut in zip(batch, pieces, strict=True):
        row = []
        for number, text in enumerate(cut):
            if len(texts) > 1:
                row.append(np.array([middles[number]]))
            row += [next(ids) for _ in text]
        yield document, np.concatenate(row), name, rng


def encode_pieces(pieces: Sequence[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each text, int64 [tokens], with no more than about BATCH characters in the tokenizer at a time."""
    first = size = 0
    for index, piece in enumerate(pieces):
        size += len(piece)
        if size >= BATCH or index == len(pieces) - 1:
            for ids in tokenizer.encode_many(pieces[first:index + 1]):
                yield np.asarray(ids, dtype=np.int64)
            first, size = index + 1, 0
