"""The precision that statistics, softmaxes and mixing coefficients are computed in, float32 or wider, and that of matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("auto", "bfloat16", "float32")
_products: torch.dtype | None = None  # of the whole process: autograd computes in threads of its own what it was asked for in another


def wide(x: Tensor) -> Tensor:
    """`x` [...] in float32, or unchanged where it is float64 (gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are faster than float32 ones there: any accelerator, or a CPU with instructions for them."""
    capabilities = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def narrow_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What one of PRECISIONS means there: bfloat16, or None for numbers as they are. "auto": bfloat16 where the device multiplies it natively."""
    return torch.bfloat16 if precision == "bfloat16" or precision == "auto" and multiplies_bfloat16(device) else None


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, products round their float32 inputs, and the gradients of their results, to `dtype` (mixed precision; None: nothing is rounded).

    Weights, their gradients, streams, softmaxes, routers, and layers that are float32 as released stay as they are. The backward pass
    belongs inside too, since it computes parts of the forward pass again.
    """
    global _products
    before, _products = _products, dtype
    try:
        yield
    finally:
        _products = before


def products_dtype() -> torch.dtype | None:
    """What a surrounding `products_in` asks for."""
    return _products


def narrowed(value: Any, dtype: torch.dtype) -> Any:
    """A float32 tensor, or those in a named tuple, in `dtype`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.float32 else value
    return type(value)(*(narrowed(part, dtype) for part in value)) if isinstance(value, tuple) else value
