"""The precision that statistics, softmaxes and mixing coefficients are computed in, float32 or wider, and where bfloat16 pays."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` [...] in float32, or unchanged where it is float64 (gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are faster than float32 ones there: any accelerator, or a CPU with instructions for them."""
    capabilities = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
