"""Loss spikes: seen, rolled back, and passed with anticipatory routing (report 4.2.3).

The report gives the idea and its cost; detector, distances and durations are this file's, and fields of the recipe. All state is the
step's, the weights' and this guard's own, which checkpoints keep: a resumed run rolls back as the unbroken one would have.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.training import list_checkpoints, load_checkpoint, step_of
from fathom.errors import RecipeError
from fathom.files import remove_folder
from fathom.model.moe import Router
from fathom.model.transformer import Transformer
from fathom.optim.muon import Optimizer
from fathom.train.parallel import take_weights
from fathom.train.ranks import ALONE, Ranks

GAUSSIAN = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


@dataclass(frozen=True)
class Stability:
    """When a loss is a spike, and what follows.

    A step is a spike when its loss is not below median + max(`deviations` x 1.4826 x MAD, `least_rise` nats) of the `window` losses
    before it (MAD: median absolute deviation), or its gradient norm above `norm_factor` x their median norm (0: not looked at). Until
    the window is full nothing is; it starts anew when the sequence length or the attention changes. A spike takes the run back to
    the newest regular checkpoint at least `back_steps` before it; the next `anticipate_steps` steps, counted from the spike, route
    by the weights of `lag` steps ago, and no spike among them rolls back again.
    """

    enabled: bool = True
    window: int = 50
    deviations: float = 8.0
    least_rise: float = 0.5
    norm_factor: float = 0.0
    back_steps: int = 10
    anticipate_steps: int = 50
    lag: int = 4

    def __post_init__(self):
        for name, least in (("window", 4), ("deviations", 0), ("least_rise", 0), ("norm_factor", 0), ("back_steps", 0),
                            ("anticipate_steps", 0), ("lag", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: at least {least}")


class Guard:
    """Watches the losses of a run and steers it around spikes."""

    def __init__(self, settings: Stability):
        self.settings = settings
        self._kind: tuple[int, int] = (0, 0)
        self._history: list[tuple[float, float]] = []  # loss and gradient norm of the last steps
        self._quiet_until = self._anticipate_until = 0
        self._foreseen: dict[int, list[Tensor]] = {}  # by step: the experts [B, S, K] of each learned router

    # ---- the detector

    def sees_spike(self, step: int, loss: float, norm: float, kind: tuple[int, int]) -> bool:
        """Judge a step by those before it; `kind` is what must stay alike for losses to be compared. False too while a spike is being
        passed: then the losses are what they are, and the next ones are judged by them.
        """
        if kind != self._kind:
            self._kind, self._history = kind, []
        spike = step >= self._quiet_until and self._stands_out(loss, norm)
        if not spike:
            self._history = [*self._history, (loss, norm)][-self.settings.window:]
        return spike

    def _stands_out(self, loss: float, norm: float) -> bool:
        settings = self.settings
        if not settings.enabled or len(self._history) < settings.window:
            return False
        losses, norms = zip(*self._history, strict=True)
        middle = statistics.median(losses)
        spread = GAUSSIAN * statistics.median(abs(value - middle) for value in losses)
        return (loss >= middle + max(settings.deviations * spread, settings.least_rise)
                or settings.norm_factor > 0 and norm > settings.norm_factor * statistics.median(norms))

    # ---- rolling back

    def roll_back(self, run: Path, step: int, every: int, model: Transformer, optimizer: Optimizer, ranks: Ranks = ALONE) -> int | None:
        """Set model, optimiser, random state and this guard back before the spike at `step`; the step to continue with, or None where
        no checkpoint is old enough. Newer checkpoints are deleted: they lie on the abandoned branch. All ranks call it.
        """
        checkpoints = list_checkpoints(run)
        old = [folder for folder in checkpoints if step_of(folder) <= step - self.settings.back_steps and step_of(folder) % every == 0]
        if old:
            loaded, state = load_checkpoint(old[-1])
            take_weights(model, loaded, ranks)
            optimizer.load_state_tensors(state.optimizer)
            torch.set_rng_state(state.random_state)
            self.load_state_tensors(state.guard)
            newer = checkpoints[checkpoints.index(old[-1]) + 1:]
            ranks.lead(lambda: [remove_folder(folder) for folder in newer])
        self._anticipate_until = step + self.settings.anticipate_steps if self.settings.anticipate_steps else 0
        self._quiet_until = step + max(1, self.settings.anticipate_steps, self.settings.back_steps)
        self._foreseen.clear()
        return state.step if old else None

    # ---- anticipatory routing

    def anticipates(self, step: int) -> bool:
        """Whether the step's experts are chosen by earlier weights."""
        return step < self._anticipate_until

    @contextmanager
    def routing(self, model: Transformer, step: int, forward: Callable[[int], object]) -> Iterator[None]:
        """Inside, learned routers take the experts that the weights of `lag` steps ago chose for this step (fewer at the start),
        with the current affinities as weights. `forward` computes a later step's forward pass; one of them is done each step.
        """
        if not self.anticipates(step):
            self._foreseen.clear()
            yield
            return
        for ahead in range(step, min(step + self.settings.lag, self._anticipate_until - 1) + 1):
            if ahead not in self._foreseen:
                self._foreseen[ahead] = chosen_experts(model, lambda ahead=ahead: forward(ahead))
        routers = learned_routers(model)
        for router, expert_BSK in zip(routers, self._foreseen.pop(step), strict=False):
            router.foreseen = expert_BSK
        try:
            yield
        finally:
            for router in routers:
                router.foreseen = None

    # ---- what a checkpoint keeps

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state, for a checkpoint."""
        tensors = {"history": torch.tensor(self._history, dtype=torch.float64).reshape(-1, 2),
                   "steps": torch.tensor([*self._kind, self._quiet_until, self._anticipate_until])}
        for step, experts in self._foreseen.items():
            tensors |= {f"foreseen.{step}.{index}": expert_BSK.short() for index, expert_BSK in enumerate(experts)}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Set the state back to what `state_tensors` gave; nothing means a fresh start."""
        if not tensors:
            return
        self._history = [tuple(row) for row in tensors["history"].tolist()]
        length, attention, self._quiet_until, self._anticipate_until = tensors["steps"].tolist()
        self._kind, self._foreseen = (length, attention), {}
        names = sorted((name.split(".") for name in tensors if name.startswith("foreseen.")), key=lambda name: int(name[2]))
        for _, step, index in names:
            self._foreseen.setdefault(int(step), []).append(tensors[f"foreseen.{step}.{index}"].long())


def learned_routers(model: Transformer) -> list[Router]:
    """The routers that choose by affinity, in the order of the forward pass."""
    return [block.moe.router for block in [*model.blocks, *model.mtp] if not block.moe.router.by_hash]


def chosen_experts(model: Transformer, forward: Callable[[], object]) -> list[Tensor]:
    """The experts [B, S, K] that each learned router chooses in a forward pass with the weights as they are."""
    chosen: list[Tensor] = []
    handles = [router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
               for router in learned_routers(model)]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return chosen
