"""A run as one HTML page: curves, what the layers did, expert load, samples over time, recipe and machine.

Reads what the run left in its folder and nothing else; the page loads nothing from anywhere.
"""

import html
import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fathom.errors import RecipeError
from fathom.files import write_text
from fathom.train.charts import Curve, heatmap, line_chart
from fathom.train.tracking import EVENTS, overheads, read_lines, read_metrics, smoothed

REPORT = "report.html"
SAMPLES = 8  # checkpoints whose samples are shown
Lines = list[dict[str, Any]]


def write_report(run: Path, out: Path | None = None, beside: Sequence[Path] = ()) -> Path:
    """Write the page of a run, by default into its folder; the page's path. Runs `beside` it are compared by their validation.

    RecipeError where one of them has recorded nothing.
    """
    lines, steps = _record(run)
    events = read_lines(run / EVENTS)
    body = "\n".join((_head(run, steps, lines, events), _beside([run, *beside]), _curves(steps, lines, events), _layers(steps), _load(steps), _needles(run),
                      _samples(lines), _events(events), _facts(run)))
    style = resources.files("fathom.train").joinpath("report.css").read_text(encoding="utf-8")
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{html.escape(run.name)}</title>\n<style>\n{style}</style></head>\n<body>\n{body}\n</body></html>\n')
    out = out or run / REPORT
    write_text(out, page)
    return out


def _record(run: Path) -> tuple[Lines, Lines]:
    """All lines of a run, and those of steps."""
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise RecipeError(f"{run} has recorded no step; report takes the folder of a run")
    return lines, steps


def _beside(runs: Sequence[Path]) -> str:
    """Validation of several runs over the tokens they had read, and what of their recipes differs from the first one's."""
    if len(runs) < 2:
        return ""
    curves, rows, first = [], [], dict(_fields(runs[0]))
    for run in runs:
        lines, steps = _record(run)
        read = {}
        for line in steps:
            read[line["step"]] = line["tokens"] + read.get(line["step"] - 1, 0)
        points = [(read[line["step"]] / 1e6, line["validation_bits_per_byte"]) for line in lines
                  if "validation_bits_per_byte" in line and line["step"] in read]
        curves.append(Curve(run.name, points))
        changed = "; ".join(f"{name} = {value}" for name, value in _fields(run) if first.get(name) != value and name != "run")
        seconds = sum(line.get("seconds", 0) for line in steps)
        numbers = (f"{sum(line['tokens'] for line in steps):,}", f"{points[-1][1]:.3f}" if points else "none", f"{seconds / 60:,.1f} min")
        cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
        rows.append(f"<tr><td>{html.escape(run.name)}</td><td>{html.escape(changed)}</td>{cells}</tr>")
    head = "<tr><th>run</th><th>recipe, where it differs</th><th>tokens</th><th>validation, bits per byte</th><th>time</th></tr>"
    return (f'<h2>Beside other runs</h2><div class="charts">{line_chart("Validation, bits per byte, over millions of tokens", curves)}</div>'
            f'<div class="wide"><table>{head}{"".join(rows)}</table></div>')


def _fields(run: Path) -> Iterator[tuple[str, Any]]:
    """The fields of a run's recipe, those of sections with a dot; none where there is no recipe."""
    path = run / "recipe.toml"
    for name, value in tomllib.loads(path.read_text(encoding="utf-8") if path.is_file() else "").items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", of) for inner, of in value.items())
        else:
            yield name, value


def _head(run: Path, steps: Lines, lines: Lines, events: Lines) -> str:
    scores = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line]
    seconds = sum(line.get("seconds", 0) for line in steps)
    facts = {"steps": f"{steps[-1]['step']:,}", "tokens": f"{sum(line['tokens'] for line in steps):,}",
             "last loss, nats a token": f"{smoothed([line['loss'] for line in steps])[-1]:.3f}",
             "validation, bits per byte": f"{scores[-1]:.3f}" if scores else "none",
             "tokens a second": f"{sum(line['tokens'] for line in steps) / seconds:,.0f}" if seconds else "unknown",
             "time of the steps": f"{seconds / 60:,.1f} min", "spikes": str(len(events))}
    facts |= {f"{name}, of the steps' time": f"{share:.2%}" for name, share in overheads(lines).items()}
    cards = "".join(f"<div><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in facts.items())
    return f'<h1>{html.escape(run.name)}</h1><p class="sub">A pre-training run, as it recorded itself.</p><div class="facts">{cards}</div>'


def _curves(steps: Lines, lines: Lines, events: Lines) -> str:
    marks = _marks(steps, events)

    def of(name: str, source: Lines = steps) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in source if line.get(name) is not None]

    losses = of("loss")
    smooth = list(zip((step for step, _ in losses), smoothed([value for _, value in losses]), strict=True))
    charts = [
        line_chart("Training loss, nats a token", [Curve("each step", losses, True), Curve("smoothed", smooth)], marks),
        line_chart("Validation, bits per byte", [Curve("held out", of("validation_bits_per_byte", lines))], marks),
        line_chart("Other losses", [Curve("MTP", of("mtp_loss")), Curve("indexer's divergence", of("indexer_loss")),
                                    Curve("sequence balance", of("balance_loss"))], marks, logarithmic=True),
        line_chart("Learning rate", [Curve("rate", of("rate"))], marks),
        line_chart("Gradient norm, before clipping", [Curve("norm", of("gradient_norm"))], marks, logarithmic=True),
        line_chart("Update of the matrices over the rate, RMS", [Curve("update", of("update_rms"))], marks),
        line_chart("Tokens a second", [Curve("throughput", of("tokens_per_second"))], marks),
        line_chart("Tokens of a step, and of a sequence", [Curve("step", of("tokens")), Curve("sequence", of("length"))], marks,
                   logarithmic=True),
        line_chart("Fullest expert, load over mean", [Curve("mean of the layers", of("fullest_expert"))], marks)]
    return f'<h2>Curves</h2><p class="sub">Dashed: {_legend(marks)}</p><div class="charts">{"".join(charts)}</div>'


