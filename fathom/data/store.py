"""A corpus as memory-mapped token ids on disk, with a manifest that says exactly what is in it.

Report section 4.1 (data). Written whole or not at all, reused while its content, tokenizer and settings stay the
same, and checked when opened. Knows no tokenizer: it is handed a function that encodes texts.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from fathom.data.corpora import Document
from fathom.errors import CheckpointError, DataError
from fathom.files import new_folder, sha256

FORMAT = 1
MANIFEST, TOKENS, DOCUMENTS = "manifest.json", "tokens.bin", "documents.npy"
BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once: enough to keep its threads busy
EncodeMany = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class TokenStore:
    """All documents end to end, each as bos + tokens + eos.

    `tokens` [total] is memory-mapped (uint16 or uint32); `lengths` [documents] counts tokens with bos and eos,
    `byte_lengths` [documents] the UTF-8 bytes of each text (both int64); `starts` [documents] points into `tokens`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    byte_lengths: np.ndarray
    starts: np.ndarray
    manifest: dict

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> "TokenStore":
        """Open a store, checking sizes, and with `verify` the checksums too; DataError if it is missing or damaged."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            _check_file(folder / name, expected, verify)
        lengths, byte_lengths = np.load(folder / DOCUMENTS).T.copy()
        tokens = np.memmap(folder / TOKENS, manifest["dtype"], mode="r").view(np.ndarray)
        if len(tokens) != lengths.sum():
            raise DataError(f"{folder} disagrees with itself: {len(tokens)} tokens, {lengths.sum()} listed; delete it "
                            "and prepare the data again")
        return cls(tokens, lengths, byte_lengths, np.cumsum(lengths) - lengths, manifest)

    @property
    def total_tokens(self) -> int:
        """Tokens of all documents, with their bos and eos."""
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        """Token ids [length] of one document, bos and eos included; a view into the file."""
        return self.tokens[self.starts[index]:self.starts[index] + self.lengths[index]]


def build_store(folder: str | Path, documents: Sequence[Document], encode_many: EncodeMany, *, bos_id: int, eos_id: int,
                vocab_size: int, fingerprint: str, settings: dict | None = None,
                progress: Callable[[int], None] | None = None) -> TokenStore:
    """Tokenise `documents` into `folder`, or open what stands there if it holds exactly this.

    `encode_many` maps texts to ids without bos and eos; `fingerprint` names the tokenizer; `settings` is whatever else
    the content depends on; `progress` is called with the bytes of text done so far. Raises DataError if there is
    nothing to store, an id lies outside the vocabulary, or the folder cannot be written (it is then left as it was).
    """
    folder = Path(folder)
    if not documents:
        raise DataError(f"no documents to store in {folder}; check the sources and the held-out share")
    identity = dict(format=FORMAT, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size, fingerprint=fingerprint,
                    settings=settings or {})
    key = _content_key(documents, identity)
    if folder.exists() and not (folder / MANIFEST).exists():
        raise DataError(f"{folder} exists and is no token store; choose another folder, or delete it first")
    if folder.exists():
        try:
            store = TokenStore.open(folder)
            if store.manifest["key"] == key:
                return store
        except DataError:
            pass  # damaged: written anew below
    try:
        with new_folder(folder) as partial:
            sizes = [len(document.text.encode()) for document in documents]
            done = [0, *accumulate(sizes)]
            with StoreWriter(partial, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size) as writer:
                for first, last in _batches(sizes):
                    batch = documents[first:last]
                    for document, ids in zip(batch, encode_many([document.text for document in batch]), strict=True):
                        writer.add(ids, document)
                    if progress:
                        progress(done[last])
                writer.finish(key=key, **identity)
    except CheckpointError as error:
        raise DataError(f"{error}; free some space or choose another folder") from error
    return TokenStore.open(folder)


class StoreWriter:
    """Writes a store document by document into a folder that nobody reads yet; memory grows by 16 bytes a document.

    `add` takes ids without bos and eos, and raises DataError for one outside the vocabulary. `finish` writes the tables
    and the manifest, which gets the fields it is given; without it the folder is no store. A context manager.
    """

    def __init__(self, folder: Path, *, bos_id: int, eos_id: int, vocab_size: int):
        self.folder, self.bos_id, self.eos_id, self.vocab_size = folder, bos_id, eos_id, vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.rows, self._tables = array("q"), {"sources": {}, "licences": {}}
        self._file = open(folder / TOKENS, "wb")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, ids: Sequence[int] | np.ndarray, document: Document) -> int:
        """Store one document's ids between bos and eos; returns how many tokens that makes."""
        row = _checked(np.concatenate([[self.bos_id], np.asarray(ids, dtype=np.int64), [self.eos_id]]), self.vocab_size).astype(self.dtype)
        size = len(document.text.encode())
        self._file.write(row.tobytes())
        self.rows.extend((len(row), size))
        for table, name in (("sources", document.source), ("licences", document.licence)):
            self._count(table, name, documents=1, tokens=len(row), bytes=size)
        return len(row)

    def extend(self, folder: Path) -> None:
        """Store all documents of a finished store of the same vocabulary, in their order."""
        manifest = _read_manifest(folder)
        with open(folder / TOKENS, "rb") as tokens:
            shutil.copyfileobj(tokens, self._file, 1 << 20)
        self.rows.frombytes(np.load(folder / DOCUMENTS).astype(np.int64).tobytes())
        for table in self._tables:
            for name, counts in manifest[table].items():
                self._count(table, name, **counts)

    def _count(self, table: str, name: str, **amounts: int) -> None:
        counts = self._tables[table].setdefault(name, dict(documents=0, tokens=0, bytes=0))
        for field, amount in amounts.items():
            counts[field] += amount

    def finish(self, **manifest) -> int:
        """Write documents and manifest, with these fields; the store is whole after this. Returns its documents."""
        self._file.close()
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, 2)
        np.save(self.folder / DOCUMENTS, rows)
        tokens, size = rows.sum(axis=0).tolist()
        manifest = dict(format=FORMAT, bos_id=self.bos_id, eos_id=self.eos_id, vocab_size=self.vocab_size) | manifest
        manifest |= dict(dtype=self.dtype.str, documents=len(rows), tokens=tokens, bytes=size, **self._tables)
        manifest["files"] = {name: dict(bytes=(self.folder / name).stat().st_size, sha256=sha256(self.folder / name))
                             for name in (TOKENS, DOCUMENTS)}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        return len(rows)


