"""Interleaved rotary turns of the last channels, and back (report 2.3.3)."""

import torch
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.ops.precision import wide


@op
def rotate(x: Tensor, turn: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the trailing channels of x [..., D], pairs of neighbours as complex numbers, by `turn` [..., C], C <= D / 2; in float32.

    `turn` holds complex numbers of length 1 and has the leading axes of x up to broadcasting; `inverse` turns back.
    """
    C = turn.shape[-1]
    plain, pairs = x[..., : x.shape[-1] - 2 * C], wide(x[..., x.shape[-1] - 2 * C:]).unflatten(-1, (C, 2))
    turned = torch.view_as_complex(pairs) * (turn.conj() if inverse else turn)
    return torch.cat([plain, torch.view_as_real(turned).flatten(-2).to(x.dtype)], -1)
