"""One run of one variant with one seed, in a process of its own: train, measure, write `result.json`. Started again, it goes on.

The base recipe as it stands is trained once for all experiments: `training_folder` says where.

    python -m fathom.lab.one_run EXPERIMENT VARIANT SEED FOLDER RECIPE [KEY=VALUE ...]
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from fathom import recipe as recipes
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model, list_checkpoints
from fathom.config import PRESETS, ModelConfig
from fathom.data.store import TokenStore
from fathom.errors import FathomError
from fathom.evals.perplexity import held_out_batches, token_byte_lengths
from fathom.files import write_text
from fathom.lab.experiment import Experiment, Trained, Variant
from fathom.lab.experiments import EXPERIMENTS
from fathom.text.tokenizer import Tokenizer
from fathom.train.pretrain import Pretrain, pretrain
from fathom.train.tracking import read_metrics

RESULT = "result.json"
LAST = 0.2  # of the steps, that training's own numbers are taken from


def training_folder(variant: Variant, seed: int, folder: Path) -> Path:
    """Where the run FOLDER/EXPERIMENT/VARIANT-SEED trains: in itself, or in FOLDER/base/SEED with all others that change nothing."""
    return folder.parent.parent / "base" / str(seed) if variant.changes_nothing else folder


def one_run(experiment: Experiment, variant: Variant, seed: int, folder: Path, base: Path, overrides: list[str]) -> dict:
    """Train, or finish training, and measure; the numbers, which are also in the folder."""
    began = time.monotonic()
    torch.set_num_threads(1)
    training = training_folder(variant, seed, folder)
    for each in (folder, training):
        each.mkdir(parents=True, exist_ok=True)
    plan = recipes.load(Pretrain, base, overrides)
    config = ModelConfig.preset(plan.model) if plan.model in PRESETS else ModelConfig.load(base.parent / plan.model)
    write_text(training / "model.json", ModelConfig.from_dict(config.to_dict() | variant.model).to_json())
    run = training / "run"
    changes = [*overrides, *variant.set, f"seed={seed}", f"run={run}", f"model={(training / 'model.json').resolve()}"]
    plan = recipes.load(Pretrain, base, changes)
    with variant.swap():
        pretrain(plan, base.parent, bool(list_checkpoints(run)), Console())
        numbers = _training(run, plan) | experiment.measure(_trained(run, plan))
    result = {"experiment": experiment.name, "variant": variant.name, "seed": seed, "overrides": overrides, "numbers": numbers,
              "curve": _curve(run), "seconds": round(time.monotonic() - began, 1), "torch": torch.__version__}
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _trained(run: Path, plan: Pretrain) -> Trained:
    model, tokenizer = load_model(find_model(run)), Tokenizer.load(run / "tokenizer")
    held_out = held_out_batches(TokenStore.open(run / "data" / "held_out"), plan.schedule.lengths[-1], tokenizer.pad_id,
                                plan.data.validation_tokens)
    return Trained(model, tokenizer, held_out, token_byte_lengths(tokenizer, model.config.vocab_size), plan, run)


def _training(run: Path, plan: Pretrain) -> dict[str, float]:
    """What every run has: held-out bits per byte at its end, and the last steps' losses."""
    steps = [line for line in read_metrics(run) if "loss" in line]
    last = [line for line in steps if line["step"] > (1 - LAST) * plan.schedule.steps]
    found = {"bits": _curve(run)[-1][1], "largest_gradient": max(line["gradient_norm"] for line in steps)}
    for name in ("loss", "mtp_loss", "indexer_loss", "fullest_expert", "tokens_per_second"):
        if all(name in line for line in last):
            found[name] = statistics.fmean(line[name] for line in last)
    return found


def _curve(run: Path) -> list[list[float]]:
    return [[line["step"], line["validation_bits_per_byte"]] for line in read_metrics(run) if "validation_bits_per_byte" in line]


def main(arguments: list[str]) -> None:
    """The process."""
    name, variant_name, seed, folder, base, *overrides = arguments
    experiment = EXPERIMENTS[name]
    variant = next(each for each in experiment.variants if each.name == variant_name)
    try:
        one_run(experiment, variant, int(seed), Path(folder), Path(base), overrides)
    except FathomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
