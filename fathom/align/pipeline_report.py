"""The report of a pipeline: one HTML page with what was scored, what that shows, curves, and the minutes of every stage."""

import base64
import html
import io
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fathom.accounting import parameters
from fathom.align.pipeline import JUDGING, SECONDS, Pipeline
from fathom.align.pipeline_runner import seconds_in
from fathom.align.scores import Row
from fathom.checkpoint.training import find_model
from fathom.config import ModelConfig
from fathom.errors import FathomError
from fathom.files import write_text
from fathom.train.tracking import read_metrics

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse;"
         "margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
         "b.own{color:#1f5a94}.no{color:#a33}img{max-width:100%}caption{text-align:left;color:#555}")
COMPARED = (("student", "the student before distillation"), ("distilled", "on-policy distillation"), ("off-policy", "off-policy distillation"),
            ("average", "weights averaged"), ("mixed", "one mixed-reward GRPO run"))
VARIANTS = (("Base", "base", "chat"), ("", "distilled", "high"), ("Max", "distilled", "max"))


def write_report(recipe: Pipeline) -> Path:
    """Write report.html and report.json in the run's folder; the page's path."""
    if pyplot is None:
        raise FathomError("the report needs matplotlib; run: pip install 'fathom[plots]'")
    run = Path(recipe.run)
    scores = gather_scores(run)
    found = checks(recipe, scores)
    variants = variant_rows(recipe, scores)
    parts = ["<h1>Post-training: specialists, one student, three modes</h1>", _heading(recipe), "<h2>What it shows</h2>",
             _table(["claim", "measured", "holds"], [[claim, measured, "yes" if holds else '<span class="no">no</span>']
                                                     for claim, measured, holds in found], raw=True),
             "<h2>Six variants</h2>", _table(["model", "weights", "mode", *recipe.environments], variants)]
    for size in recipe.sizes:
        for effort in ("chat", "high"):
            parts.append(_table([f"{size.name}, mode {effort}", *recipe.environments], _model_rows(recipe, scores, size.name, effort), raw=True,
                                caption=f"Mean held-out reward of {recipe.tasks} tasks ± its standard error; a specialist's own domain is blue.{_claimed(recipe, size.name, effort)}"))
    judged = _judge_rows(recipe, scores)
    if judged:
        parts += ["<h2>The judge</h2>", _table(["model", "verdicts right (held-out judging tasks)", "answers right by the hidden rule (judged-math)"], judged),
                  _agreement(recipe)]
    parts += ["<h2>Curves</h2>", *_curves(recipe, scores), "<h2>Minutes</h2>", _minutes(recipe, run)]
    write_text(run / "report.json", json.dumps({"checks": found, "variants": variants, "scores": scores, "minutes": round(seconds_in(run / SECONDS) / 60, 1)}, indent=2) + "\n")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Post-training</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    write_text(run / "report.html", page)
    return run / "report.html"


def gather_scores(run: Path) -> dict[str, list[Row]]:
    """Every model's rows: those of scores/, in their place those of claims/, which have more tasks, and behind them those of budgets/."""
    def read(folder: str) -> dict[str, list[Row]]:
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((run / folder).glob("*.json"))}

    scores = read("scores")
    for model, rows in read("claims").items():
        decided = {(row["environment"], row["effort"]) for row in rows}
        scores[model] = [row for row in scores.get(model, []) if (row["environment"], row["effort"]) not in decided] + rows
    for model, rows in read("budgets").items():
        scores[model] = scores.get(model, []) + [row for row in rows if row["budget"] is not None]
    return scores


def mean_of(rows: Sequence[Row], environment: str, effort: str, budget: int | None = None) -> Row | None:
    """The row of an environment, effort and budget, if it was measured."""
    return next((row for row in rows if (row["environment"], row["effort"], row["budget"]) == (environment, effort, budget)), None)