def _marks(steps: Lines, events: Lines) -> list[tuple[float, str]]:
    """Where length or attention change, and where the run went back."""
    marks = [(after["step"], f"step {after['step']}: {after['length']:,} tokens, {after['attention']} attention")
             for before, after in zip(steps, steps[1:], strict=False)
             if (before.get("length"), before.get("attention")) != (after.get("length"), after.get("attention"))]
    return marks + [(event["step"], f"step {event['step']}: a spike") for event in events]


def _legend(marks: list[tuple[float, str]]) -> str:
    return "; ".join(html.escape(text) for _, text in marks) or "nothing changed"


def _layers(steps: Lines) -> str:
    watched = [line for line in steps if "layers" in line]
    if not watched:
        return ""

    def of(name: str) -> list[Curve]:
        layers = max(len(line["layers"][name]) for line in watched)
        chosen = sorted({round(index * (layers - 1) / 5) for index in range(6)} if layers > 6 else set(range(layers)))
        return [Curve(f"{layer}", [(line["step"], line["layers"][name][layer]) for line in watched if layer < len(line["layers"][name])])
                for layer in chosen]

    charts = [line_chart("Streams after the block, RMS", of("stream_rms"), logarithmic=True),
              line_chart("Streams after the block, largest value", of("stream_max"), logarithmic=True),
              line_chart("Residual amplification, all blocks together",
                         [Curve("RMS out over RMS in", [(line["step"], line["residual_amplification"]) for line in watched])]),
              line_chart("Gradient norm of the block", of("gradient_norm"), logarithmic=True),
              line_chart("Router entropy (1: uniform)", of("router_entropy"))]
    return f'<h2>Layers</h2><p class="sub">By layer, MTP blocks last.</p><div class="charts">{"".join(charts)}</div>'


def _load(steps: Lines) -> str:
    watched = [line for line in steps if "layers" in line]
    if not watched:
        return ""
    maps = []
    for layer in range(max(len(line["layers"]["expert_load"]) for line in watched)):  # MTP blocks rest while the indexer trains alone
        loads = {line["step"]: line["layers"]["expert_load"][layer] for line in watched if layer < len(line["layers"]["expert_load"])}
        maps.append(heatmap(f"Layer {layer}", list(loads), list(zip(*loads.values(), strict=True))))
    return ('<h2>Expert load</h2><p class="sub">Rows are experts, columns steps. Pale: the mean; blue: less; orange: more, full at twice '
            f'the mean.</p><div class="heats">{"".join(maps)}</div>')


def _needles(run: Path) -> str:
    path = run / "needles.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    head = "".join(f"<th>{depth:.0%}</th>" for depth in found["depths"])
    rows = "".join(f'<tr><td class="n">{length:,}</td>' + "".join(
        f'<td class="n">{cell["exact"]:.0%}, {cell["best"]:.0%}</td>' for cell in row) + "</tr>"
        for length, row in zip(found["lengths"], found["cells"], strict=True))
    return ('<h2>Needle retrieval</h2><p class="sub">By length in tokens and depth: answered exactly, and likelier than '
            f'{found["facts"] - 1} other values of the same text; {found["repeats"]} texts a cell.</p>'
            f'<div class="wide"><table><tr><th>tokens</th>{head}</tr>{rows}</table></div>')


def _samples(lines: Lines) -> str:
    written = [line for line in lines if "samples" in line]
    chosen = written[::max(1, -(-len(written) // SAMPLES))]
    if written and chosen[-1] is not written[-1]:
        chosen.append(written[-1])
    rows = "".join(f'<tr><td class="n">{line["step"]:,}</td><td class="text"><b>{html.escape(sample["prompt"])}</b>'
                   f'{html.escape(sample["text"])}</td></tr>' for line in chosen for sample in line["samples"])
    return f'<h2>Samples over time</h2><div class="wide"><table><tr><th>step</th><th>greedy</th></tr>{rows}</table></div>' if rows else ""


def _events(events: Lines) -> str:
    rows = "".join(f'<tr><td class="n">{event["step"]:,}</td><td class="n">{event["losses"][-1][1]:.3f}</td><td class="n">'
                   f'{"nowhere: no checkpoint was old enough" if event["back_to"] is None else event["back_to"]}</td></tr>'
                   for event in events)
    return f"<h2>Spikes</h2><table><tr><th>step</th><th>loss</th><th>went back to step</th></tr>{rows}</table>" if rows else ""


def _facts(run: Path) -> str:
    parts = ["<h2>Recipe and machine</h2>"]
    for title, name in (("Recipe, as resolved", "recipe.toml"), ("Machine and versions", "environment.json")):
        if (run / name).is_file():
            text = html.escape((run / name).read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return "".join(parts)
