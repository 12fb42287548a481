"""One source read into a part: its documents that are worth keeping, and what is needed to compare them with others.

A part is a folder that appears when it is whole. It holds the texts as JSON lines and, a row a document, digests,
sizes and signatures. Runs in a process of its own where the recipe asks for several.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fathom.data.corpora import Document, jsonl_suffix, read_rows, read_text, text_pieces
from fathom.data.duplicates import PERMUTATIONS, Contained, digest, signature, word_hashes
from fathom.data.filters import Paragraphs, Templates, fault
from fathom.data.sources import Source, outline, read_source
from fathom.errors import CheckpointError, DataError
from fathom.files import new_folder

DOCUMENTS, DIGESTS, SIZES, SIGNATURES, SUMMARY = "documents.jsonl", "digests.u64", "sizes.i64", "signatures.u32", "part.json"


@dataclass(frozen=True)
class Reading:
    """What reading a source depends on, beside the source's own content."""

    source: Source
    root: Path
    downloads: Path
    seed: int
    compare: bool  # whether signatures for near duplicates are wanted
    templates: bool
    evaluation: tuple[Path, ...]  # files whose content must not be in the documents
    contained: float  # the share of an evaluation text's n-grams from which on a document holds it


@dataclass(frozen=True)
class Part:
    """A source as read: `digests` uint64, `sizes` int64 (bytes) and `signatures` uint32 [, PERMUTATIONS], all [documents]."""

    folder: Path
    digests: np.ndarray
    sizes: np.ndarray
    signatures: np.ndarray
    summary: dict

    @classmethod
    def open(cls, folder: Path) -> "Part":
        """A finished part."""
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return cls(folder, np.fromfile(folder / DIGESTS, np.uint64), np.fromfile(folder / SIZES, np.int64),
                   np.fromfile(folder / SIGNATURES, np.uint32).reshape(-1, PERMUTATIONS), summary)

    def documents(self) -> Iterator[Document]:
        """Its documents, in order."""
        with open(self.folder / DOCUMENTS, encoding="utf-8") as lines:
            for line in lines:
                yield Document(**json.loads(line))


class Losses:
    """Documents and bytes left out, by reason."""

    def __init__(self):
        self.documents: Counter = Counter()
        self.bytes: Counter = Counter()

    def add(self, reason: str, size: int) -> None:
        """Count one document of this many bytes."""
        self.documents[reason] += 1
        self.bytes[reason] += size

    def table(self) -> dict:
        """reason -> documents and bytes, in the order of the alphabet."""
        return {reason: dict(documents=self.documents[reason], bytes=self.bytes[reason]) for reason in sorted(self.documents)}


def read_part(folder: Path, reading: Reading, key: str) -> None:
    """Read a source into `folder`, whole or not at all; DataError where the source cannot be read or gives nothing."""
    source, lost, unread = reading.source, Losses(), Counter()
    evaluation = Contained.of(evaluation_texts(reading.evaluation)) if reading.evaluation and not source.synthetic else None
    paragraphs = Paragraphs()
    count = size = 0
    try:
        with new_folder(folder) as partial, open(partial / DOCUMENTS, "w", encoding="utf-8") as texts, \
                open(partial / DIGESTS, "wb") as digests, open(partial / SIZES, "wb") as sizes, open(partial / SIGNATURES, "wb") as signatures:
            documents = read_source(source, reading.root, reading.downloads, reading.seed, unread)
            for document in _worth_keeping(_cut(documents, source), reading, lost, paragraphs):
                words = word_hashes(document.text) if evaluation or reading.compare else None
                if evaluation and evaluation.found_in(words) >= reading.contained:
                    lost.add("holds an evaluation text", len(document.text.encode()))
                    continue
                bytes_ = len(document.text.encode())
                texts.write(json.dumps(vars(document), ensure_ascii=False) + "\n")
                digests.write(np.uint64(digest(document.text)).tobytes())
                sizes.write(np.int64(bytes_).tobytes())
                compared = reading.compare and not source.synthetic
                signatures.write((signature(words) if compared else np.zeros(PERMUTATIONS, np.uint32)).tobytes())
                count, size = count + 1, size + bytes_
                if count == source.max_documents or source.max_bytes is not None and size >= source.max_bytes:
                    break
            if not count:
                why = ", ".join(f"{reason} ({number})" for reason, number in (lost.documents + unread).most_common(3)) or "empty"
                raise DataError(f"{source.path} holds no text to keep: {why}; take it out, or change its filters")
            for reason, number in unread.items():
                lost.documents[reason] += number
            summary = dict(key=key, documents=count, bytes=size, dropped=lost.table(), repeated_paragraphs=dict(paragraphs.removed))
            (partial / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    except CheckpointError as error:
        raise DataError(f"{error}; free some space or choose another folder") from error


def evaluation_texts(files: Iterable[Path]) -> Iterator[str]:
    """Every field of every row of JSON lines files, and the whole of other text files."""
    for path in files:
        if not path.exists():
            raise DataError(f"{path} does not exist; check the paths of decontaminate")
        if suffix := jsonl_suffix(path.name):
            for row, _ in read_rows(path, suffix):
                yield from map(outline, row.values() if isinstance(row, dict) else [row])
        else:
            yield read_text(path)


def _cut(documents: Iterator[Document], source: Source) -> Iterator[Document]:
    """Documents above the source's limit become several, cut between paragraphs."""
    for document in documents:
        if source.cut_bytes is None or len(document.text) <= source.cut_bytes:
            yield document
            continue
        for number, piece in enumerate(text_pieces(document.text, source.cut_bytes), start=1):
            yield replace(document, text=piece, name=f"{document.name} [{number}]")


def _worth_keeping(documents: Iterator[Document], reading: Reading, lost: Losses, paragraphs: Paragraphs) -> Iterator[Document]:
    """The documents that pass the source's own rules and the filters, repeated paragraphs taken out if it asks so."""
    source, templates = reading.source, Templates()
    for document in documents:
        size = len(document.text.encode())
        if source.allow_licences and not any(word.lower() in document.licence.lower() for word in source.allow_licences):
            lost.add("licence not allowed", size)
            continue
        if source.unique_paragraphs:
            document = replace(document, text=paragraphs.without_known(document.text))
        if len(document.text.encode()) < source.min_bytes:
            lost.add("too short", size)
            continue
        if source.filters and not source.synthetic:
            reason = fault(document.text, source.kind_of(document))
            if reason is None and reading.templates and templates.is_filled_in(document.text):
                reason = "filled-in template"
            if reason is not None:
                lost.add(reason, size)
                continue
        yield document
