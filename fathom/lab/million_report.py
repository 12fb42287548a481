"""What `fathom bench million` shows and keeps: tables, a JSON file, and a picture of cost against context."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fathom.errors import CheckpointError, InputError
from fathom.files import write_text

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

COLOURS = ("#1f5a94", "#7a7a7a", "#c2571a", "#4d8b3d")
SPEED_POINTS = 128


class SpeedTrace:
    """Tokens a second against position, in about SPEED_POINTS stretches of whole chunks."""

    def __init__(self, tokens: int):
        self.stretch = tokens / SPEED_POINTS
        self.points: list[tuple[int, float]] = []
        self.latest = 0.0
        self._since = (0, 0.0)

    def add(self, tokens: int, seconds: float) -> None:
        """All tokens read so far, and the seconds they took."""
        read, took = tokens - self._since[0], seconds - self._since[1]
        self.latest = read / max(took, 1e-9)
        if read >= self.stretch:
            self.points.append((tokens, self.latest))
            self._since = (tokens, seconds)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity") else os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def keep(result: dict[str, Any], out: Path | None) -> None:
    """Write the result, whole, where asked."""
    if out is not None:
        if out.suffix == ".png":
            raise InputError(f"{out} would be overwritten by the picture; give --out a name that ends in .json")
        write_text(out, json.dumps(result, indent=1) + "\n")


def opening(result: dict[str, Any]) -> str:
    """What will be read by what."""
    text, config, settings, counts = result["text"], result["config"], result["settings"], result["parameters"]
    times = text["times_read"]
    again = (f"the first {100 * times:.0f}% of them are read" if times <= 1 else
             f"read {times:.1f} times over, once in order and then in a shuffled order, seed {settings['seed']}")
    weights = settings["model"] or f"random weights, seed {settings['seed']}"
    return (f"model: {config['hidden_size']} wide, layers {list(config['compress_ratios'])[:config['num_hidden_layers']]}, "
            f"{counts['total'] / 1e6:.1f}M parameters ({counts['activated'] / 1e6:.1f}M activated), {settings['dtype']}, {weights}\n"
            f"text: {text['source']}, {text['documents']} documents, {text['tokens_once']:,} tokens of a vocabulary of "
            f"{text['vocabulary']:,} ({text['tokenizer']}); {again}\n"
            f"reading {settings['tokens']:,} tokens in chunks of {settings['chunk']:,}")


def mark_line(mark: dict[str, Any]) -> str:
    """One mark, as it is passed."""
    return (f"{mark['tokens']:>9,} tokens  {mark['seconds']:8.1f} s  {mark['tokens_per_second']:7,.0f} tokens/s  "
            f"{mark['decode_ms']:6.1f} ms to decode one  peak {size(mark['peak_memory'])}")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def show(result: dict[str, Any], out: Path | None, console: Console) -> None:
    """Print all tables and draw the picture."""
    if result["marks"]:
        console.print(_measured(result), _analytic(result, "flops", "FLOPs for one more token, by arithmetic"),
                      _analytic(result, "cache_bytes", "cache, by arithmetic"))
    if "cache_nbytes" in result:
        console.print(f"the whole cache, for {result['cache_tokens']:,} tokens: {result['cache_nbytes']:,} bytes in tensors; "
                      f"memory before reading {size(result['memory_before'])}; {result['threads']} threads", soft_wrap=True)
    if result["facts"]:
        console.print(_facts(result["facts"]))
        console.print("control: the same weights with windows only, where a fact must change nothing unless it is near (in reach)\n"
                      "read by CSA: how many of the fact's entries indexers chose for the last token; HCA reads all", soft_wrap=True)
    if out is not None:
        console.print(f"kept: {out}", soft_wrap=True)
        if pyplot is None:
            console.print("no picture: matplotlib is not installed; run: pip install 'fathom[plots]'", soft_wrap=True)
        elif result["marks"]:
            console.print(f"picture: {draw(result, out.with_suffix('.png'))}", soft_wrap=True)


def _measured(result: dict[str, Any]) -> Table:
    table = Table("tokens", "seconds", "tokens/s since", "ms to decode one", "cache", "peak memory", title="measured")
    for mark in result["marks"]:
        table.add_row(f"{mark['tokens']:,}", f"{mark['seconds']:,.1f}", f"{mark['tokens_per_second']:,.0f}",
                      f"{mark['decode_ms']:.1f}", size(mark["cache_bytes"]), size(mark["peak_memory"]))
    return _right(table)


def _analytic(result: dict[str, Any], field: str, title: str) -> Table:
    """FLOPs or bytes of V4 and of the baselines."""
    curves = _curves(result)
    table = Table("tokens", *curves, title=title)
    for row, context in enumerate(result["curves"]["contexts"]):
        figures = [curve[field][row] for curve in curves.values()]
        table.add_row(f"{context:,}", *(size(figure) if field == "cache_bytes" else f"{figure / 1e6:,.1f} M" for figure in figures))
    return _right(table)


def _facts(facts: list[dict[str, Any]]) -> Table:
    layers = ", ".join(map(str, facts[0]["selected"]))
    table = Table("context", "depth", "largest change", "to spread", "KL, nats", "control", f"read by CSA {layers}",
                  title="logits of the last token with a fact further back")
    for fact in facts:
        control = "" if fact["control"] is None else f"{fact['control']:.3g}{'' if fact['beyond_windows'] else ' (near)'}"
        chosen = ", ".join(f"{count}/{of}" for count, of in zip(fact["selected"].values(), fact["entries"].values(), strict=True))
        table.add_row(f"{fact['context']:,}", f"{fact['depth']:.0%}", f"{fact['difference']:.3g}",
                      f"{fact['difference'] / fact['spread']:.1%}", f"{fact['kl']:.3g}", control, chosen)
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns:
        column.justify = "right"
    return table


def _curves(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    return {name: curve for name, curve in result["curves"].items() if name != "contexts"}


def draw(result: dict[str, Any], path: Path) -> Path:
    """The picture: decoding, cache bytes, and speed of reading, against context."""
    marks, contexts = result["marks"], result["curves"]["contexts"]
    at = [mark["tokens"] for mark in marks]
    figure, (decode, cache, speed) = pyplot.subplots(1, 3, figsize=(15, 4.5), dpi=120, layout="constrained")
    for colour, (name, curve) in zip(COLOURS, _curves(result).items(), strict=True):
        scale = marks[0]["decode_ms"] / curve["flops"][0]
        decode.plot(contexts, [scale * flops for flops in curve["flops"]], color=colour, linestyle="--", label=f"{name}, arithmetic")
        cache.plot(contexts, curve["cache_bytes"], color=colour, linestyle="--", label=f"{name}, arithmetic")
    decode.plot(at, [mark["decode_ms"] for mark in marks], color=COLOURS[0], marker="o", label="V4, measured")
    decode.set(title="one more token", ylabel=f"ms (arithmetic: FLOPs, made equal at {at[0]:,})", yscale="log")
    if "cache_nbytes" in result:
        cache.plot([result["cache_tokens"]], [result["cache_nbytes"]], "o", color=COLOURS[0], label="V4, measured")
    cache.set(title="cache of one sequence", ylabel="bytes", yscale="log")
    if result["speed"]:
        speed.plot(*zip(*result["speed"], strict=True), color=COLOURS[0])
    speed.set(title="reading", ylabel="tokens/s", ylim=(0, None))
    for axis in (decode, cache, speed):
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [_short(context) for context in contexts])
        axis.set_xlabel("context, tokens")
        axis.grid(alpha=0.25)
    for axis in (decode, cache):
        axis.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return path


def _short(tokens: int) -> str:
    for power, letter in ((20, "M"), (10, "K")):
        if tokens >= 1 << power:
            return f"{tokens / (1 << power):.3g}{letter}"
    return str(tokens)