def checks(recipe: Pipeline, scores: dict[str, list[Row]]) -> list[tuple[str, str, bool]]:
    """Claims about the first full size, what was measured, and whether it holds. Computed from the scores alone."""
    s, found = recipe.teachers_size, []

    def score(model: str, environment: str, effort: str = "high", budget: int | None = None) -> float:
        row = mean_of(scores.get(f"{s}.{model}", []), environment, effort, budget)
        return row["score"] if row else float("nan")

    for name in recipe.environments:
        before, after = score(f"sft-{name}", name), score(f"grpo-{name}", name)
        found.append((f"GRPO gains 15 points over SFT in {name}", f"{before:.1%} → {after:.1%}", after - before >= 0.15))
    for name in recipe.environments:
        teacher, student = score(f"grpo-{name}", name), score("distilled", name)
        found.append((f"the distilled student keeps 95% of the specialist's score in {name}", f"{student:.1%} of {teacher:.1%}",
                      student >= 0.95 * teacher > 0))
    if "math" in recipe.environments:
        off, on = score("distilled", "math", "chat"), score("distilled", "math")
        found.append(("thinking beats answering at once in math", f"{off:.1%} → {on:.1%}", on > off))
        if recipe.budgets:
            low, high = (score("distilled", "math", "high", edge(recipe.budgets)) for edge in (min, max))
            found.append((f"a thinking budget of {max(recipe.budgets)} beats {min(recipe.budgets)} in math", f"{low:.1%} → {high:.1%}", high > low))
    calls = [row for row in scores.get(f"{s}.distilled", []) if row["calls"] and row["budget"] is None]
    if calls:
        valid, total = (sum(row[name] for row in calls) for name in ("valid_calls", "calls"))
        found.append(("over 98% of the student's tool calls are valid", f"{valid} of {total}", valid > 0.98 * total))
    return found


def variant_rows(recipe: Pipeline, scores: dict[str, list[Row]]) -> list[list[str]]:
    """Each size as base, chat and max: name, where the weights are, mode, a score for each environment."""
    rows = []
    for size in recipe.sizes:
        for suffix, stage, effort in VARIANTS:
            cells = [mean_of(scores.get(f"{size.name}.{stage}", []), name, effort) for name in recipe.environments]
            rows.append(["-".join(filter(None, (size.name.capitalize(), suffix))), f"{size.name}/{stage}", effort,
                         *(f"{row['score']:.1%}" if row else "-" for row in cells)])
    return rows


def _model_rows(recipe: Pipeline, scores: dict[str, list[Row]], size: str, effort: str) -> list[list[str]]:
    models = [("base", "base")]
    models += [(f"{kind}-{name}", f"{title} {name}") for name in recipe.environments for kind, title in (("sft", "SFT"), ("grpo", "GRPO"))]
    rows = []
    for model, title in [*models, *COMPARED]:
        measured = scores.get(f"{size}.{model}")
        if measured is not None:
            cells = [(name, mean_of(measured, name, effort)) for name in recipe.environments]
            texts = [f"{row['score']:.1%} ± {row['error']:.1%}" if row else "-" for _, row in cells]
            rows.append([title, *(f'<b class="own">{text}</b>' if model.endswith(f"-{name}") else text
                                  for (name, _), text in zip(cells, texts, strict=True))])
    return rows


def _claimed(recipe: Pipeline, size: str, effort: str) -> str:
    if recipe.claim_tasks <= recipe.tasks or (size, effort) != (recipe.teachers_size, "high"):
        return ""
    return f" Specialists at home and students everywhere were asked {recipe.claim_tasks}, which the claims above are decided by."


def _judge_rows(recipe: Pipeline, scores: dict[str, list[Row]]) -> list[list[str]]:
    rows = []
    for model, title in (("sft-judge", "SFT on judgements and tasks"), ("judge", "GRPO on known verdicts, and on its own")):
        cells = [mean_of(scores.get(f"{recipe.teachers_size}.{model}", []), name, "high") for name in JUDGING]
        if any(cells):
            rows.append([title, *(f"{row['score']:.1%} ± {row['error']:.1%}" if row else "-" for row in cells)])
    return rows


