"""What lies in a model folder, group by group: formats, bytes, and the error of quantised weights where a reference exists."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fathom import ops
from fathom.checkpoint.layouts import LAYOUTS, Layout, Stored, Weight, stored_tensors
from fathom.checkpoint.shards import DTYPE_NAMES
from fathom.checkpoint.training import find_model
from fathom.checkpoint.weights import Weights
from fathom.config import PRESETS, ModelConfig
from fathom.errors import CheckpointError, InputError
from fathom.files import write_text
from fathom.quant.formats import Packed

# The first that matches names a tensor's group.
_GROUPS = [(re.compile(pattern), group) for pattern, group in (
    (r"^mtp\.", "MTP block"), (r"^(embed|head)\.", "embedding, head"), (r"\.experts\.", "routed experts"),
    (r"\.shared_experts\.", "shared experts"), (r"\.indexer\.", "indexers"), (r"\.compressor\.", "compressors"),
    (r"(^|\.)hc_", "hyper-connections"), (r"\.gate\.", "routers"), (r"norm\.weight$", "norms"), (r"\.attn\.", "attention"))]


@dataclass
class Error:
    """Summed squares of differences and of the reference, and the largest difference."""

    squares: float = 0.0
    reference: float = 0.0
    largest: float = 0.0

    def add(self, weight: Weight, reference: Weight) -> None:
        """Count one weight [...] beside its reference."""
        exact = _plain(reference)
        difference = _plain(weight) - exact
        self.squares += float(difference.double().square().sum())
        self.reference += float(exact.double().square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))

    @property
    def relative(self) -> float:
        """Root of the sums' quotient."""
        return (self.squares / self.reference) ** 0.5 if self.reference else 0.0


def group_of(name: str) -> str:
    """The group that a released tensor belongs to."""
    return next((group for pattern, group in _GROUPS if pattern.search(name)), "others")


def inspect_model(model: str, console: Console, layout: Layout = "official-fp4", reference: str | None = None,
                  listing: Path | None = None) -> None:
    """Print the table of a model folder, a run's newest checkpoint, or a preset as `layout` would store it.

    `reference`: a folder of the same model, against which weights are compared. `listing`: a JSON file to write, with every
    tensor's name, dtype and shape. Raises InputError, CheckpointError.
    """
    weights = None
    if model in PRESETS:
        if layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
        stored = stored_tensors(ModelConfig.preset(model), layout, own_mtp_ends=layout == "official-fp8")
        title = f"{model} in {layout}"
    else:
        weights = Weights(find_model(model))
        weights.shards.verify()
        stored, title = weights.stored, str(weights.folder)
    if reference and weights is None:
        raise InputError("a preset has no weights to compare; name a model folder")
    errors = _errors(weights, Weights(find_model(reference)), console) if reference else {}
    console.print(_table(title, stored, errors))
    if listing:
        write_text(listing, json.dumps({
            "metadata": {"total_size": sum(each.nbytes for each in stored.values())},
            "tensors": {name: {"dtype": DTYPE_NAMES[each.dtype], "shape": list(each.shape)}
                        for name, each in stored.items()}}, indent=1) + "\n")


def _table(title: str, stored: dict[str, Stored], errors: dict[tuple[str, str], Error]) -> Table:
    count, size = defaultdict(int), defaultdict(int)
    for name, each in stored.items():
        count[_row(name, each)] += 1
        size[_row(name, each)] += each.nbytes
    total = sum(size.values())
    columns = ["tensors of", "dtype", "count", "bytes", "share"] + (["error", "largest"] if errors else [])
    table = Table(*columns, title=title, show_footer=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in sorted(size, key=lambda row: (_order(row[0]), -size[row])):
        cells = [*row, f"{count[row]:,}", f"{size[row]:,}", f"{size[row] / total:.2%}"]
        if errors:
            error = errors.get(row)
            cells += [f"{error.relative:.3%}", f"{error.largest:.2e}"] if error else ["", ""]
        table.add_row(*cells)
    table.add_section()
    table.add_row("all", "", f"{len(stored):,}", f"{total:,}", "")
    return table


def _row(name: str, stored: Stored) -> tuple[str, str]:
    dtype = "FP4 pairs" if stored.dtype == torch.int8 else DTYPE_NAMES[stored.dtype].removeprefix("F8_")
    return group_of(name), f"{dtype} scales" if name.endswith(".scale") else dtype


def _order(group: str) -> int:
    return [name for _, name in _GROUPS].index(group) if group != "others" else len(_GROUPS)


def _errors(weights: Weights, reference: Weights, console: Console) -> dict[tuple[str, str], Error]:
    errors: dict[tuple[str, str], Error] = defaultdict(Error)
    for name in track(weights.names, "comparing", console=console, disable=not console.is_terminal):
        if name not in reference.stored or reference.shape(name) != weights.shape(name):
            raise CheckpointError(f"{reference.folder} is no reference for {weights.folder}: {name} is missing there or has another shape")
        errors[_row(name, weights.stored[name])].add(weights.read(name), reference.read(name))
    return dict(errors)


def _plain(weight: Weight) -> torch.Tensor:
    return ops.dense(weight, torch.float32) if isinstance(weight, Packed) else weight.float()
