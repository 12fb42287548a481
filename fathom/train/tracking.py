"""What a run leaves to look at: metrics as JSON lines, live progress, the loss curve as a picture."""

import json
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fathom.errors import CheckpointError
from fathom.files import write_text

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

METRICS = "metrics.jsonl"
CURVE = "loss.png"
_QUIET_SECONDS = 10  # between lines where the output is no terminal


class Tracker:
    """Records every step of a run in `metrics.jsonl` and shows where it is; lines after `start` (a resume) are dropped."""

    def __init__(self, run: Path, steps: int, start: int, console: Console):
        self.run, self.steps, self.console = run, steps, console
        self.started = self.printed = time.monotonic()
        self.start = start
        kept = [line for line in read_metrics(run) if line["step"] <= start] if start else []
        write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(run / METRICS, "a", encoding="utf-8")
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal)
        self.task = self.progress.add_task(run.name, total=steps, completed=start, state="")

    def __enter__(self) -> "Tracker":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.progress.stop()
        self.file.close()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step's metrics and move the bar; `step` counts the steps done."""
        self._append({"step": step} | metrics)
        reward = f"reward {metrics['reward']:.3f}  " if "reward" in metrics else ""
        state = f"{reward}loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, state=state)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed > _QUIET_SECONDS or step == self.steps):
            self.printed = now
            left = (now - self.started) / max(step - self.start, 1) * (self.steps - step)
            self.console.print(f"step {step}/{self.steps}  {state}  {left:.0f} s left", soft_wrap=True)

    def record_validation(self, step: int, bits_per_byte: float) -> None:
        """Append a validation result and print it."""
        self._append({"step": step, "validation_bits_per_byte": bits_per_byte})
        self.console.print(f"step {step}: validation {bits_per_byte:.3f} bits per byte", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)

    def _append(self, line: dict[str, float]) -> None:
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.run / METRICS}: {error.strerror or error}") from error


def read_metrics(run: Path) -> list[dict[str, float]]:
    """All complete lines of a run's metrics; the last one may have been cut off by a kill."""
    lines = []
    if (run / METRICS).exists():
        for line in (run / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def draw_curve(run: Path) -> Path | None:
    """Draw the training loss (or, where rewards are earned, the reward) and validation bits per byte of a run; None where matplotlib is not
    installed.
    """
    if pyplot is None:
        return None
    lines = read_metrics(run)
    name = "reward" if any("reward" in line for line in lines) else "loss"
    train = [(line["step"], line[name]) for line in lines if name in line]
    held_out = [(line["step"], line["validation_bits_per_byte"]) for line in lines if "validation_bits_per_byte" in line]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if train:
        steps, values = zip(*train, strict=True)
        axis.plot(steps, values, color="#9ab6d3", linewidth=0.8)
        axis.plot(steps, _smoothed(values), color="#1f5a94", linewidth=1.8, label=f"training {name} (smoothed)")
    axis.set(xlabel="step", ylabel="nats per token" if name == "loss" else "reward", title=f"{run.name}")
    axis.grid(alpha=0.25)
    if held_out:
        right = axis.twinx()
        right.plot(*zip(*held_out, strict=True), color="#c2571a", marker="o", markersize=4, label="validation")
        right.set_ylabel("validation, bits per byte")
        axis.plot([], [], color="#c2571a", marker="o", markersize=4, label="validation (right axis)")
    axis.legend(frameon=False)
    try:
        figure.savefig(run / CURVE)
    except OSError as error:
        raise CheckpointError(f"cannot write {run / CURVE}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return run / CURVE


def _smoothed(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
