"""A run's record as a page and for TensorBoard; what a run spends beside its steps."""

import json
import re

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fathom.errors import RecipeError
from fathom.train.charts import Curve, heatmap, line_chart
from fathom.train.report import write_report
from fathom.train.tracking import Tracker, overheads
from tests.runs import fathom, micro_recipe


def test_a_run_becomes_one_page_that_needs_nothing_else(tmp_path):
    recipe = micro_recipe(tmp_path, dense_steps=8, indexer_warmup_steps=3)
    result = fathom("train", recipe, "--set", 'tracking.prompts=["the <b>sea", "a"]', "--set", "tracking.layers_every=3",
                    "--set", "tracking.sample_tokens=8", "--set", "optimizer=adamw", "--set", "stability.window=6", timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    attention = [line["attention"] for line in lines if "loss" in line]
    assert attention == ["dense"] * 8 + ["warmup"] * 3 + ["sparse"] * 9
    assert [line["step"] for line in lines if "samples" in line] == [5, 10, 15, 20]
    assert "data loading" in result.stdout and "checkpoints" in result.stdout

    result = fathom("report", tmp_path / "run", timeout=300)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("Training loss", "Validation, bits per byte", "indexer&#x27;s divergence", "Router entropy", "Expert load", "Layer 1",
                 "Samples over time", "the &lt;b&gt;sea", "dense_steps = 8", "9: 64 tokens, warmup attention", "checkpoints, of the steps"):
        assert text in page, text
    assert not re.search(r'(src|href)=|url\(|@import|<script|the <b>sea', page)


def test_runs_stand_beside_each_other_at_equal_tokens_with_what_differs(tmp_path):
    for name, optimizer, score in (("first", "muon", 1.5), ("second", "adamw", 1.75)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(f'run = "{name}"\noptimizer = "{optimizer}"\n[schedule]\nsteps = 2\n')
        lines = [{"step": 1, "loss": 2.0, "tokens": 1000, "rate": 0.1}, {"step": 2, "loss": 1.0, "tokens": 2000, "rate": 0.1},
                 {"step": 2, "validation_bits_per_byte": score}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path / "first", beside=[tmp_path / "second"]).read_text(encoding="utf-8")
    assert "<td>second</td><td>optimizer = adamw</td><td class=\"n\">3,000</td><td class=\"n\">1.750</td>" in page
    (tmp_path / "second" / "recipe.toml").unlink()
    assert "<td>second</td><td></td>" in write_report(tmp_path / "first", beside=[tmp_path / "second"]).read_text(encoding="utf-8")
    assert "Validation, bits per byte, over millions of tokens" in page and "Beside" not in write_report(tmp_path / "first").read_text(encoding="utf-8")


def test_reporting_on_nothing_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="has recorded no step"):
        write_report(tmp_path)


def test_tensorboard_gets_what_the_file_gets_and_forgets_what_a_rollback_abandons(tmp_path):
    with Tracker(tmp_path, 5, 0, Console(quiet=True), tensorboard=True) as tracker:
        for step in (1, 2, 3):
            tracker.record(step, {"loss": 4.0 - step, "tokens_per_second": 10.0})
        tracker.record_samples(3, [{"prompt": "a", "text": "b"}], 0.1)
        tracker.record_spike(3, 1)
        tracker.record(2, {"loss": 0.5, "tokens_per_second": 10.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 0.5)]
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in kept] == [(1, 3.0), (2, 0.5)]
    assert json.loads((tmp_path / "events.jsonl").read_text())["losses"] == [[2, 2.0], [3, 1.0]]


def test_a_step_on_an_accelerator_says_its_share_of_the_peak(tmp_path):
    console = Console(record=True, width=120)
    with Tracker(tmp_path, 1, 0, console) as tracker:
        tracker.record(1, {"loss": 1.0, "tokens_per_second": 10.0, "mfu": 0.341})
    assert "10 tokens/s  MFU 34%" in console.export_text()


def test_overheads_are_shares_of_the_steps_time():
    lines = [{"seconds": 2.0, "data_seconds": 0.1}, {"seconds": 2.0, "data_seconds": 0.1}, {"checkpoint_seconds": 0.4}]
    assert overheads(lines) == {"data loading": pytest.approx(0.05), "checkpoints": pytest.approx(0.1), "validation": 0.0, "samples": 0.0}
    assert overheads([]) == {}


def test_charts_hold_all_values_and_survive_odd_ones():
    chart = line_chart("a < b", [Curve("x", [(0, 1.0), (1, float("nan")), (2, 3.0)]), Curve("none", [])], [(1, "here")])
    assert "a &lt; b" in chart and chart.count("<circle") == 2 and "here" in chart
    assert line_chart("empty", [Curve("x", [])]) == ""
    assert line_chart("zeros", [Curve("x", [(0, 0.0), (1, 0.0)])], logarithmic=True) == ""
    assert "<polyline" in line_chart("flat", [Curve("x", [(step, 2.0) for step in range(5000)])])
    assert heatmap("load", [1, 2], [[1.0, 0.0], [1.0, 2.5]]).count("<rect") == 4
