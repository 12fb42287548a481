"""`fathom lab report`: every claim with its source, our numbers, a verdict, a plot and the command that makes it again.

One HTML page that needs nothing else, the same in Markdown, and the data beside them.
"""

import html
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.errors import InputError
from fathom.files import write_text
from fathom.lab.experiments import EXPERIMENTS
from fathom.lab.published import TOLERANCE, figures

COLOURS = {"reproduced": "#1a7f37", "partly": "#9a6700", "not": "#cf222e", "too big for here": "#57606a"}
TOO_BIG = (
    ("Anticipatory routing and clamped SwiGLU keep training of 284B and 1.6T parameters free of loss spikes.", "report 4.2.3",
     "spikes of that kind do not occur at a million parameters"),
    ("V4-Pro-Max leads open models on the report's benchmarks.", "report 5.3", "needs the released weights, of 865 GB, and a cluster"),
    ("Needles are found at a million tokens with 59% (Pro) and 49% (Flash) of MRCR.", "report figure 9", "needs the released weights"),
    ("Specialists distilled on their own outputs replace mixed reinforcement learning without loss.", "report 5.1.2",
     "needs specialists that are better than their student in more than a toy domain"))
WIDTH, ROW, LEFT = 560, 22, 150


def write_report(runs: Path, out: Path, console: Console) -> dict[str, int]:
    """Write index.html, README.md, and each result's JSON and SVG, from the results in `runs`; how often each verdict occurs."""
    results = [json.loads((runs / f"{name}.json").read_text(encoding="utf-8")) for name in EXPERIMENTS if (runs / f"{name}.json").is_file()]
    if not results and not runs.is_dir():
        raise InputError(f"{runs} holds no results; run: fathom lab run all")
    for result in results:
        write_text(out / f"{result['name']}.json", json.dumps(result, indent=1) + "\n")
        write_text(out / f"{result['name']}.svg", plot(result))
    missing = [name for name in EXPERIMENTS if name not in {result["name"] for result in results}]
    write_text(out / "README.md", markdown(results, missing))
    write_text(out / "index.html", page(results, missing))
    counts: dict[str, int] = {}
    for verdict in [result["verdict"] for result in results] + ["reproduced" if f.holds else "partly" for f in figures()] + [
            "too big for here"] * len(TOO_BIG):
        counts[verdict] = counts.get(verdict, 0) + 1
    console.print(f"{out / 'index.html'}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()), soft_wrap=True)
    if missing:
        console.print(f"not run yet: {', '.join(missing)}", soft_wrap=True)
    return counts


def plot(result: dict[str, Any]) -> str:
    """An SVG: a row for each variant, a dot for each seed, a line at the mean."""
    metric, numbers = result["metric"], result["numbers"]
    values = {variant: [run[metric] for run in runs] for variant, runs in numbers.items()}
    low, high = (bound(value for each in values.values() for value in each) for bound in (min, max))
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.08 * span, high + 0.08 * span

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 20)

    rows = []
    for number, (variant, each) in enumerate(values.items()):
        y, middle = ROW * number + 16, x(sum(each) / len(each))
        rows.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{html.escape(variant)}</text>'
                    f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#d0d7de"/>'
                    f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 8}" y2="{y + 8}" stroke="#0969da" stroke-width="2"/>')
        rows += [f'<circle cx="{x(value):.1f}" cy="{y}" r="3.5" fill="#0969da" fill-opacity="0.6"/>' for value in each]
    bottom = ROW * len(values) + 22
    rows.append(f'<text x="{LEFT}" y="{bottom}">{low:.4g}</text><text x="{WIDTH - 20}" y="{bottom}" text-anchor="end">{high:.4g}</text>'
                f'<text x="{(LEFT + WIDTH - 20) / 2}" y="{bottom}" text-anchor="middle">{html.escape(metric.replace("_", " "))}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 8}" font-family="sans-serif" font-size="12" '
            f'fill="#1f2328"><rect width="100%" height="100%" fill="white"/>{"".join(rows)}</svg>\n')


