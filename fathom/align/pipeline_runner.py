"""Runs the stages of a pipeline: each in a process of its own, or in one for each of its ranks, and only what is not done yet.

A finished stage leaves a marker with its command and the checksums of what it read and made; what was stopped continues from its newest
checkpoint.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fathom.checkpoint.training import list_checkpoints
from fathom.errors import FathomError
from fathom.files import sha256, write_text
from fathom.signals import termination_as_interrupt
from fathom.train.ranks import LOST_ANOTHER

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StageCommand:
    """A stage: its name, what `fathom` runs, the stages before it, the folder or file that it makes, files that it reads beside those, and the
    processes that run it together.
    """

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...]
    makes: Path
    reads: tuple[Path, ...] = ()
    ranks: int = 1


class StageFailed(FathomError):
    """A stage of a pipeline ended with an error."""


class Runner:
    """Runs stages in processes, `workers` at a time, each with one thread, and remembers in markers which are done. A stage of more ranks
    than are free waits, and what comes after it too; of more than `workers`, it runs alone.
    """

    program = (sys.executable, "-m", "fathom.cli")

    def __init__(self, run: Path, stages: Sequence[StageCommand], workers: int, console: Console):
        self.run_folder, self.stages, self.workers, self.console = run, stages, workers, console
        self.by_name = {stage.name: stage for stage in stages}
        needed = {name for stage in stages for name in stage.after}
        self.in_order = sorted(stages, key=lambda stage: stage.name not in needed)  # scores, for which nothing waits, fill the gaps
        self.done: set[str] = set()
        self._skip_done()
        self.running: dict[StageCommand, tuple[list[subprocess.Popen], float]] = {}

    def run(self) -> None:
        """Run until all are done. StageFailed names the first that failed and its log, after the others were stopped."""
        with termination_as_interrupt():
            try:
                while len(self.done) < len(self.stages):
                    self._start()
                    time.sleep(POLL_SECONDS)
                    self._collect()
            finally:
                self._stop()

    def _skip_done(self) -> None:
        """Take over, in order, what was done before from the very same inputs."""
        for stage in self.stages:
            if stage.name not in self.done and self._is_done(stage):
                self.done.add(stage.name)
                self.console.print(f"{stage.name}: done before", soft_wrap=True)

    def _start(self) -> None:
        for stage in self.in_order:
            if stage.name in self.done or stage in self.running or not self.done.issuperset(stage.after):
                continue
            if self.running and sum(running.ranks for running in self.running) + stage.ranks > self.workers:
                break
            resumes = self._continues(stage)
            self.running[stage] = self._processes(stage, ["--resume"] if resumes else []), time.monotonic()
            self.console.print(f"{stage.name}: {'continues' if resumes else 'starts'}", soft_wrap=True)

    def _processes(self, stage: StageCommand, more: Sequence[str]) -> list[subprocess.Popen]:
        """The stage's ranks, which find each other as those of torchrun do."""
        together = {"WORLD_SIZE": str(stage.ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())} if stage.ranks > 1 else {}
        with open(self._path(stage, "log"), "ab") as log:
            return [subprocess.Popen([*self.program, *stage.arguments, *more], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"} | together | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {}),
                                     start_new_session=True, preexec_fn=_die_with_parent) for rank in range(stage.ranks)]

    def _continues(self, stage: StageCommand) -> bool:
        """Whether there is a checkpoint to go on from. What was begun from other inputs is deleted first."""
        begun, key = self._path(stage, "begun"), json.dumps(self._key(stage), indent=2) + "\n"
        if not begun.is_file() or begun.read_text(encoding="utf-8") != key:
            shutil.rmtree(stage.makes, ignore_errors=True)
            stage.makes.unlink(missing_ok=True)
            self._path(stage, "seconds").unlink(missing_ok=True)
            write_text(begun, key)
        return bool(list_checkpoints(stage.makes))

    def _key(self, stage: StageCommand) -> dict:
        """All that decides what a stage makes: its command, its recipe, the files it reads, and the results of the stages before it.

        Paths are as seen from here, so that a folder may be moved with all that is in it.
        """
        recipe = sha256(Path(stage.arguments[1])) if stage.arguments[1].endswith(".toml") else None
        here = f"{Path.cwd()}{os.sep}"
        return {"arguments": [argument.replace(here, "") for argument in stage.arguments], "recipe": recipe, "files": [sha256(path) for path in stage.reads],
                "inputs": {name: _checksums(self.by_name[name].makes) for name in stage.after}}

    def _collect(self) -> None:
        for stage, (processes, began) in [*self.running.items()]:
            codes = [process.poll() for process in processes]
            if None in codes and not any(codes):
                continue
            if any(codes):
                _ask_to_end(processes)
            for process in processes:
                process.wait()
            del self.running[stage]
            if any(codes):
                raise StageFailed(f"stage {stage.name} failed ({_last_words(self._path(stage, 'log'))}); its output is in {self._path(stage, 'log')}; "
                                  "run the pipeline again to go on")
            seconds = time.monotonic() - began
            add_seconds(self._path(stage, "seconds"), seconds)
            marker = self._key(stage) | {"checksums": _checksums(stage.makes), "seconds": seconds_in(self._path(stage, "seconds"))}
            write_text(self._path(stage, "json"), json.dumps(marker, indent=2) + "\n")
            self.done.add(stage.name)
            self.console.print(f"{stage.name}: done in {seconds / 60:.1f} minutes", soft_wrap=True)
            self._skip_done()

    def _stop(self) -> None:
        """Ask what still runs to save and end."""
        for processes, _ in self.running.values():
            _ask_to_end(processes)
        for stage, (processes, began) in self.running.items():
            for process in processes:
                process.wait()
            add_seconds(self._path(stage, "seconds"), time.monotonic() - began)

    def _is_done(self, stage: StageCommand) -> bool:
        try:
            marker = json.loads(self._path(stage, "json").read_text(encoding="utf-8"))
            wanted = self._key(stage) | {"checksums": _checksums(stage.makes)}
            return self.done.issuperset(stage.after) and all(marker[name] == value for name, value in wanted.items())
        except (OSError, ValueError, KeyError, StageFailed):
            return False

    def _path(self, stage: StageCommand, suffix: str) -> Path:
        return self.run_folder / "stages" / f"{stage.name.replace('/', '.')}.{suffix}"


def _checksums(path: Path) -> dict[str, str]:
    """Of a file; of a run's newest checkpoint, whose manifest has those of all files; or of a model folder's files."""
    if path.is_file():
        return {path.name: sha256(path)}
    checkpoints = list_checkpoints(path)
    files = [checkpoints[-1] / "training" / "manifest.json"] if checkpoints else sorted(path.glob("*.*"))
    if not files:
        raise StageFailed(f"{path} was not made")
    return {str(file.relative_to(path)): sha256(file) for file in files}


def seconds_in(path: Path) -> float:
    """What has been added up in this file; 0 without it."""
    return float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0


def add_seconds(path: Path, seconds: float) -> None:
    """Add to what stands in this file, which need not exist."""
    write_text(path, f"{seconds_in(path) + seconds}\n")


def _last_words(log: Path) -> str:
    """The last line of a stage's output: of several ranks the failed one's, not of one that lost it."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if LOST_ANOTHER not in line), (lines or [""])[-1])


def _ask_to_end(processes: Sequence[subprocess.Popen]) -> None:
    """Once: whoever is asked again ends without saving."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _die_with_parent() -> None:
    """Where Linux can: a stage does not outlive a pipeline that was killed, so that the next one may continue it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
