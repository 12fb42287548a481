"""The table and the picture of a benchmark's figures."""

from pathlib import Path
from typing import Any

from rich.table import Table

from fathom.errors import CheckpointError
from fathom.lab.bench.shares import matmul

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

COLOURS = {"fathom": "#1f5a94", "transformers": "#c2571a"}
SHORT = {"float32": "f32", "bfloat16": "bf16"}
STYLES = {"prefill": "-", "train": "--", "decode": "-"}


def table(report: dict[str, Any]) -> Table:
    """A row for each case and program, under the machine and its ceilings; narrow enough for 80 columns."""
    rows = report["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    decodes = any(row["kind"] == "decode" for row in rows)
    result = Table(title=f"{report['model']}, {' and '.join(dtypes)}, on {_machine(report)}", title_justify="left", box=None,
                   padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("case", "program", "tokens/s", "least-most", *(["ms"] if decodes else []), "extra MB", "share", "ratio"):
        result.add_column(name, justify="left" if name in ("case", "program") else "right", no_wrap=True)
    for row in rows:
        program = row["program"] + (f" {SHORT[row['dtype']]}" if len(dtypes) > 1 else "")
        if "failed" in row:
            result.add_row(name_of(row), program, "", row["failed"].split(":")[0])
            continue
        speed, step = row["tokens_per_second"], row.get("ms_per_step")
        share = row.get("share_of_bandwidth", row.get("share_of_matmul"))
        result.add_row(
            name_of(row), program, _number(speed["median"]), f"{_number(speed['least'])}-{_number(speed['most'])}",
            *([f"{step['median']:.2f}" if step else ""] if decodes else []), f"{row['extra_bytes'] / 1e6:,.0f}",
            "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}",
            " ".join(f"{ratio:.2f}x" for ratio in row.get("ratio", {}).values()))
    return result


def name_of(row: dict[str, Any]) -> str:
    """Such as "decode 512 x8"."""
    return f"{row['kind']} {row['length']:,}" + (f" x{row['batch']}" if row["batch"] > 1 else "")


def draw(report: dict[str, Any], path: Path) -> Path | None:
    """Throughput, and milliseconds a decoded token, against length; None where nothing has two lengths, or without matplotlib."""
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if "failed" not in row and row["batch"] == 1:
            lines.setdefault((row["kind"], row["program"], row["dtype"]), []).append(row)
    lines = {key: sorted(rows, key=lambda row: row["length"]) for key, rows in lines.items() if len(rows) > 1}
    if pyplot is None or not lines:
        return None
    panels = [panel for panel, decodes in (("throughput", False), ("decoding", True))
              if any((kind == "decode") == decodes for kind, _, _ in lines)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), dpi=120, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        _panel(axis, panel, {key: rows for key, rows in lines.items() if (key[0] == "decode") == (panel == "decoding")})
    figure.suptitle(f"{report['model']} on {_machine(report)}", fontsize=9)
    try:
        figure.savefig(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return path


def _panel(axis: Any, panel: str, lines: dict[tuple[str, str, str], list[dict[str, Any]]]) -> None:
    """One axis: medians as lines, from the slowest to the fastest run as a band."""
    figure = "ms_per_step" if panel == "decoding" else "tokens_per_second"
    for (kind, program, dtype), rows in lines.items():
        lengths = [row["length"] for row in rows]
        colour, label = COLOURS.get(program), f"{kind}, {program}, {dtype}"
        axis.plot(lengths, [row[figure]["median"] for row in rows], STYLES[kind], color=colour, marker="o", markersize=5,
                  markerfacecolor="white" if dtype == "bfloat16" else colour, label=label)
        axis.fill_between(lengths, [row[figure]["least"] for row in rows], [row[figure]["most"] for row in rows], color=colour,
                          alpha=0.15, linewidth=0)
    ticks = sorted({row["length"] for rows in lines.values() for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set(title=panel, xlabel="tokens of context" if panel == "decoding" else "tokens of the sequence",
             ylabel="ms a token" if panel == "decoding" else "tokens/s")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=1 if len(lines) < 3 else 2, fontsize=9)


def _machine(report: dict[str, Any]) -> str:
    """Such as "AMD EPYC, 2 threads: 180 GFLOP/s float32, 370 bfloat16, 40 GB/s"."""
    ceilings = report["ceilings"]
    if not ceilings:
        return f"{report['machine']['processor']}, {report['machine']['cores']} cores"
    rates = f"{matmul(ceilings, 'float32'):.0f} GFLOP/s float32, {matmul(ceilings, 'bfloat16'):.0f} bfloat16, {ceilings['read']:.0f} GB/s"
    if "device" in ceilings:
        return f"{ceilings['device']}: {rates}"
    threads = "thread" if ceilings["threads"] == 1 else "threads"
    without = "" if ceilings.get("kernels", True) else "; no kernels in C"
    return f"{report['machine']['processor']}, {ceilings['threads']} {threads}: {rates}{without}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
