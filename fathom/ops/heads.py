"""What attention's heads are made of, and how they are joined again (report 2.3.1 - 2.3.3).

Layers come as they are, so that whatever hangs on them is called.
"""

from torch import Tensor

from fathom.ops.dispatch import composed
from fathom.ops.linear import Layer, Matrix, grouped_linear
from fathom.ops.norm import rms_normalise
from fathom.ops.rotary import rotate
from fathom.ops.rounding import EXACT, Rounding


@composed
def low_rank_queries(x_BSW: Tensor, down: Layer, norm: Layer, up: Layer, heads: int, turn_BSC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The queries' latent [B, S, R], and queries [B, S, H, D], each normalised and turned to its position."""
    latent_BSR = norm(down(x_BSW))
    q_BSHD = rms_normalise(up(latent_BSR).unflatten(-1, (heads, -1)), eps)
    return latent_BSR, rotate(q_BSHD, turn_BSC[:, :, None])


@composed
def index_queries(latent_BSR: Tensor, up: Layer, heads: int, turn_BSC: Tensor, rounding: Rounding = EXACT) -> Tensor:
    """The indexer's queries [B, S, H, D] of the latent: turned to their positions and rounded (eq. 13-14)."""
    return rounding.index(rotate(up(latent_BSR).unflatten(-1, (heads, -1)), turn_BSC[:, :, None]))


@composed
def shared_key(x_BSW: Tensor, down: Layer, norm: Layer, turn_BSC: Tensor, rounding: Rounding = EXACT) -> Tensor:
    """The one key of all heads, which is their value too, [B, S, D]: normalised, turned to its position and rounded."""
    return rounding.entries(rotate(norm(down(x_BSW)), turn_BSC))


@composed
def join_heads(out_BSHD: Tensor, turn_BSC: Tensor, down: Matrix, up: Layer, groups: int) -> Tensor:
    """The heads' outputs turned back by their positions, each group of them to its own low rank, all to the width [B, S, W] (2.3.3)."""
    turned_BSHD = rotate(out_BSHD, turn_BSC[:, :, None], inverse=True)
    return up(grouped_linear(turned_BSHD.flatten(2).unflatten(-1, (groups, -1)), down))