def _content_key(documents: Sequence[Document], identity: dict) -> str:
    """Hex digest of everything that the store depends on."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for document in documents:
        digest.update(json.dumps([document.source, document.licence, document.name, document.text]).encode())
    return digest.hexdigest()


def _batches(byte_lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about BATCH_BYTES each."""
    first, size = 0, 0
    for index, length in enumerate(byte_lengths):
        size += length
        if size >= BATCH_BYTES or index == len(byte_lengths) - 1:
            yield first, index + 1
            first, size = index + 1, 0


def _checked(ids: list[int], vocab_size: int) -> np.ndarray:
    row = np.asarray(ids, dtype=np.int64)
    if row.min() < 0 or row.max() >= vocab_size:
        wrong = row.min() if row.min() < 0 else row.max()
        raise DataError(f"token id {wrong} lies outside the vocabulary of {vocab_size}; use the model's own tokenizer")
    return row


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder} is no token store (no readable {MANIFEST}); prepare the data first") from error
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST} is damaged; delete {folder} and prepare the data again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{folder} was not written in store format {FORMAT}; delete it and prepare the data again")
    return manifest


def _check_file(path: Path, expected: dict, verify: bool) -> None:
    if not path.exists():
        raise DataError(f"{path} is missing; delete its folder and prepare the data again")
    if path.stat().st_size != expected["bytes"]:
        raise DataError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}; delete its folder and "
                        "prepare the data again")
    if verify and sha256(path) != expected["sha256"]:
        raise DataError(f"{path} does not match its checksum; delete its folder and prepare the data again")
