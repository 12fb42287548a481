"""LoRA: matrices move only by products of two thin ones, W = W0 + (alpha / rank) up down (Hu et al. 2021).

Done by the optimiser rather than inside the model: after every step the model holds the merged weights, so that any checkpoint opens
like any other model. The gradients of `down` and `up` follow from the gradient of W exactly.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathom.errors import CheckpointError, RecipeError
from fathom.optim.muon import AdamW

SKIPPED = ("embed.weight", "head.weight", ".position_bias", ".router.weight")


@dataclass(frozen=True)
class Lora:
    """Settings: the rank of what is added to each matrix, and its scale alpha / rank."""

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise RecipeError(f"lora: rank is {self.rank} and alpha {self.alpha}; allowed: at least 1, above 0")


def lora_names(named_parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The matrices that get an adapter: all but embedding, head, position biases, routers; stacks of experts one for each expert."""
    return [name for name, parameter in named_parameters
            if parameter.ndim >= 2 and not name.endswith(SKIPPED) and "_streams." not in name and "collapse." not in name]


class LoraOptimizer:
    """AdamW over the thin matrices of one model; the face of `Optimizer`. Every other parameter is frozen.

    `base` holds the weights W0 of every adapted parameter by name. NAME.down [.., r, I] starts normal, NAME.up [.., O, r] at zero.
    """

    def __init__(self, model: nn.Module, base: dict[str, Tensor], settings: Lora, adamw: AdamW, seed: int):
        parameters = dict(model.named_parameters())
        names = lora_names(parameters.items())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        self.parameters = {name: parameters[name] for name in names}
        self.base = {name: base[name].detach().to(parameters[name].device, copy=True) for name in names}
        self.scale = settings.alpha / settings.rank
        generator = torch.Generator().manual_seed(seed)
        self.thin: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            *stack, rows, columns = parameter.shape
            rank = min(settings.rank, rows, columns)
            down = torch.randn(*stack, rank, columns, generator=generator) / columns**0.5
            self.thin |= {f"{name}.down": down.to(parameter), f"{name}.up": parameter.new_zeros(*stack, rows, rank)}
        self.adamw = torch.optim.AdamW(self.thin.values(), lr=0.0, eps=adamw.eps, betas=(adamw.beta1, adamw.beta2),
                                       weight_decay=adamw.weight_decay)
        for tensor in self.thin.values():
            self.adamw.state[tensor] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the thin matrices from the gradients of the merged ones, and merge again."""
        for name, parameter in self.parameters.items():
            down, up = self.thin[f"{name}.down"], self.thin[f"{name}.up"]
            if parameter.grad is not None:
                down.grad, up.grad = self.scale * (up.mT @ parameter.grad), self.scale * (parameter.grad @ down.mT)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Give the model W0 + scale up down."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.base[name] + self.scale * (self.thin[f"{name}.up"] @ self.thin[f"{name}.down"]))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.parameters.values(), *self.thin.values()):
            tensor.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The adapter itself and its moments: NAME.down, NAME.up, and of each exp_avg, exp_avg_sq and a scalar step."""
        return self.thin | {f"{name}.{kind}": value for name, tensor in self.thin.items()
                            for kind, value in self.adamw.state[tensor].items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy a saved state in and merge it; CheckpointError where it is of another adapter."""
        own = self.state_tensors()
        wrong = [name for name in own.keys() ^ tensors.keys()] + [
            name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
        if wrong:
            raise CheckpointError(f"optimiser state does not fit this adapter ({sorted(wrong)[0]} and {len(wrong) - 1} more); resume with the "
                                  "settings of the run that saved it")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        self.merge()
