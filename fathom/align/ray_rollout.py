"""Rollouts by Ray actors, on this machine or several (report 5.2.3): each has the model's shape and an engine of its own.

A round's groups are dealt out; every actor gets the weights, plays its groups and writes its own log beside the round's. A member's random
numbers come from seed and group, so this process would draw the same tokens, but for those that hang on the last bit. An actor that
dies is started again by Ray and goes on from its log; on several machines the run's folder must be shared for that.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from fathom.align.domains import Domains
from fathom.align.environments.base import Environment
from fathom.align.rollout import Draw, play_here
from fathom.align.rollout_log import RolloutLog
from fathom.align.sample import Rollout
from fathom.checkpoint.layouts import quantised_in, use_rounding
from fathom.cluster import join_cluster
from fathom.config import ModelConfig
from fathom.errors import FathomError, InputError
from fathom.model.attention import Attention
from fathom.model.transformer import Transformer
from fathom.ops.rounding import EXACT, Rounding
from fathom.text.tokenizer import Tokenizer
from fathom.train.qat import LAYOUT

MOST_WORKERS = 256
RESTARTS = 3  # of an actor


class Worker:
    """An actor. Whatever it needs comes with each call or is made anew, so that it may be restarted at any time."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, known: Callable[[], Mapping[str, Environment]], threads: int):
        torch.set_num_threads(threads)
        self.model, self.tokenizer, self.known = Transformer(config).eval(), tokenizer, known()

    def play(self, weights: dict[str, Tensor], rounding: Rounding, rollouts: list[Rollout], draw: Draw, seed: int, log_path: Path | None,
             head: dict[str, Any]) -> tuple[list[Rollout], dict[str, float]]:
        """Play rollouts with these weights; them, and how long it took."""
        began = time.monotonic()
        self.model.load_state_dict(weights)
        use_rounding(self.model, rounding, quantised_in(self.model, LAYOUT))
        taken = time.monotonic() - began
        log = None if log_path is None else RolloutLog(log_path, head)
        environments = {name: self.known[name] for name in {rollout.task.domain for rollout in rollouts}}
        metrics = play_here(self.model, self.tokenizer, rollouts, environments, draw, seed, log)
        if log is not None:
            log.seal()
        return rollouts, metrics | {"sync_seconds": metrics["sync_seconds"] + taken}


class RayPlay:
    """`Play` by `count` actors, on the cluster that RAY_ADDRESS names, else on this machine. `known` makes the environments there."""

    def __init__(self, count: int, known: Callable[[], Mapping[str, Environment]] = Domains):
        if not 1 <= count <= MOST_WORKERS:
            raise InputError(f"workers is {count}; allowed: 1 to {MOST_WORKERS} (without --workers this process samples)")
        self.count, self.known = count, known
        self.share, self.workers = join_cluster(count), []

    def __call__(self, model: Transformer, tokenizer: Tokenizer, rollouts: Sequence[Rollout], environments: Mapping[str, Environment],
                 draw: Draw, seed: int, log: RolloutLog | None) -> dict[str, float]:
        """As `play_here`; sync_seconds is the time until the slowest actor had the weights."""
        if not self.workers:
            actor = ray.remote(Worker).options(num_cpus=self.share, max_restarts=RESTARTS, max_task_retries=RESTARTS)
            self.workers = [actor.remote(model.config, tokenizer, self.known, max(1, int(self.share))) for _ in range(self.count)]
        began = time.monotonic()
        weights = ray.put({name: tensor.detach() for name, tensor in model.state_dict().items()})
        stored = time.monotonic() - began
        rounding = next((module.rounding for module in model.modules() if isinstance(module, Attention)), EXACT)
        parts = [[rollout for rollout in rollouts if rollout.group % self.count == number] for number in range(self.count)]
        played = self._all([worker.play.remote(weights, rounding, part, draw, seed, *_log_of(log, f"{number} of {self.count}"))
                            for number, (worker, part) in enumerate(zip(self.workers, parts, strict=True)) if part])
        for mine, (theirs, _) in zip((part for part in parts if part), played, strict=True):
            for rollout, other in zip(mine, theirs, strict=True):
                vars(rollout).update(vars(other) | {"task": rollout.task, "mode": rollout.mode})
        seconds, sync = time.monotonic() - began, stored + max(metrics["sync_seconds"] for _, metrics in played)
        return {"sync_seconds": sync, "sample_seconds": seconds - sync,
                "sampled_tokens_per_second": sum(rollout.count for rollout in rollouts) / max(seconds - sync, 1e-9)}

    def close(self) -> None:
        """Let the actors go, and leave the cluster."""
        self.workers = []
        ray.shutdown()

    @staticmethod
    def _all(calls: list[Any]) -> list[tuple[list[Rollout], dict[str, float]]]:
        try:
            return ray.get(calls)
        except RayTaskError as error:
            if isinstance(error.cause, FathomError):
                raise error.cause from None
            raise
        except RayError as error:
            raise FathomError(f"a rollout worker was lost {RESTARTS + 1} times ({str(error).splitlines()[0]}); --resume goes on") from error


def _log_of(log: RolloutLog | None, worker: str) -> tuple[Path | None, dict[str, Any]]:
    """Where a worker writes its log, and what its head says: dealt out otherwise, another worker's lines mean nothing."""
    if log is None:
        return None, {}
    return log.path.with_suffix(f".worker-{worker.split()[0]}.log").absolute(), log.head | {"worker": worker}
