"""Muon for weight matrices, AdamW for the rest, and which parameter goes where (report 2.4, 4.2.2).

torch.optim.Muon cannot agree with the report to rounding: it takes one coefficient triple for all its steps where the
report needs two, iterates in bfloat16 only, and takes 2-D parameters whole, so neither experts nor heads on their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.errors import CheckpointError, RecipeError
from fathom.ops.orthogonalize import orthogonalize
from fathom.ops.precision import PRECISIONS, narrow_dtype

Matrices = Literal["muon", "adamw"]  # which of the two moves the weight matrices
FUSED = ("cpu", "cuda")  # devices on which torch has AdamW in one pass
TOGETHER = 1 << 22  # numbers in the matrices that are orthogonalised in one call


@dataclass(frozen=True)
class Muon:
    """Settings of Muon; `update_rms` is the root mean square of an update at rate 1, as AdamW's would be.

    `precision` of the Newton-Schulz steps: bfloat16, float32, or "auto", bfloat16 where the device multiplies it natively.
    """

    momentum: float = 0.95
    weight_decay: float = 0.1
    update_rms: float = 0.18
    precision: str = "auto"

    def __post_init__(self):
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "from 0 to below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.update_rms > 0, "update_rms", self.update_rms, "above 0")
        _require(self.precision in PRECISIONS, "precision", self.precision, ", ".join(PRECISIONS))

    def dtype(self, parameter: Tensor) -> torch.dtype | None:
        """What the Newton-Schulz steps of a parameter [...] run in; None: float32 or wider."""
        return None if parameter.dtype == torch.float64 else narrow_dtype(self.precision, parameter.device)


@dataclass(frozen=True)
class AdamW:
    """Settings of AdamW."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1

    def __post_init__(self):
        _require(0 <= self.beta1 < 1, "beta1", self.beta1, "from 0 to below 1")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "from 0 to below 1")
        _require(self.eps > 0, "eps", self.eps, "above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]],
                     config: ModelConfig) -> tuple[dict[str, int], list[str]]:
    """Muon's parameters by name, each with its number of independent matrices along dim 0, and AdamW's names.

    AdamW takes the embedding, the head, the position biases and every vector: norms, sinks, streams' base and scale.
    """
    matrices: dict[str, int] = {}
    others: list[str] = []
    for name, parameter in named_parameters:
        if parameter.ndim < 2 or name.endswith(("embed.weight", "head.weight")) or name.endswith(".position_bias"):
            others.append(name)
        else:
            matrices[name] = parameter.shape[0] if parameter.ndim == 3 else _blocks(name, parameter.shape[0], config)
    return matrices, others


