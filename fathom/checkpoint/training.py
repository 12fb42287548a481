"""The state of a training run: a model folder in the released layout with the optimiser and data position beside it.

`step-000200/` opens with load_model like any other model; its `training/` holds what only a resumed run needs.
Folders appear whole, carry checksums, and resuming from one continues bit for bit.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.released import load_model, write_model
from fathom.checkpoint.shards import read_tensors, write_tensors
from fathom.errors import CheckpointError
from fathom.files import new_folder, remove_folder, sha256
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

MANIFEST = "training/manifest.json"
STATE = "training/optimizer.safetensors"
_RANDOM, _GUARD = "random_state", "guard/"


@dataclass(frozen=True)
class TrainingState:
    """Steps done, the optimiser's tensors by name, torch's random state, and the tensors of the guard against spikes, if there is one."""

    step: int
    optimizer: dict[str, Tensor]
    random_state: Tensor
    guard: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, model: Transformer, tokenizer: Tokenizer, state: TrainingState) -> None:
    """Write one checkpoint, all or nothing; a full disk is a CheckpointError and leaves older checkpoints alone."""
    with new_folder(folder) as partial:
        write_model(model, partial)
        tokenizer.save(partial)
        (partial / "training").mkdir()
        guard = {_GUARD + name: tensor for name, tensor in state.guard.items()}
        write_tensors(state.optimizer | guard | {_RANDOM: state.random_state}, partial / STATE)
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        manifest = {"step": state.step,
                    "sha256": {str(file.relative_to(partial)): sha256(file) for file in files}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[Transformer, TrainingState]:
    """Read a checkpoint back, every file checked against its checksum first."""
    manifest = _manifest(folder)
    for name, digest in manifest["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is damaged or missing; delete {folder} to resume from the "
                                  "checkpoint before it")
    tensors = read_tensors(folder / STATE)
    random_state = tensors.pop(_RANDOM)
    guard = {name.removeprefix(_GUARD): tensors.pop(name) for name in list(tensors) if name.startswith(_GUARD)}
    return load_model(folder), TrainingState(manifest["step"], tensors, random_state, guard)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=step_of)


def step_of(folder: Path) -> int:
    """The steps that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def prune_checkpoints(run: Path, keep: int, every: int = 1) -> None:
    """Delete all but the newest checkpoint and the newest `keep` regular ones, whose step is a multiple of `every`: an interruption
    saves one between them, and must not cost a run what it may roll back to. What kills left unfinished goes too.
    """
    for unfinished in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    checkpoints = list_checkpoints(run)
    regular = [folder for folder in checkpoints if step_of(folder) % every == 0]
    for folder in checkpoints[:-1]:
        if folder not in regular[-keep:]:
            remove_folder(folder)


def find_model(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the newest checkpoint of a run folder."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    checkpoints = list_checkpoints(path) if path.is_dir() else []
    if not checkpoints:
        raise CheckpointError(f"{path} is neither a model folder (config.json + *.safetensors) nor a run with checkpoints")
    return checkpoints[-1]


def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} holds no training state: {error.strerror or error}") from None
    except json.JSONDecodeError:
        raise CheckpointError(f"{folder / MANIFEST} is damaged; delete {folder} to resume from the checkpoint before "
                              "it") from None


def random_state() -> Tensor:
    """Torch's global random state [bytes], for TrainingState."""
    return torch.get_rng_state()
