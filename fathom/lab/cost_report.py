"""The tables, the JSON and the picture of `fathom lab cost`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fathom.errors import CheckpointError, InputError
from fathom.files import write_text
from fathom.lab.cost import FORMULAS, table
from fathom.lab.cost_measured import Measured, as_json, measure
from fathom.lab.published import TOLERANCE, Figure, figures

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

SHOWN = (1 << 12, 1 << 16, 1 << 17, 1 << 20)


def run_cost(out: Path | None, console: Console) -> bool:
    """Compute, measure, print and keep; whether every figure holds or says why not, and every measurement is within 1%."""
    if out is not None and out.suffix != ".json":
        raise InputError(f"{out}: give --out a name that ends in .json; the picture goes beside it")
    rows, published = table(), figures()
    console.print(FORMULAS, highlight=False)
    console.print(_curves(rows, "flops", "equivalent FP8 GFLOPs of one token", 1e9), _curves(rows, "cache_bytes", "GB of KV cache", 1e9))
    console.print(_figures(published))
    found = measure()
    console.print(_measured(found))
    if out is not None:
        keep(out, rows, published, found)
        console.print(f"kept: {out}", soft_wrap=True)
        if pyplot is None:
            console.print("no picture: matplotlib is not installed; run: pip install 'fathom[plots]'", soft_wrap=True)
        else:
            console.print(f"picture: {draw(rows, out.with_suffix('.png'))}", soft_wrap=True)
    return all(figure.holds or figure.why for figure in published) and all(abs(each.error) < 0.01 for each in found)


def keep(out: Path, rows: dict[str, dict], published: tuple[Figure, ...], found: list[Measured]) -> None:
    """Write everything as JSON, whole."""
    result: dict[str, Any] = {"command": f"fathom lab cost --out {out.name}", "formulas": FORMULAS, "models": rows,
                              "published": [dataclasses.asdict(figure) | {"error": figure.error, "holds": figure.holds}
                                            for figure in published], "measured": as_json(found)}
    write_text(out, json.dumps(result, indent=1) + "\n")


def _curves(rows: dict[str, dict], field: str, title: str, unit: float) -> Table:
    contexts = next(iter(rows.values()))["contexts"]
    shown = [contexts.index(context) for context in SHOWN]
    built = Table("model", "activated", *(f"{contexts[index]:,}" for index in shown), title=title)
    for name, row in rows.items():
        built.add_row(name, f"{row['activated'] / 1e9:.1f}B", *(f"{row[field][index] / unit:,.2f}" for index in shown))
    return _right(built)


def _figures(published: tuple[Figure, ...]) -> Table:
    built = Table("figure", "published", "ours", "error", "verdict", title=f"the report's figures (within {TOLERANCE:.0%})")
    for figure in published:
        built.add_row(figure.name, f"{figure.published:,.4g}", f"{figure.ours:,.4g}", f"{figure.error:+.1%}",
                      "holds" if figure.holds else figure.why)
    return built


def _measured(found: list[Measured]) -> Table:
    built = Table("attention", "quantity", "context", "arithmetic", "measured", "error", title="small models: arithmetic and measurement")
    for each in found:
        built.add_row(each.attention, each.quantity, f"{each.context:,}", f"{each.arithmetic:,.0f}", f"{each.measured:,.0f}",
                      f"{each.error:+.2%}")
    return _right(built)


def _right(built: Table) -> Table:
    for column in built.columns[1:]:
        column.justify = "right"
    return built


def draw(rows: dict[str, dict], path: Path) -> Path:
    """FLOPs and cache bytes against context, as the report's figure 1."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=80, layout="constrained")
    for axis, field, title in zip(axes, ("flops", "cache_bytes"), ("equivalent FP8 FLOPs of one token", "bytes of KV cache"), strict=True):
        for name, row in rows.items():
            axis.plot(row["contexts"], row[field], label=name, linewidth=2 if name in ("flash", "pro") else 1,
                      linestyle="-" if name in ("flash", "pro") else "--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([1 << power for power in (12, 14, 16, 18, 20)], ["4K", "16K", "64K", "256K", "1M"])
        axis.set(title=title, xlabel="context, tokens")
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return path
