"""What a run leaves to look at: metrics as JSON lines, live progress, the loss curve as a picture."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fathom.errors import CheckpointError, RecipeError
from fathom.files import write_text

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

METRICS, EVENTS, TENSORBOARD = "metrics.jsonl", "events.jsonl", "tensorboard"
CURVE = "loss.png"
_QUIET_SECONDS = 10  # between lines where the output is no terminal


@dataclass(frozen=True)
class Tracking:
    """What a run records beside its losses: the insides of the layers every `layers_every` steps (0: never), at checkpoints how the model
    continues `prompts` (`sample_tokens` tokens, greedily), and everything once more for TensorBoard.
    """

    layers_every: int = 10
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 32
    tensorboard: bool = False

    def __post_init__(self):
        if self.layers_every < 0 or self.sample_tokens < 1:
            raise RecipeError(f"layers_every is {self.layers_every} and sample_tokens {self.sample_tokens}; allowed: at least 0, and 1")
        if not all(self.prompts):
            raise RecipeError("prompts has an empty text; give each at least one character")


class Tracker:
    """Records every step of a run in `metrics.jsonl` and shows where it is; lines after `start` (a resume) are dropped."""

    def __init__(self, run: Path, steps: int, start: int, console: Console, tensorboard: bool = False):
        self.run, self.steps, self.console = run, steps, console
        self.started = self.printed = time.monotonic()
        self.start = start
        self.file: TextIO | None = None
        if tensorboard and SummaryWriter is None:
            raise RecipeError("tracking.tensorboard needs one more package; run: pip install 'fathom[tensorboard]'")
        self.tensorboard, self.board = tensorboard, None
        self._rewind(start)
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
        if self.board:
            self.board.close()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one step's metrics and move the bar; `step` counts the steps done."""
        self._append({"step": step} | metrics)
        reward = f"reward {metrics['reward']:.3f}  " if "reward" in metrics else ""
        share = f"  MFU {metrics['mfu']:.0%}" if "mfu" in metrics else ""
        state = f"{reward}loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s{share}"
        self.progress.update(self.task, completed=step, state=state)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed > _QUIET_SECONDS or step == self.steps):
            self.printed = now
            left = (now - self.started) / max(step - self.start, 1) * (self.steps - step)
            self.console.print(f"step {step}/{self.steps}  {state}  {left:.0f} s left", soft_wrap=True)

    def record_validation(self, step: int, bits_per_byte: float, seconds: float) -> None:
        """Append a validation result and print it."""
        self._append({"step": step, "validation_bits_per_byte": bits_per_byte, "validation_seconds": seconds})
        self.console.print(f"step {step}: validation {bits_per_byte:.3f} bits per byte", soft_wrap=True)

    def record_checkpoint(self, step: int, seconds: float) -> None:
        """Append how long the run waited for a checkpoint."""
        self._append({"step": step, "checkpoint_seconds": seconds})

    def record_samples(self, step: int, samples: list[dict[str, str]], seconds: float) -> None:
        """Append texts that the model wrote, and how long it took."""
        self._append({"step": step, "samples": samples, "samples_seconds": seconds})

    def record_spike(self, step: int, target: int | None) -> None:
        """Note a spike at `step` in `events.jsonl`, with the losses that are abandoned, and rewind the metrics to step `target`, if any."""
        lines = read_metrics(self.run)
        abandoned = [[line["step"], line["loss"]] for line in lines if "loss" in line and line["step"] > (step - 1 if target is None else target)]
        event = {"event": "spike", "step": step, "back_to": target, "losses": abandoned}
        events = read_lines(self.run / EVENTS)
        if event not in events:  # a resumed run meets the same spike again
            write_text(self.run / EVENTS, "".join(json.dumps(line) + "\n" for line in [*events, event]))
        self.say(f"step {step}: a loss spike, {abandoned[-1][1]:.3f}; " + (
            "no checkpoint is old enough to go back to" if target is None else f"back to step {target}"))
        if target is not None:
            self._rewind(target)
            self.progress.update(self.task, completed=target)

    def summarise(self) -> None:
        """Print what data and checkpoints cost beside the steps themselves."""
        shares = overheads(read_metrics(self.run))
        if shares:
            self.say(", ".join(f"{name} {share:.2%}" for name, share in shares.items()) + " of the steps' time")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)

    def _rewind(self, step: int) -> None:
        """Keep the metrics up to `step`, and write on from there."""
        if self.file is not None:
            self.file.close()
        kept = [line for line in read_metrics(self.run) if line["step"] <= step] if step else []
        write_text(self.run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.run / METRICS, "a", encoding="utf-8")
        if self.board is not None:
            self.board.close()
        if self.tensorboard:
            self.board = SummaryWriter(str(self.run / TENSORBOARD), purge_step=step + 1)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.run / METRICS}: {error.strerror or error}") from error
        if self.board:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, line["step"])
            for sample in line.get("samples", []):
                self.board.add_text(sample["prompt"], sample["text"], line["step"])


def overheads(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of data loading, checkpoints, validation and samples over those of the steps; nothing where no step is recorded."""
    whole = sum(line.get("seconds", 0.0) for line in lines)
    sums = {name: sum(line.get(f"{key}_seconds", 0.0) for line in lines) for name, key in (
        ("data loading", "data"), ("checkpoints", "checkpoint"), ("validation", "validation"), ("samples", "samples"))}
    return {name: value / whole for name, value in sums.items()} if whole else {}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; the last one may have been cut off by a kill."""
    return read_lines(run / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, none where there is no file."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
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
        axis.plot(steps, smoothed(values), color="#1f5a94", linewidth=1.8, label=f"training {name} (smoothed)")
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


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
