"""What all kernels share: where they run, and how many programs a size needs."""

import torch
import triton
from torch import Tensor

from fathom.ops.dispatch import preferred

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16)


def here(*tensors: Tensor) -> bool:
    """Whether kernels reach these tensors [...]: they are on the current GPU (Triton launches there, wherever the tensors are), or on CPU where
    the interpreter is asked for by name.
    """
    if any(x.is_cuda for x in tensors):
        return all(x.is_cuda and x.device.index == torch.cuda.current_device() for x in tensors)
    return triton.knobs.runtime.interpret and preferred() == NAME


def runs(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors [...]: float32 or bfloat16 ones that they reach."""
    return here(*tensors) and all(x.dtype in DTYPES for x in tensors)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: the shape of a tile that holds a whole row."""
    return triton.next_power_of_2(size)