def _agreement(recipe: Pipeline) -> str:
    shares = [line["judge_agreement"] for line in read_metrics(Path(recipe.run) / recipe.teachers_size / "judge") if "judge_agreement" in line]
    if not shares:
        return ""
    first, last = (sum(part) / len(part) for part in (shares[:10], shares[-10:]))
    return (f"<p>Agreement of its verdicts with the hidden rule, on the answers that it rewarded in training: {first:.1%} in the first {len(shares[:10])} "
            f"updates, {last:.1%} in the last.</p>")


def _heading(recipe: Pipeline) -> str:
    sizes = []
    for size in recipe.sizes:
        counts = parameters(ModelConfig.load(find_model(Path(recipe.run) / size.name / "distilled")))
        sizes.append(f"{size.name} ({counts.total / 1e6:.2f}M parameters, {counts.activated / 1e6:.2f}M activated)")
    return (f"<p>Sizes: {', '.join(sizes)}. {_careless(recipe)}{recipe.tasks} held-out tasks of each environment and mode, levels {list(recipe.levels)}, temperature "
            f"{recipe.temperature:g}, at most {recipe.score_tokens} tokens an episode; seed {recipe.seed}. A stage is one process with one thread{''.join(f', the base and the start of {size.name} {size.ranks} processes' for size in recipe.sizes if size.ranks > 1)}.</p>")


def _careless(recipe: Pipeline) -> str:
    """How many of the demonstrations leave something out, in words; nothing where none does."""
    paths = [Path(recipe.run) / recipe.teachers_size / f"sft-{name}" / "recipe.toml" for name in recipe.environments]
    shares = {tomllib.loads(path.read_text(encoding="utf-8"))["demonstrations"].get("careless", 0.0) for path in paths if path.is_file()}
    return f"Of the demonstrations, {max(shares):.0%} leave the last thing out. " if any(shares) else ""


def _curves(recipe: Pipeline, scores: dict[str, list[Row]]) -> list[str]:
    run, s = Path(recipe.run), recipe.teachers_size
    plots = []
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), dpi=110, layout="constrained")
    for name in [*(f"grpo-{name}" for name in recipe.environments), "mixed"]:
        _line(left, run / s / name, "score", name)
    left.set(title="GRPO: score of the rollouts", xlabel="update", ylabel="mean score")
    for name in ("distilled", "off-policy"):
        _line(right, run / s / name, "loss", name)
    right.set(title="distillation: divergence from the teachers", xlabel="update", ylabel="nats per token", yscale="log")
    plots.append(figure)
    rows = scores.get(f"{s}.distilled", [])
    if recipe.budgets and rows:
        figure, axis = pyplot.subplots(figsize=(7, 4), dpi=110, layout="constrained")
        for name in recipe.environments:
            points = [(budget, mean_of(rows, name, "high", budget)) for budget in sorted(recipe.budgets)]
            points = [(budget, row["score"]) for budget, row in points if row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title="the student's score against its thinking budget", xlabel="tokens of reasoning at most", ylabel="score")
        axis.legend(frameon=False)
        plots.append(figure)
    return [_image(figure) for figure in plots]


def _line(axis: "matplotlib.axes.Axes", run: Path, name: str, label: str) -> None:
    points = [(line["step"], line[name]) for line in read_metrics(run) if name in line]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, linewidth=1)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)


def _image(figure: "matplotlib.figure.Figure") -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    pyplot.close(figure)
    return f'<p><img alt="curves" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"></p>'


def _minutes(recipe: Pipeline, run: Path) -> str:
    seconds = {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in sorted((run / "stages").glob("*.json"))}
    rows = [[name, f"{value / 60:.1f}"] for name, value in seconds.items()]
    whole = f"{seconds_in(run / SECONDS) / 60:.1f}"
    return _table(["stage", "minutes"], [*rows, ["all stages", f"{sum(seconds.values()) / 60:.1f}"],
                                         [f"from start to end, {recipe.workers} stages at a time", whole]])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], raw: bool = False, caption: str = "") -> str:
    def line(cells: Sequence[str], tag: str, raw: bool) -> str:
        return f"<tr>{''.join(f'<{tag}>{cell if raw else html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return (f"<table>{f'<caption>{html.escape(caption)}</caption>' if caption else ''}{line(heads, 'th', False)}"
            f"{''.join(line(row, 'td', raw) for row in rows)}</table>")
