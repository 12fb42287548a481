"""The parent: one fresh process for each case, one after the other, and what was measured when it is stopped."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fathom.files import write_text
from fathom.lab.bench.machine import commit, machine
from fathom.lab.bench.plan import BenchError, Case, Plan
from fathom.lab.bench.report import draw, name_of, table
from fathom.lab.bench.shares import add_ratios, figures
from fathom.signals import child_process

CHILD = "fathom.lab.bench.child"
PEERS = {"transformers": "fathom.lab.bench.peer_transformers"}
CEILINGS = "fathom.lab.bench.ceilings"
FAILED, INTERRUPTED = 1, 130  # exit codes


class Failure(Exception):
    """A measuring process that ended without a result, in a few words."""


def bench(plan: Plan, cases: list[Case], out: Path | None, console: Console) -> int:
    """Measure the cases, print the table, keep figures and plot at `out`; returns the exit code.

    Ctrl-C ends the running case; everything measured before is printed and kept.
    """
    _check(out)
    report: dict[str, Any] = {
        "model": plan.model, "config": plan.config.to_dict(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "commit": commit(),
        "command": ["fathom", *sys.argv[1:]], "machine": machine(), "ceilings": None, "interrupted": False, "rows": []}
    try:
        _measure(plan, cases, report, out, console)
    except KeyboardInterrupt:
        report["interrupted"] = True
    rows = report["rows"]
    if rows:
        console.print(table(report))
        _keep(report, out)
        if out and (picture := draw(report, out.with_suffix(".png"))):
            console.print(f"kept: {out}, {picture}", soft_wrap=True)
        elif out:
            console.print(f"kept: {out}", soft_wrap=True)
    if report["interrupted"]:
        console.print(f"interrupted: {len(rows)} of {len(cases)} cases measured", soft_wrap=True)
        return INTERRUPTED
    return FAILED if any("failed" in row for row in rows if row["program"] == "fathom") else 0


def _measure(plan: Plan, cases: list[Case], report: dict[str, Any], out: Path | None, console: Console) -> None:
    """Fill the report, case by case."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("the machine's ceilings", total=len(cases))
        try:
            report["ceilings"] = run_child(CEILINGS, json.dumps({"threads": plan.threads, "device": plan.device}), plan.threads)
        except Failure as failure:
            if "InputError" in str(failure):
                raise BenchError(str(failure).split("InputError: ")[-1]) from None
            console.print(f"the machine's ceilings: {failure}", soft_wrap=True)
        for case in cases:
            row = {"kind": case.kind, "length": case.length, "batch": case.batch, "program": case.program, "dtype": case.dtype,
                   "device": case.device, "repeats": case.repeats, "mtp": case.mtp, **({"optimizer": case.optimizer} if case.kind == "train" else {})}
            label, began = f"{name_of(row)}, {case.dtype}, {case.program}", time.monotonic()
            progress.update(task, description=label)
            try:
                outcome = run_child(PEERS.get(case.program, CHILD), case.to_json(), case.threads)
                row |= figures(case, outcome, report["ceilings"])
                result = f"{row['tokens_per_second']['median']:,.1f} tokens/s"
            except Failure as failure:
                row["failed"] = result = str(failure)
            row["elapsed"] = time.monotonic() - began
            report["rows"].append(row)
            add_ratios(report["rows"])
            _keep(report, out)
            progress.advance(task)
            if "failed" in row or not console.is_terminal:
                console.print(f"{label}: {result}  ({row['elapsed']:.0f} s)", soft_wrap=True)


def run_child(module: str, argument: str, threads: int | None = None) -> dict[str, Any]:
    """Run `python -m module argument` to its end and return the JSON of its last line; raises Failure.

    It does not outlive this call, nor this process: its standard input closes with the parent.
    """
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no compiler processes beside a measurement
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with child_process([sys.executable, "-m", module, argument], stdin=subprocess.PIPE, stdout=output, stderr=errors,
                           env=environment) as process:
            process.wait()
        if process.returncode < 0:
            raise Failure(f"died (signal {-process.returncode})")
        output.seek(0)
        errors.seek(0)
        lines = output.read().split("\n")
        if process.returncode:
            raise Failure(f"failed: {(errors.read().strip().splitlines() or ['exit code ' + str(process.returncode)])[-1]}")
    try:
        return json.loads(lines[-2])
    except (IndexError, json.JSONDecodeError):
        raise Failure("failed: it wrote no result") from None


def _keep(report: dict[str, Any], out: Path | None) -> None:
    if out:
        write_text(out, json.dumps(report, indent=1) + "\n")


def _check(out: Path | None) -> None:
    """Whether the file can be written is known before hours of measuring."""
    if out is None:
        return
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BenchError(f"cannot write {out}; name a file in a folder that can be written")