class MuonOptimizer(torch.optim.Optimizer):
    """Muon over groups of parameters; a group's `blocks` is the number of independent matrices along dim 0.

    Per matrix [n, m] with gradient G (report Algorithm 1):
    M <- mu M + G; O = NS(mu M + G) sqrt(max(n, m)) update_rms; W <- W (1 - lr weight_decay) - lr O.
    """

    def __init__(self, groups: list[dict], settings: Muon):
        super().__init__(groups, {"lr": 0.0, "blocks": 1})
        self.settings = settings
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; matrices of one shape are orthogonalised in one call."""
        by_shape: dict[tuple, list[tuple[Tensor, int, float]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = parameter.numel() // (group["blocks"] * parameter.shape[-1]), parameter.shape[-1]
                    key = shape, parameter.dtype, parameter.device
                    by_shape.setdefault(key, []).append((parameter, group["blocks"], group["lr"]))
        for members in by_shape.values():
            first = 0
            while first < len(members):  # together as many as make a good batch, which bounds what lives beside the parameters
                last = first + 1
                while last < len(members) and sum(member[0].numel() for member in members[first:last + 1]) <= TOGETHER:
                    last += 1
                self._update(members[first:last])
                first = last

    def _update(self, members: list[tuple[Tensor, int, float]]) -> None:
        """Update parameters, each with its number of matrices of one common shape and its learning rate."""
        mu, matrices = self.settings.momentum, []
        for parameter, blocks, _ in members:
            momentum = self.state[parameter]["momentum"].mul_(mu).add_(parameter.grad)
            matrices.append(parameter.grad.add(momentum, alpha=mu).reshape(blocks, -1, parameter.shape[-1]))
        matrices_BNM = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        updates_BNM = orthogonalize(matrices_BNM, dtype=self.settings.dtype(matrices_BNM))
        updates_BNM *= self.settings.update_rms * max(matrices_BNM.shape[1:]) ** 0.5
        updates = updates_BNM.split([blocks for _, blocks, _ in members])
        for (parameter, _, rate), update_BNM in zip(members, updates, strict=True):
            parameter.mul_(1 - rate * self.settings.weight_decay)
            parameter.add_(update_BNM.reshape(parameter.shape), alpha=-rate)


class Optimizer:
    """Muon and AdamW over one model; with `matrices` "adamw", AdamW over all of it, to compare with. Its state is flat and named, and
    continuing from it is bit-identical.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: ModelConfig, muon: Muon,
                 adamw: AdamW, matrices: Matrices = "muon"):
        self.parameters = dict(named_parameters)
        by_muon, others = parameter_groups(self.parameters.items(), config)
        if matrices == "adamw":
            by_muon, others = {}, list(self.parameters)
        self.muon = MuonOptimizer([{"params": [self.parameters[name]], "blocks": blocks}
                                   for name, blocks in by_muon.items()] or [{"params": []}], muon)
        fused = all(self.parameters[name].device.type in FUSED for name in others)
        self.adamw = torch.optim.AdamW([{"params": [self.parameters[name] for name in others]}], lr=0.0, eps=adamw.eps,
                                       betas=(adamw.beta1, adamw.beta2), weight_decay=adamw.weight_decay, fused=fused)
        for name in others:  # as AdamW itself would at its first step, so that every state has the same names
            parameter = self.parameters[name]
            self.adamw.state[parameter] = {"step": torch.zeros((), device=parameter.device if fused else None), "exp_avg": torch.zeros_like(parameter),
                                           "exp_avg_sq": torch.zeros_like(parameter)}

    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient, at this learning rate."""
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The state itself, not a copy: NAME.momentum, or NAME.exp_avg, NAME.exp_avg_sq and a scalar NAME.step."""
        return {f"{name}.{kind}": tensor for name, parameter in self.parameters.items()
                for kind, tensor in (self.muon.state.get(parameter) or self.adamw.state[parameter]).items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy a saved state in; CheckpointError names what is missing, unexpected or of another shape."""
        own = Optimizer.state_tensors(self)  # a subclass may gather from elsewhere
        wrong = [f"{name} is missing" for name in own if name not in tensors]
        wrong += [f"{name} is unexpected" for name in tensors if name not in own]
        wrong += [f"{name} has shape {list(tensors[name].shape)} instead of {list(tensor.shape)}"
                  for name, tensor in own.items() if name in tensors and tensors[name].shape != tensor.shape]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise CheckpointError(f"optimiser state does not fit this model: {', '.join(wrong[:3])}{more}; "
                                  "resume with the model config of the run that saved it")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _blocks(name: str, rows: int, config: ModelConfig) -> int:
    """Independent matrices along dim 0 of a 2-D weight: heads, output groups, the two halves of overlapping blocks."""
    if name.endswith((".attention.query_up.weight", ".attention.query.weight", ".attention.key_up.weight", ".attention.value_up.weight")):
        return config.num_attention_heads
    if name.endswith((".attention.key.weight", ".attention.value.weight")):
        return config.num_key_value_heads
    if name.endswith(".attention.output_down.weight"):
        return config.o_groups
    if name.endswith(".indexer.query_up.weight"):
        return config.index_n_heads
    if ".compressor." in name:
        return rows // (config.index_head_dim if ".indexer." in name else config.head_dim)
    return 1


def _require(holds: bool, name: str, value: float | str, allowed: str) -> None:
    if not holds:
        raise RecipeError(f"{name} is {value}; allowed: {allowed}")
