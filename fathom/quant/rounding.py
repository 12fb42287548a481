"""One object that says how a model rounds while it computes; handed to the parts that round, which call it and ask nothing.

`EXACT` leaves numbers as they are. `ReleasedRounding` is the released inference code's (report 2.3.4, 5.2.1), with gradients that
pass straight through, so that the same object serves quantisation-aware training.
"""

import torch
from torch import Tensor

from fathom.quant.formats import ACTIVATION_BLOCK, ENTRY_BLOCK, hadamard, round_fp4, round_fp8


class Rounding:
    """Rounds nothing."""

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs [..., C] of a product with FP8 or FP4 weights."""
        return x

    def entries(self, kv: Tensor) -> Tensor:
        """Keys of the window and compressed entries [..., D], rotated already."""
        return kv

    def index(self, x: Tensor) -> Tensor:
        """The indexer's queries and keys [..., D], rotated already."""
        return x


EXACT = Rounding()


class ReleasedRounding(Rounding):
    """Inputs to FP8 per 128 channels, entries' plain channels to FP8 per 64, index vectors turned (Hadamard) and to MXFP4."""

    def __init__(self, rotary_channels: int):
        self.rotary_channels = rotary_channels

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs [..., C] in FP8."""
        return _StraightThrough.apply(x, round_fp8(x.detach(), ACTIVATION_BLOCK))

    def entries(self, kv: Tensor) -> Tensor:
        """Entries [..., D] with all but the trailing rotary channels in FP8."""
        plain, rotary = kv.detach().split([kv.shape[-1] - self.rotary_channels, self.rotary_channels], -1)
        return _StraightThrough.apply(kv, torch.cat([round_fp8(plain, ENTRY_BLOCK), rotary], -1))

    def index(self, x: Tensor) -> Tensor:
        """Index vectors [..., D] turned and in MXFP4."""
        turned = hadamard(x)
        return _StraightThrough.apply(turned, round_fp4(turned.detach()))


class _StraightThrough(torch.autograd.Function):
    """The rounded value, bit for bit, with the gradient of the unrounded one."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