def markdown(results: list[dict[str, Any]], missing: list[str]) -> str:
    """The page as Markdown, plots beside it."""
    lines = ["# Claims", "", OPENING, "", "## By experiment", ""]
    for result in results:
        lines += [f"### {result['claim']}", "", f"**{result['verdict']}** ({result['source']})", "", f"Ours: {result['ours']}.", "",
                  f"Rule: {result['rule']}", "", f"![{result['name']}]({result['name']}.svg)", "", f"`{result['command']}` "
                  f"({_effort(result)}; [data]({result['name']}.json))", ""]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += ["## By arithmetic", "", f"Within {TOLERANCE:.0%}; `fathom lab cost` computes all of them.", "",
              "| claim | source | published | ours | verdict |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {source} | {published} | {ours} | {verdict} |" for name, source, published, ours, verdict in _figures()]
    lines += ["", "## Too big for here", "", "| claim | source | why |", "| --- | --- | --- |"]
    lines += [f"| {claim} | {source} | {why} |" for claim, source, why in TOO_BIG]
    return "\n".join(lines) + "\n"


def page(results: list[dict[str, Any]], missing: list[str]) -> str:
    """The page as HTML, plots inside."""
    parts = [f"<h1>Claims</h1><p>{html.escape(OPENING)}</p><h2>By experiment</h2>"]
    for result in results:
        claim, source, ours, rule, command = (html.escape(result[name]) for name in ("claim", "source", "ours", "rule", "command"))
        parts.append(f"<section><h3>{claim}</h3><p>{_badge(result['verdict'])} {source}</p><p>{ours}.</p>{plot(result)}"
                     f"<p class=small>Rule: {rule}</p><p class=small><code>{command}</code> ({_effort(result)})</p></section>")
    if missing:
        parts.append(f"<p>Not run yet: {', '.join(missing)}.</p>")
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(source)}<td>{published}<td>{ours}<td>"
                   f"{_badge('reproduced') if verdict == 'reproduced' else _badge('partly') + ' ' + html.escape(verdict)}"
                   for name, source, published, ours, verdict in _figures())
    parts.append(f"<h2>By arithmetic</h2><p>Within {TOLERANCE:.0%}; <code>fathom lab cost</code> computes all of them.</p>"
                 f"<table><tr><th>claim<th>source<th>published<th>ours<th>verdict{rows}</table>")
    rows = "".join(f"<tr><td>{html.escape(claim)}<td>{html.escape(source)}<td>{html.escape(why)}" for claim, source, why in TOO_BIG)
    parts.append(f"<h2>Too big for here</h2><table><tr><th>claim<th>source<th>why{rows}</table>")
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>Fathom: claims</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"


def _figures() -> list[tuple[str, str, str, str, str]]:
    return [(figure.name, figure.source, f"{figure.published:,.4g}", f"{figure.ours:,.4g}", "reproduced" if figure.holds else figure.why)
            for figure in figures()]


def _effort(result: dict[str, Any]) -> str:
    changed = f", with {' '.join(result['overrides'])}" if result["overrides"] else ""
    runs = sum(len(each) for each in result["numbers"].values())
    return f"{runs} runs, {result['seconds'] / 60:.0f} minutes of them together, commit {result['commit']}{changed}"


def _badge(verdict: str) -> str:
    return f'<b style="color:{COLOURS[verdict]}">{verdict}</b>'


OPENING = ("What the DeepSeek-V4 report claims, recomputed: exactly where arithmetic suffices, by small runs from text that ships with Fathom "
           "where not. A small run says how a part behaves at a million parameters and minutes of training, no more; each verdict "
           "follows the rule beside it.")
STYLE = ("body{font:15px/1.5 system-ui,sans-serif;color:#1f2328;margin:0}main{max-width:60rem;margin:2rem auto;padding:0 1rem}"
         "section{border-top:1px solid #d0d7de;padding:.5rem 0}table{border-collapse:collapse}td,th{border:1px solid #d0d7de;"
         "padding:.3rem .5rem;text-align:left;vertical-align:top}.small{font-size:13px;color:#57606a}svg{max-width:100%}")
