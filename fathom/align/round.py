"""A round of on-policy training: rollouts by the weights of its start, made into batches that its updates learn from.

The policy that sampled is looked at once more with the training program, in the very rows that are trained on: its log-probabilities,
the experts it took and the tokens its sampling kept. Rounds are stored, since an update later in the round has other weights.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.align.losses import Kept, token_log_probabilities
from fathom.align.rollout import Draw
from fathom.align.rollout_log import RolloutLog
from fathom.align.routing import recorded_routing
from fathom.align.sample import SampleBatch
from fathom.checkpoint.shards import read_tensors, write_tensors
from fathom.checkpoint.training import list_checkpoints
from fathom.engine.sampler import Sampling, filtered
from fathom.errors import CheckpointError
from fathom.files import new_folder, sha256
from fathom.model.transformer import Transformer

ROUNDS = "rounds"
_BATCH = ("tokens_BS", "targets_BS", "positions_BS", "sample_N")


def weights_fingerprint(model: Transformer) -> str:
    """A hash of all weights and biases: the same for the same model, bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def observe_policy(model: Transformer, batch: SampleBatch, draw: Draw, known: int) -> dict[str, Tensor]:
    """What a batch must remember of the policy that sampled it: old_logs_N, routing [L, B, S, K], and the kept tokens if any were left out.

    `known`: ids below it could be sampled.
    """
    with recorded_routing(model) as chosen:
        hidden_NW = hidden_of_targets(model, batch)
    target_N, head_VW = batch.targets_BS[batch.learned_BS], model.head.weight[:known]
    numbers, kept = {}, None
    if chosen:
        numbers["routing"] = torch.stack(chosen).to(torch.int16)
    if draw.filters:
        kept = _kept_tokens(hidden_NW, head_VW, target_N, draw)
        numbers |= {"kept_ids": kept.ids, "kept_count_N": kept.count_N}
    numbers["old_logs_N"] = token_log_probabilities(hidden_NW, head_VW, target_N, draw.temperature, kept)[0]
    return numbers


def hidden_of_targets(model: Transformer, batch: SampleBatch) -> Tensor:
    """The head's inputs [N, W] at the positions that predict targets."""
    return model.features(batch.tokens_BS, batch.positions_BS, [], None).hidden_BSW[batch.learned_BS]


def kept_in(batch: SampleBatch) -> Kept | None:
    """The tokens that sampling kept, if it left any out."""
    return Kept(batch.numbers["kept_ids"], batch.numbers["kept_count_N"]) if "kept_ids" in batch.numbers else None


def _kept_tokens(hidden_NW: Tensor, head_VW: Tensor, target_N: Tensor, draw: Draw) -> Kept:
    """As the sampler chose from, and always the token that was drawn: near the border, rounding may differ."""
    sampling, ids = Sampling(draw.temperature, draw.top_p, top_k=draw.top_k), []
    for hidden_W, target in zip(hidden_NW, target_N, strict=True):
        mask_V = filtered((head_VW @ hidden_W / draw.temperature).softmax(-1), sampling) > 0
        mask_V[target] = True
        ids.append(mask_V.nonzero()[:, 0].int())
    return Kept(torch.cat(ids), torch.tensor([len(each) for each in ids], device=target_N.device))


def log_path(run: Path, number: int) -> Path:
    """The write-ahead log of a round."""
    return run / ROUNDS / f"round-{number:06d}.log"


def save_round(run: Path, number: int, head: dict[str, Any], batches: Sequence[SampleBatch]) -> None:
    """Store a round's batches, whole or not at all; CheckpointError where that fails."""
    with new_folder(_folder(run, number)) as folder:
        tensors = {f"{part}.{name}": getattr(batch, name) for part, batch in enumerate(batches) for name in _BATCH}
        tensors |= {f"{part}.numbers.{name}": tensor for part, batch in enumerate(batches) for name, tensor in batch.numbers.items()}
        write_tensors(tensors, folder / "batches.safetensors")
        manifest = {"head": head, "metrics": [batch.metrics for batch in batches], "sha256": sha256(folder / "batches.safetensors")}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def find_round(run: Path, number: int, head: dict[str, Any] | None) -> list[dict[str, float]] | None:
    """The metrics of a stored round's batches, its files checked; None where there is none, or one with another `head`. None as
    `head` takes any. CheckpointError for one that is damaged.
    """
    folder = _folder(run, number)
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if sha256(folder / "batches.safetensors") != manifest["sha256"]:
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}); delete it, and the checkpoints made after its first update") from None
    return manifest["metrics"] if head in (None, manifest["head"]) else None


def load_batch(run: Path, number: int, part: int, metrics: dict[str, float]) -> SampleBatch:
    """One batch of a stored round; the others stay on disk."""
    tensors = read_tensors(_folder(run, number) / "batches.safetensors", f"{part}.")
    numbers = {name.removeprefix("numbers."): tensor for name, tensor in tensors.items() if name.startswith("numbers.")}
    return SampleBatch(*(tensors[name] for name in _BATCH), numbers, metrics)


def prune_rounds(run: Path, updates: int) -> None:
    """Delete the rounds that no checkpoint needs any more; `updates` is the number of steps a round has."""
    checkpoints = list_checkpoints(run)
    if checkpoints:
        oldest = int(checkpoints[0].name.removeprefix("step-")) // updates
        for path in (run / ROUNDS).glob("round-*"):
            if int(path.name[6:12]) < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _folder(run: Path, number: int) -> Path:
    return run / ROUNDS / f"round-{number:06d}"


class Rounds:
    """The batches of all updates, round by round. A round is made once and stored; after a stop it is found again, or its log is.

    `make` plays round number n with the model as it is, writing to the log, and returns one batch for each update.
    """

    def __init__(self, run: Path, model: Transformer, updates: int, head: dict[str, Any],
                 make: Callable[[int, RolloutLog], list[SampleBatch]]):
        self.run, self.model, self.updates, self.head, self.make = run, model, updates, head, make
        self._number, self._metrics = -1, []

    def batch(self, step: int) -> SampleBatch:
        """The batch of an update, counted over all rounds."""
        number, part = divmod(step, self.updates)
        if number != self._number:
            self._metrics, self._number = self._round(number, part), number
        return load_batch(self.run, number, part, self._metrics[part])

    def _round(self, number: int, part: int) -> list[dict[str, float]]:
        """The metrics of a round's batches, which are on disk then."""
        head = self.head | {"round": number, "weights": weights_fingerprint(self.model)} if part == 0 else None
        found = find_round(self.run, number, head)
        if found is not None:
            return found
        if head is None:
            raise CheckpointError(f"{_folder(self.run, number)} is missing; delete the checkpoints made after its first update to resume")
        prune_rounds(self.run, self.updates)
        log = RolloutLog(log_path(self.run, number), head)
        batches = self.make(number, log)
        log.seal()
        save_round(self.run, number, head, batches)
        return [batch.metrics for batch in batches]
