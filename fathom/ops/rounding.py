"""One object that says how a model rounds while it computes; handed to the parts that round, which call it and ask nothing.

`EXACT` leaves numbers as they are. `ReleasedRounding` is the released inference code's (report 2.3.4, 5.2.1), with gradients that
pass straight through, so that the same object serves quantisation-aware training. The three ways it rounds are operators.
"""

import torch
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.quant.formats import ACTIVATION_BLOCK, ENTRY_BLOCK, hadamard, round_fp4, round_fp8


@op
def round_inputs(x: Tensor) -> Tensor:
    """x [..., C] in FP8 with one scale for each 128 channels, in the dtype of x, without gradients."""
    return round_fp8(x, ACTIVATION_BLOCK)


@op
def round_entries(kv: Tensor, rotary_channels: int) -> Tensor:
    """kv [..., D] with all but the trailing rotary channels in FP8, a scale for each 64, in the dtype of kv, without gradients."""
    plain, rotary = kv.split([kv.shape[-1] - rotary_channels, rotary_channels], -1)
    return torch.cat([round_fp8(plain, ENTRY_BLOCK), rotary], -1)


@op
def round_index(x: Tensor) -> Tensor:
    """x [..., D] turned (Hadamard) and in MXFP4, in the dtype of x, without gradients."""
    return round_fp4(hadamard(x))


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
        return _StraightThrough.apply(x, round_inputs(x.detach()))

    def entries(self, kv: Tensor) -> Tensor:
        """Entries [..., D] with all but the trailing rotary channels in FP8."""
        return _StraightThrough.apply(kv, round_entries(kv.detach(), self.rotary_channels))

    def index(self, x: Tensor) -> Tensor:
        """Index vectors [..., D] turned and in MXFP4."""
        return _TurnedStraightThrough.apply(x, round_index(x.detach()))


class _StraightThrough(torch.autograd.Function):
    """The rounded value, bit for bit, with the gradient of the unrounded one."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _TurnedStraightThrough(_StraightThrough):
    """The same for numbers that were turned before; turning is its own inverse and transpose."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return hadamard(grad), None
