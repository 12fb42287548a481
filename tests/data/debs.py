"""A small Debian: packages written byte by byte, and an apt-get that offers them."""

import hashlib
import io
import lzma
import os
import sys
import tarfile
from pathlib import Path


def write_deb(path: Path, files: dict[str, bytes]) -> None:
    """A .deb of these files: an `ar` archive of a version, control data and the packed files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", lzma.compress(data.getvalue()))):
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    path.write_bytes(archive)


def install_apt(monkeypatch, folder: Path, debs: list[Path]) -> None:
    """Put an apt-get first on the PATH that knows these files."""
    offers = {deb.name.partition("_")[0]: (str(deb), deb.name, deb.stat().st_size, hashlib.sha256(deb.read_bytes()).hexdigest())
              for deb in debs}
    script = folder / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport shutil, sys\noffers = {offers!r}\nnames = [n for n in sys.argv[2:] if n[0] != '-']\n"
                      "for name in names:\n"
                      "    if name not in offers:\n        print(f'E: Unable to locate package {name}', file=sys.stderr); sys.exit(100)\n"
                      "    path, file, size, checksum = offers[name]\n"
                      "    if '--print-uris' in sys.argv: print(f\"'http://x/{file}' {file} {size} SHA256:{checksum}\")\n"
                      "    else: shutil.copy(path, file)\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
