"""A write-ahead log of rollouts: every token is on file before anything depends on it (report 5.2.3).

One file a round. Each line is a checksum and a JSON list; a line that a kill has cut off, and all that follows it, is dropped when the
file is opened again. Written lines survive the process; `seal` makes them survive the machine.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from fathom.errors import CheckpointError


class RolloutLog:
    """Lines of one file; `found` holds those that were there when it was opened, if its head is the one given.

    `head` says which work the lines belong to (round, weights, settings): under another head they mean nothing and are dropped.
    """

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.head = path, head
        self.found: list[list] = []
        lines, size = _read(path)
        if lines and lines[0] == ["head", head]:
            self.found = lines[1:]
        else:
            lines, size = [], 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")
            self._file.truncate(size)
        except OSError as error:
            raise self._error(error) from error
        if not lines:
            self.append("head", head)

    def append(self, kind: str, *values: Any) -> None:
        """Add a line, and hand it to the operating system; CheckpointError where that fails."""
        text = json.dumps([kind, *values], ensure_ascii=True, separators=(",", ":")).encode()
        try:
            self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._file.flush()
        except OSError as error:
            raise self._error(error) from error

    def seal(self) -> None:
        """Force the lines to the disk and close the file."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write {self.path}: {error.strerror or error}")


def _read(path: Path) -> tuple[list[list], int]:
    """All whole lines, and how many bytes they take."""
    lines, size = [], 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                break
            lines.append(json.loads(text))
            size += len(line)
    return lines, size
