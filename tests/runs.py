"""A run of seconds: a micro model, a page of text, and the command line in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.models import small_config

WORDS = "the sea was calm and the captain walked along the deck while a light wind filled every sail ".split()


def micro_recipe(folder: Path, **schedule) -> Path:
    """Write a corpus, a model config and a recipe into `folder`; returns the recipe. The run is folder/run."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(300)]
        (text / f"page{number}.txt").write_text(" ".join(words), encoding="utf-8")
    config = small_config([4, 0], vocab_size=320, hidden_size=32, sliding_window=16, index_n_heads=2, index_topk=4,
                          hc_mult=2, hc_sinkhorn_iters=5)
    (folder / "model.json").write_text(config.to_json(), encoding="utf-8")
    settings = dict(steps=20, batch_tokens=128, lengths=[64], warmup_steps=4, decay_steps=10, peak_rate=0.01,
                    final_rate=0.001) | schedule
    lines = [f'run = "{folder / "run"}"', 'model = "model.json"', "[data]", 'sources = ["text"]', "held_out = 0.2",
             "piece_bytes = 500", "validation_tokens = 256", "[loop]", "checkpoint_every = 5", "validate_every = 10",
             "[schedule]", *(f"{name} = {value}" for name, value in settings.items())]
    (folder / "recipe.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "recipe.toml"


def fathom(*arguments: str | Path, check: bool = False, stdin: str | None = None, **options) -> subprocess.CompletedProcess:
    """Run the fathom command to its end, one thread, output captured."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=check, env=environment(),
                          input=stdin, **options)


def command(*arguments: str | Path) -> list[str]:
    """The argv of the fathom command."""
    return [sys.executable, "-m", "fathom.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread: many short processes beside each other, and the same sums everywhere."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every recorded training step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
