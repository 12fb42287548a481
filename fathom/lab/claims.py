"""`fathom lab run`: the runs of experiments, some at a time, those that are finished kept; then their verdicts.

FOLDER/EXPERIMENT/VARIANT-SEED/ holds a run and its numbers (FOLDER/base/SEED/ what those train that change nothing), FOLDER/EXPERIMENT.json
an experiment's result.
"""

import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fathom import recipe as recipes
from fathom.errors import FathomError, InputError
from fathom.files import write_text
from fathom.lab.bench.machine import commit
from fathom.lab.experiment import Experiment, Variant
from fathom.lab.experiments import EXPERIMENTS
from fathom.lab.one_run import RESULT, training_folder
from fathom.signals import interrupts_held, termination_as_interrupt
from fathom.train.pretrain import Pretrain
from fathom.train.tracking import read_metrics

LOOK_SECONDS = 0.5


class Job(NamedTuple):
    """One run that is to be made."""

    experiment: Experiment
    variant: Variant
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        """For a line of progress."""
        return f"{self.experiment.name}: {self.variant.name}, seed {self.seed}"

    @property
    def training(self) -> Path:
        """The folder that it trains in, which may be that of other jobs too."""
        return training_folder(self.variant, self.seed, self.folder)


def chosen(name: str) -> list[Experiment]:
    """The experiment of that name, or all of them; InputError for another name."""
    if name == "all":
        return [*EXPERIMENTS.values()]
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; allowed: list, all, {', '.join(EXPERIMENTS)}")
    return [EXPERIMENTS[name]]


def show_list(console: Console) -> None:
    """Every experiment with its claim and number of runs."""
    table = Table("name", "claim", "source", "runs")
    for experiment in EXPERIMENTS.values():
        table.add_row(experiment.name, experiment.claim, experiment.source, str(len(experiment.variants) * len(experiment.seeds)))
    console.print(table)


def run_experiments(name: str, out: Path, base: Path, overrides: list[str], jobs: int, console: Console) -> list[dict[str, Any]]:
    """Make all runs that are missing, judge, and keep each experiment's result. FathomError where a run fails; the others are kept."""
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; allowed: at least 1")
    steps = recipes.load(Pretrain, base, overrides).schedule.steps  # a wrong recipe is told before anything starts
    experiments = chosen(name)
    wanted = [Job(experiment, variant, seed, out / experiment.name / f"{variant.name.replace(' ', '-')}-{seed}")
              for experiment in experiments for variant in experiment.variants for seed in experiment.seeds]
    missing = [job for job in wanted if not _finished(job, overrides)]
    console.print(f"{len(wanted)} runs of {steps} steps, {len(wanted) - len(missing)} of them finished; {jobs} at a time", soft_wrap=True)
    failed = _work(missing, base, overrides, jobs, steps, console)
    results = []
    for experiment in experiments:
        if any(job.experiment is experiment for job in failed):
            continue
        results.append(judge(experiment, out, overrides))
        write_text(out / f"{experiment.name}.json", json.dumps(results[-1], indent=1) + "\n")
        console.print(f"{experiment.name}: {results[-1]['verdict']} - {results[-1]['ours']}", soft_wrap=True, highlight=False)
    if failed:
        lines = (failed[0].folder / "log.txt").read_text(encoding="utf-8").strip().splitlines() or ["no word"]
        raise FathomError(f"{len(failed)} runs failed, first {failed[0].title}: {lines[-1]} (all of it: {failed[0].folder / 'log.txt'})")
    return results


def judge(experiment: Experiment, out: Path, overrides: list[str]) -> dict[str, Any]:
    """An experiment's result from its finished runs."""
    runs = [json.loads((out / experiment.name / f"{variant.name.replace(' ', '-')}-{seed}" / RESULT).read_text(encoding="utf-8"))
            for variant in experiment.variants for seed in experiment.seeds]
    numbers = {variant.name: [run["numbers"] for run in runs if run["variant"] == variant.name] for variant in experiment.variants}
    verdict = experiment.judge(numbers)
    changed = "".join(f" --set {override}" for override in overrides)
    return {"name": experiment.name, "claim": experiment.claim, "source": experiment.source, "rule": experiment.rule, "metric": experiment.metric,
            "verdict": verdict.outcome, "ours": verdict.ours, "command": f"fathom lab run {experiment.name}{changed}", "commit": commit(),
            "seconds": sum(run["seconds"] for run in runs), "seeds": list(experiment.seeds), "overrides": overrides, "numbers": numbers,
            "curves": {variant.name: [run["curve"] for run in runs if run["variant"] == variant.name] for variant in experiment.variants}}


def _finished(job: Job, overrides: list[str]) -> bool:
    """Whether the run has its numbers; InputError where they are of another recipe."""
    path = job.folder / RESULT
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["overrides"] != overrides:
        raise InputError(f"{job.folder} holds a run with other --set; name another folder with --out, or delete it")
    return True


def _work(missing: list[Job], base: Path, overrides: list[str], jobs: int, steps: int, console: Console) -> list[Job]:
    """Run processes, `jobs` at a time; those jobs that failed. On Ctrl-C or SIGTERM they save and stop, too."""
    waiting, failed = deque(missing), []
    running: list[tuple[Job, subprocess.Popen, TaskID]] = []
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    with termination_as_interrupt(), Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        whole = progress.add_task("all runs", total=len(missing))
        try:
            while waiting or running:
                while len(running) < jobs and (job := _next(waiting, {other.training for other, _, _ in running})) is not None:
                    waiting.remove(job)
                    task = progress.add_task(job.title, total=steps)
                    with interrupts_held() as answer:
                        running.append((job, _start(job, base, overrides), task))
                        answer()
                time.sleep(LOOK_SECONDS)
                for entry in [*running]:
                    job, process, task = entry
                    progress.update(task, completed=_steps(job))
                    if process.poll() is not None:
                        progress.remove_task(task)
                        progress.advance(whole)
                        running.remove(entry)
                        failed += [job] if process.returncode else []
                        console.print(f"{job.title}: {'failed' if process.returncode else 'done'}", soft_wrap=True, highlight=False)
        finally:
            for _, process, _ in running:
                process.terminate()
            for _, process, _ in running:
                process.wait()
    return failed


def _next(waiting: deque[Job], busy: set[Path]) -> Job | None:
    """The first job whose folder no other one trains in."""
    return next((job for job in waiting if job.training not in busy), None)


def _start(job: Job, base: Path, overrides: list[str]) -> subprocess.Popen:
    job.folder.mkdir(parents=True, exist_ok=True)
    arguments = [job.experiment.name, job.variant.name, str(job.seed), str(job.folder), str(base), *overrides]
    with open(job.folder / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, "-m", "fathom.lab.one_run", *arguments], stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # Ctrl-C reaches it through us, once


def _steps(job: Job) -> int:
    return max((line["step"] for line in read_metrics(job.training / "run")), default=0)
