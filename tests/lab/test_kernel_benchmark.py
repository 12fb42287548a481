"""The benchmark of single operators runs, here at a small shape on the CPU, and says what it would take elsewhere."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"


def rows(tmp_path, *options):
    done = subprocess.run([sys.executable, BENCHMARK, "--out", tmp_path / "rows.json", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(done.stdout.splitlines()) == len(found) + 1
    return found


def test_every_operator_is_measured(tmp_path):
    measured = rows(tmp_path, "--device", "cpu", "--shape", "small")
    assert not [row for row in measured if "error" in row]
    assert all(row["ms"] > 0 and row["share"] > 0 for row in measured)
    assert {row["operator"] for row in measured} == {row["operator"] for row in rows(tmp_path, "--predict", "--shape", "small")}


def test_an_operator_that_fails_costs_no_other_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(BENCHMARK.parent), *sys.path])
    import kernels

    class DoesNotFit(Exception):
        """As Triton's own, which are no RuntimeErrors."""

    def fails(new):
        raise DoesNotFit("out of shared memory\nand more")

    one, other = (case for case in kernels.cases(kernels.SHAPES["small"], torch.bfloat16) if case.name in ("norm", "rotation"))
    monkeypatch.setattr(kernels, "cases", lambda shape, dtype: [replace(one, make=fails), other])
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", "--out", str(tmp_path / "rows.json")])
    kernels.main()
    failed, measured = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert failed == {"operator": "norm", "error": "DoesNotFit: out of shared memory"} and measured["ms"] > 0
    assert "failed: DoesNotFit: out of shared memory" in capsys.readouterr().out


def test_what_is_predicted_is_work_over_the_rate(tmp_path):
    attention, = rows(tmp_path, "--predict", "--only", "attention, prefill, window and selected")
    assert attention["work"] == 4 * 4096 * 64 * 512 * (128 + 512) and attention["ms"] == attention["work"] / 989e12 * 1e3
