"""Folders of safetensors files: any tensor by name, read one at a time, and shards written one at a time.

Knows files, dtypes and checksums; of models only that their tensors have names. Nothing is ever unpickled.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fathom.checkpoint.layouts import Stored
from fathom.errors import CheckpointError
from fathom.files import sha256

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OPEN_FILES = 4  # a scale may lie in another shard than its weight; mappings beyond this many are given back


class Shards:
    """The tensors of a folder. `stored` has every tensor's dtype and shape, in the order of the files."""

    def __init__(self, folder: Path):
        self.folder, self.stored, self.file_of = folder, {}, {}
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self.index = _read_index(folder)
        files = sorted(set(self.index["weight_map"].values())) if self.index else [
            file.name for file in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise CheckpointError(f"{folder} holds no *.safetensors file")
        for file in files:
            for name, stored in read_header(folder / file).items():
                if name in self.stored:
                    raise CheckpointError(f"{folder}: {name} is in both {self.file_of[name]} and {file}; remove the file "
                                          "that does not belong")
                self.stored[name], self.file_of[name] = stored, file
        for name, file in self.index["weight_map"].items() if self.index else ():
            if self.file_of.get(name) != file:
                raise CheckpointError(f"{folder / INDEX} says that {name} is in {file}, which does not hold it")

    def verify(self) -> None:
        """Compare the files with the index's checksums, where it has any."""
        for file, digest in (self.index or {}).get("metadata", {}).get("sha256", {}).items():
            if not (self.folder / file).is_file() or sha256(self.folder / file) != digest:
                raise CheckpointError(f"{self.folder / file} is damaged or missing: its checksum is not the index's; copy "
                                      "or convert it again")

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        file = self.file_of[name]
        try:
            if file not in self._opened:
                if len(self._opened) >= _OPEN_FILES:
                    self._opened.popitem(last=False)
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            self._opened.move_to_end(file)
            return self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file} is damaged: cannot read {name}: {error}") from error


def read_header(file: Path) -> dict[str, Stored]:
    """Dtype and shape of every tensor in one file; CheckpointError names a file that is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            unknown = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in DTYPES}
            if unknown:
                name, dtype = next(iter(unknown.items()))
                raise CheckpointError(f"{file}: {name} has dtype {dtype}, which is none of {', '.join(DTYPES)}")
            return {name: Stored(DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def read_tensors(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of one safetensors file whose names start with `prefix`, without it; CheckpointError names a file that is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name.removeprefix(prefix): opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file from tensors on any device; an I/O failure (a full disk) is an OSError."""
    try:
        file.touch()
        mode = file.stat().st_mode  # the library's own files are closed to everybody else
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file,
                  metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{error}") from error


def plan_shards(units: Iterable[dict[str, Stored]], shard_bytes: int) -> list[list[dict[str, Stored]]]:
    """Units (tensors that stay together) in order, dealt into shards of at most `shard_bytes`, or one unit."""
    shards: list[list[dict[str, Stored]]] = [[]]
    size = 0
    for unit in units:
        unit_bytes = sum(stored.nbytes for stored in unit.values())
        if shards[-1] and size + unit_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names of so many shards, as released."""
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, plan: list[list[dict[str, Stored]]], files: list[str],
                checksums: dict[str, str] | None = None) -> None:
    """The index of a plan's shards; `checksums` (SHA-256 by file) are kept in its metadata, which other readers ignore."""
    weight_map = {name: file for file, units in zip(files, plan, strict=True) for unit in units for name in unit}
    total = sum(stored.nbytes for units in plan for unit in units for stored in unit.values())
    metadata = {"total_size": total} | ({"sha256": checksums} if checksums else {})
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2), encoding="utf-8")


def write_shard(folder: Path, file: str, units: list[dict[str, Stored]],
                produce: Callable[[str], dict[str, Tensor]]) -> None:
    """One shard; `produce` makes a unit's tensors from its first name."""
    tensors: dict[str, Tensor] = {}
    for unit in units:
        tensors |= produce(next(iter(unit)))
    write_tensors(tensors, folder / file)


def _read_index(folder: Path) -> dict | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
        index.setdefault("metadata", {}).setdefault("sha256", {}).items()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it must be a JSON object with a weight_map") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or len(file.encode()) > 255 or not file.isprintable():
            raise CheckpointError(f"{path} names {file!r}, which is no file of this folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}, named in the index, is missing")
    return index
