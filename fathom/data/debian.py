"""Documentation in Debian packages -> documents: asked of the machine's apt, read from the .deb files without dpkg.

Packages come from the mirror that apt is set up with and nothing is installed; the licence is what each package's
copyright file says. Works on Debian and what descends from it.
"""

import gzip
import io
import lzma
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fathom.data.corpora import TEXT_SUFFIXES, UNSTATED, Document
from fathom.data.html import html_text
from fathom.errors import DataError
from fathom.files import sha256

try:
    import zstandard
except ImportError:
    zstandard = None

# Large, well written, permissive or public domain: about 150 MB of text from 60 MB of packages.
PACKAGES = ("python3.11-doc", "rust-doc", "dict-wn", "racket-doc", "libboost1.81-doc", "erlang-doc", "nodejs-doc",
            "postgresql-doc-15", "sqlite3-doc", "python-django-doc", "python-sympy-doc", "apache2-doc", "dict-jargon")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
PLAIN_SUFFIXES = (*(suffix for suffix in TEXT_SUFFIXES if suffix not in HTML_SUFFIXES), ".dict")
EXCLUDED = re.compile(r"(^|/)(changelog|copyright|news|license|licence|genindex|py-modindex|searchindex|search\.html|"
                      r"objects\.inv|readme\.debian)|/_sources/|/_static/", re.IGNORECASE)
KNOWN = ("Apache", "BSD", "MIT", "PostgreSQL", "public domain", "PSF", "Artistic", "LGPL", "GFDL", "GPL", "CC0", "CC-BY")


@dataclass(frozen=True)
class Package:
    """A package as apt offers it: its file's name, size in bytes and SHA-256."""

    name: str
    file: str
    size: int
    sha256: str


def find_packages(names: tuple[str, ...]) -> list[Package]:
    """What apt would download for these packages, in their order; DataError where there is no apt, or no such package."""
    if shutil.which("apt-get") is None:
        raise DataError("debian-docs needs apt-get, which Debian, Ubuntu and their like have; take the source out here")
    listed = _apt(["apt-get", "download", "--print-uris", *names])
    found = {}
    for line in listed.splitlines():
        _, file, size, checksum = shlex.split(line)
        found[file.partition("_")[0]] = Package(file.partition("_")[0], file, int(size), checksum.removeprefix("SHA256:"))
    if missing := [name for name in names if name not in found]:
        raise DataError(f"debian-docs: apt offers no package {missing[0]}; run apt-get update, or take it out of packages")
    return [found[name] for name in names]


def download(package: Package, folder: Path) -> Path:
    """The package's .deb in `folder`, downloaded unless it is there whole; DataError where the mirror does not give it."""
    path = folder / package.file
    if not (path.exists() and path.stat().st_size == package.size and sha256(path) == package.sha256):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _apt(["apt-get", "download", package.name], folder)
        if not path.exists() or sha256(path) != package.sha256:
            raise DataError(f"debian-docs: apt gave another {package.name} than it listed; run apt-get update and try again")
    return path


def deb_documents(deb: Path, source: str, package: str) -> Iterator[Document]:
    """The texts in a .deb, in its order: plain and HTML documentation, no changelogs, indexes or copies of sources."""
    licence = _licence(deb, package)
    for name, content in _members(deb):
        inner = name.removesuffix(".gz").removesuffix(".dz")
        if EXCLUDED.search(name) or not inner.endswith((*HTML_SUFFIXES, *PLAIN_SUFFIXES)):
            continue
        try:
            data = gzip.decompress(content) if inner != name else content
            text = html_text(data) if inner.endswith(HTML_SUFFIXES) else data.decode("utf-8")
        except (UnicodeDecodeError, OSError, EOFError):
            text = "\0"  # counted among the damaged
        if text.strip():
            yield Document(text, source, licence, f"{package}/{inner}")


def _licence(deb: Path, package: str) -> str:
    """The licence that the copyright file gives for all files, else the first ones that it names."""
    place = f"usr/share/doc/{package}/copyright"
    text = next((content.decode("utf-8", "replace") for name, content in _members(deb, place)), "")
    stanzas = re.split(r"\n\s*\n", text)
    for stanza in sorted(stanzas, key=lambda stanza: not re.search(r"^Files:\s*\*\s*$", stanza, re.MULTILINE)):
        found = re.search(r"^License:[ \t]*(\S.*)$", stanza, re.MULTILINE)
        if found and text.startswith("Format:"):
            return found[1].strip()
    named = [name for name in KNOWN if re.search(rf"\b{name}", text, re.IGNORECASE)]
    return " and ".join(named[:3]) or UNSTATED


def _members(deb: Path, only: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files of a .deb (or of one of them), read as a stream."""
    try:
        with open(deb, "rb") as file:
            with tarfile.open(fileobj=_data_of(file, deb), mode="r|") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isreg() and only in (None, name):
                        yield name, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{deb.name} is damaged ({error}); delete it and prepare the data again") from error


def _data_of(file: io.BufferedReader, deb: Path) -> io.BufferedIOBase:
    """The unpacked data.tar of a .deb, which is an `ar` archive: after 8 bytes, members behind headers of 60 bytes."""
    if file.read(8) != b"!<arch>\n":
        raise DataError(f"{deb.name} is no Debian package; delete it and prepare the data again")
    while len(header := file.read(60)) == 60 and header[48:58].strip().isdigit():
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            opener = {"data.tar.xz": lzma.open, "data.tar.gz": gzip.open, "data.tar": lambda data: data, "data.tar.zst": _zstd}[name]
            return opener(file)
        file.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{deb.name} has no data; delete it and prepare the data again")


def _zstd(file: io.BufferedReader) -> io.BufferedIOBase:
    if zstandard is None:
        raise DataError("this Debian package needs zstandard; run: pip install 'fathom[data]'")
    return zstandard.ZstdDecompressor().stream_reader(file)


def _apt(command: list[str], folder: Path | None = None) -> str:
    """What apt prints; its first complaint becomes a DataError."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if line.startswith("E:")), done.stderr.strip() or "no reason given")
        raise DataError(f"debian-docs: apt says: {complaint.removeprefix('E: ')}; run apt-get update, or change packages")
    return done.stdout
