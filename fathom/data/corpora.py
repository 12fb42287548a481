"""Where text comes from: files, folders, JSON lines and installed packages become documents with provenance.

Report section 4.1 (data construction). Reads and cuts text only; knows nothing of tokens, rows or training.
"""

import gzip
import hashlib
import importlib.metadata
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fathom.errors import DataError

try:
    import zstandard
except ImportError:
    zstandard = None

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".toml", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
                 ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql", ".html", ".css", ".jl", ".R", ".lean")
OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open,
           ".jsonl.zst": zstandard.open if zstandard else None}
UNSTATED = "unstated"


@dataclass(frozen=True)
class Document:
    """One text with its provenance: the source it was listed under, its licence, its name inside the source."""

    text: str
    source: str
    licence: str = UNSTATED
    name: str = ""


def read_documents(sources: Sequence[str], root: Path) -> Iterator[Document]:
    """The documents of all sources, in order; the same files give the same documents in the same order.

    A source is a text file, a folder (its text files, sorted by path, hidden ones left out), a `.jsonl` file, plain
    or as `.gz`, `.xz` or `.zst` (field "text"; optional "source", "licence", "name"), or `package:NAME` (the Python
    files of an installed distribution, without its tests). Relative paths start at `root`. Empty texts are left out.
    Raises DataError for what is missing, unreadable, not UTF-8 text, or holds no text at all.
    """
    for source in sources:
        found = False
        for document in _read_source(source, Path(root) / source):
            if document.text.strip():
                found = True
                yield document
        if not found:
            raise DataError(f"{source} holds no text; take it out of the sources or point it at other files")


def split_held_out(documents: Iterable[Document], share: float,
                   piece_bytes: int = 32768) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: pieces of about `piece_bytes` go to either side by the hash of their text.

    Pieces end between paragraphs, so a corpus of a few novels still has a fair held-out part. Equal pieces land on the
    same side, and neighbouring training pieces are joined again. About `share` (0 to 1) of the pieces is held out,
    at least one; DataError if that would leave nothing to train on.
    """
    if not 0 < share < 1:
        raise DataError(f"held-out share {share} must lie between 0 and 1")
    cut = [(document, list(text_pieces(document.text, piece_bytes))) for document in documents]
    digest_of = {piece: hashlib.sha256(piece.encode()).digest() for _, pieces in cut for piece in pieces}
    least = min(digest_of.values(), default=b"")
    train, held_out = [], []
    for document, pieces in cut:
        run: list[str] = []
        for number, piece in enumerate(pieces, start=1):
            digest = digest_of[piece]
            if int.from_bytes(digest[:8], "big") >= share * 2**64 and digest != least:
                run.append(piece)
                continue
            train += _joined(document, run, number - len(run), len(pieces))
            held_out += _joined(document, [piece], number, len(pieces))
            run = []
        train += _joined(document, run, len(pieces) + 1 - len(run), len(pieces))
    if not train:
        raise DataError(f"too little text to hold any out: {len(digest_of)} pieces of {piece_bytes} bytes; "
                        "add text, or lower the piece size")
    return train, held_out


def text_pieces(text: str, piece_bytes: int) -> Iterator[str]:
    """Cut before the first paragraph after `piece_bytes`, or any line after twice as many; pieces join to `text`."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if line.strip() and (size >= 2 * piece_bytes or size >= piece_bytes and not piece[-1].strip()):
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line.encode())
    if piece:
        yield "".join(piece)


def _joined(document: Document, pieces: list[str], first: int, count: int) -> list[Document]:
    """The document of a run of pieces, none if the run is empty; its name tells which pieces of how many."""
    if not pieces or len(pieces) == count:
        return [document] if pieces else []
    last = first + len(pieces) - 1
    return [replace(document, text="".join(pieces), name=f"{document.name} [{first}-{last} of {count}]".strip())]


def _read_source(source: str, path: Path) -> Iterator[Document]:
    package, suffix = source.removeprefix("package:"), jsonl_suffix(source)
    if package != source:
        yield from _read_package(source, package)
    elif not path.exists():
        raise DataError(f"{path} does not exist; check the path among the sources")
    elif suffix:
        for row, place in read_rows(path, suffix):
            yield _row_document(row, source, place)
    elif path.is_dir():
        for file in text_files(path):
            yield Document(read_text(file), source, name=file.relative_to(path).as_posix())
    else:
        yield Document(read_text(path), source, name=path.name)


def jsonl_suffix(source: str) -> str | None:
    """The ending by which a file is JSON lines, plain or compressed, or None."""
    return next((suffix for suffix in OPENERS if source.endswith(suffix)), None)


def text_files(folder: Path) -> list[Path]:
    """All files below `folder` with a text suffix, sorted by path; hidden files and folders left out."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if name.endswith(TEXT_SUFFIXES) and not name.startswith(".")]
    return sorted(files)


def _read_package(source: str, package: str) -> Iterator[Document]:
    distribution = installed(package)
    licence = package_licence(distribution.metadata)
    for file in python_files(distribution):
        yield Document(read_text(Path(file.locate())), source, licence, str(file))


def installed(package: str) -> importlib.metadata.Distribution:
    """An installed distribution; DataError where there is none of this name."""
    try:
        return importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise DataError(f"package:{package} is not installed; run: pip install {package}") from error


def python_files(distribution: importlib.metadata.Distribution) -> list[importlib.metadata.PackagePath]:
    """A distribution's Python files without its tests, sorted by path."""
    return [file for file in sorted(distribution.files or [], key=str)
            if file.suffix == ".py" and not {"..", "tests", "test"} & set(file.parts)]


def package_licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """A package's licence: the expression, else the licence classifier, else the first line of the free-text field."""
    classifiers = [entry for entry in metadata.get_all("Classifier") or [] if entry.startswith("License ::")]
    named = metadata.get("License-Expression") or " or ".join(entry.split(" :: ")[-1] for entry in classifiers)
    return named or (metadata.get("License") or "").partition("\n")[0].strip() or UNSTATED


def read_text(path: Path) -> str:
    """A file's UTF-8 text; DataError where it is missing, binary or in another encoding."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    if "\0" in text:
        raise DataError(f"{path} is a binary file, not text; leave it out of the sources")
    return text


def read_rows(path: Path, suffix: str) -> Iterator[tuple[Any, str]]:
    """The parsed lines of a JSON lines file, each with the place where it stands; DataError for what is damaged."""
    opener = OPENERS[suffix]
    if opener is None:
        raise DataError(f"{path} needs the zstandard package; run: pip install zstandard")
    damage = (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
    damage += (zstandard.ZstdError,) if zstandard else ()
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield _parsed(line, place), place
    except damage as error:
        raise DataError(f"cannot read {path}: damaged, or not {suffix[1:]} in UTF-8 ({error}); get it again") from error


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); write one JSON object a line") from error


def _row_document(row: Any, source: str, place: str) -> Document:
    fields = {"text": None, "source": source, "licence": UNSTATED, "name": ""}
    values = {key: row.get(key, default) for key, default in fields.items()} if isinstance(row, dict) else {}
    if not values or not all(isinstance(value, str) for value in values.values()):
        raise DataError(f'{place} needs a string "text" (and strings for "source", "licence" and "name" if given)')
    check_text(values["text"], place)
    return Document(**values)


def check_text(text: str, place: str) -> None:
    """DataError where a text from JSON holds half a surrogate pair, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds half a surrogate pair, which is no UTF-8 text; repair it") from error
