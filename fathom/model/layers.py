"""Small shared layers: linear, RMS norms, the rotary frequencies with YaRN (report 2.3.3)."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import RopeScaling
from fathom.quant.formats import Packed


class Linear(nn.Module):
    """y = W x without bias, weight [outputs, inputs]; computed in the weight's dtype, or in float32 where `wide`.

    A weight in FP8 or FP4 has a `scale` beside it and is computed with in the dtype of x. `rounding` rounds the inputs; it is set
    from outside, where weights are stored in FP8 or FP4.
    """

    rounding = ops.EXACT

    def __init__(self, inputs: int, outputs: int, wide: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_buffer("scale", None)
        self.wide = wide

    @property
    def matrix(self) -> ops.Matrix:
        """The weight, packed or plain."""
        return self.weight if self.scale is None else Packed(self.weight, self.scale)

    @property
    def plain(self) -> ops.Projection | None:
        """What operators of several layers need to do this one's work; None where a call would do more.

        Read from the module's own dictionaries: decoding asks a hundred times a token, and attributes of modules are slow.
        """
        own = _own(self, Linear)
        if own is None:
            return None
        weight, scale = own["_parameters"]["weight"], own["_buffers"]["scale"]
        return ops.Projection(weight if scale is None else Packed(weight, scale), own.get("rounding", Linear.rounding), own["wide"])

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:
            x = ops.wide(x)
            return ops.linear.exactly(self.rounding.inputs(x), self.matrix)
        if self.scale is None:
            x = x.to(self.weight.dtype)
        return ops.linear(self.rounding.inputs(x), self.matrix)


class RMSNorm(nn.Module):
    """RMS normalisation of the last axis with a learned weight [D]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    @property
    def plain(self) -> ops.Norm | None:
        """As a linear layer's."""
        own = _own(self, RMSNorm)
        return None if own is None else ops.Norm(own["_parameters"]["weight"], own["eps"])

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_normalise(x, self.eps, self.weight)


def _own(module: nn.Module, kind: type) -> dict[str, Any] | None:
    """The module's dictionary, if calling it is its class's forward and nothing else: no hooks, no other forward."""
    own = module.__dict__
    return own if type(module) is kind and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own) else None


@lru_cache
@torch.inference_mode(False)
def rotary_frequencies(channels: int, theta: float, scaling: RopeScaling | None, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position [channels / 2] in float32, kept on the device; with YaRN the slow ones are divided by its factor.

    No attention-magnitude factor, as released.
    """
    if torch.device(device).type != "cpu":
        return rotary_frequencies(channels, theta, scaling).to(device)
    frequency = theta ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    if scaling is None:
        return frequency
    low, high = (channels * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
                 / (2 * math.log(theta)) for turns in (scaling.beta_fast, scaling.beta_slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), channels - 1)
    pair = torch.arange(channels // 2, dtype=torch.float32)
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / scaling.factor * slowed + frequency * (1 - slowed)
