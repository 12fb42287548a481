"""What the inside of a model does while it trains: streams, routers, gradients, updates, by layer, every few steps.

Looks from outside, by hooks, and changes nothing; on the other steps it costs nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fathom.model.block import Block, Observation
from fathom.model.transformer import Transformer
from fathom.optim.muon import parameter_groups

SAMPLED = 4096  # numbers of a parameter from which the size of its update is taken


class Watch:
    """Figures of the steps that are a multiple of `every` (0: none). Lists are by layer, the MTP blocks last."""

    def __init__(self, model: Transformer, every: int):
        self.model, self.every = model, every
        self._matrices = parameter_groups(model.named_parameters(), model.config)[0] if every else {}
        self._found: dict[str, list[Any]] = {}
        self._before: dict[str, Tensor] = {}

    def due(self, done: int) -> bool:
        """Whether the step that makes `done` steps is looked at."""
        return self.every > 0 and done % self.every == 0

    @contextmanager
    def forward(self, done: int) -> Iterator[None]:
        """Around a step's forward pass, not its backward pass, where blocks may be computed anew: the streams' RMS, largest value and
        gain, and the routers' entropy (1: uniform).
        """
        self._found = {"stream_rms": [], "stream_max": [], "stream_gain": [], "router_entropy": []}
        blocks = [*self.model.blocks, *self.model.mtp] if self.due(done) else []
        handles = [block.moe.router.register_forward_hook(self._look_at_router) for block in blocks]
        for block in blocks:
            block.forward = self._seen(block.forward)  # an MTP block calls it itself, past all hooks
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in blocks:
                del block.forward

    def before_update(self, done: int) -> None:
        """Between the backward pass and clipping: the gradients' norms, and some numbers of every weight matrix."""
        if self.due(done):
            self._found["gradient_norm"] = [_gradient_norm(block) for block in [*self.model.blocks, *self.model.mtp]]
            self._before = {name: parameter.detach().flatten()[:SAMPLED].clone()
                            for name, parameter in self.model.named_parameters() if name in self._matrices}

    def figures(self, done: int, observations: list[Observation], rate: float) -> dict[str, Any] | None:
        """What a step showed, after its update; None where it was not looked at. `update_rms`: root mean square of the weight
        matrices' change over the rate, from up to 4,096 numbers of each (Muon's is about 0.18).
        """
        if not self.due(done):
            return None
        named = dict(self.model.named_parameters())
        moved = [(parameter.detach().flatten()[:SAMPLED] - self._before[name]).float() / rate
                 for name, parameter in named.items() if parameter.grad is not None and name in self._matrices]
        self._before = {}
        squares = sum(float(change.square().sum()) for change in moved)
        count = sum(len(change) for change in moved)
        loads = [seen.routing.load_E.float() for seen in observations]
        layers = len(self.model.blocks)
        return {"update_rms": math.sqrt(squares / max(count, 1)),
                "residual_amplification": math.prod(self._found["stream_gain"][:layers]),
                "layers": {name: [_short(value) for value in values] for name, values in self._found.items()}
                | {"expert_load": [[_short(load) for load in (load_E / load_E.mean().clamp(min=1e-9)).tolist()] for load_E in loads]}}

    def _seen(self, forward: Callable[..., tuple]) -> Callable[..., tuple]:
        """A block's forward pass that also looks at the streams before and after it."""
        def watched(X_BSNW: Tensor, *others: Any, **named: Any) -> tuple:
            output = forward(X_BSNW, *others, **named)
            before, after = X_BSNW.detach().float(), output[0].detach().float()
            rms = float(after.square().mean().sqrt())
            self._found["stream_rms"].append(rms)
            self._found["stream_max"].append(float(after.abs().max()))
            self._found["stream_gain"].append(rms / max(float(before.square().mean().sqrt()), 1e-30))
            return output
        return watched

    def _look_at_router(self, router: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        share_BSE = output[0].detach().float()
        share_BSE = share_BSE / share_BSE.sum(-1, keepdim=True)
        entropy = -(share_BSE * share_BSE.clamp(min=1e-30).log()).sum(-1).mean()
        self._found["router_entropy"].append(float(entropy) / math.log(max(share_BSE.shape[-1], 2)))


def _gradient_norm(block: Block) -> float:
    return math.sqrt(sum(float(parameter.grad.float().square().sum()) for parameter in block.parameters() if parameter.grad is not None))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
