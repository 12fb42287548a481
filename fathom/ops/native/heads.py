"""Heads of a few tokens: each operator one call of C, with the roundings that it stands for."""

import torch
from torch import Tensor

from fathom.ops.heads import index_queries, join_heads, low_rank_queries, shared_key
from fathom.ops.linear import Layer, Matrix, Projection
from fathom.ops.native.library import kind_of, known, library, places, plain, projects, ready, used
from fathom.ops.native.linear import most_rows
from fathom.ops.rounding import EXACT, Rounding

_GROUP = 16  # rows of a matrix that are read together: a group of heads has whole ones


def _turns(turn_BSC: Tensor, tokens: torch.Size, channels: int) -> bool:
    """Whether there is a turn for each token, of no more than the channels."""
    return (turn_BSC.dtype is torch.complex64 and turn_BSC.is_cpu and not turn_BSC.is_conj() and turn_BSC.shape[:-1] == tokens
            and 2 * turn_BSC.shape[-1] <= channels)


def _fits(x: Tensor, turn_BSC: Tensor, channels: int, first: Projection, *others: Projection) -> bool:
    """Whether x [B, S, I] has few tokens, and matrix and turns are theirs."""
    return (x.dim() == 3 and x.shape[-1] == first.matrix.shape[-1] and 0 < x.shape[0] * x.shape[1] <= most_rows(first.matrix)
            and _turns(turn_BSC, x.shape[:2], channels) and projects(x, first, *others))


def _low_rank(x_BSW: Tensor, down: Layer, norm: Layer, up: Layer, heads: int, turn_BSC: Tensor, eps: float) -> bool:
    if (layers := plain(down, norm, up)) is None:
        return False
    first, (weight_R, own_eps), second = layers
    (outputs, R), D = second.matrix.shape, second.matrix.shape[0] // heads
    return (first.matrix.shape[0] == R == weight_R.numel() and outputs == heads * D and own_eps == eps
            and _fits(x_BSW, turn_BSC, D, first, second))


@low_rank_queries.register("native", supports=_low_rank)
def low_rank_queries_native(x_BSW: Tensor, down: Layer, norm: Layer, up: Layer, heads: int, turn_BSC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`low_rank_queries` for few tokens."""
    first, (weight_R, _), second = plain(down, norm, up)
    (B, S, W), (outputs, R) = x_BSW.shape, second.matrix.shape
    x, turn, weight = x_BSW.contiguous(), turn_BSC.contiguous(), ready(weight_R)
    latent_BSR, q_BSHD = x.new_empty(B, S, R), x.new_empty(B, S, heads, outputs // heads)
    library().fathom_low_rank_queries(
        x.data_ptr(), x.dtype is torch.bfloat16, *used(first), weight.data_ptr(), *used(second), turn.data_ptr(), B * S, W, R, heads,
        outputs // heads, turn.shape[-1], eps, latent_BSR.data_ptr(), q_BSHD.data_ptr(), torch.get_num_threads())
    return latent_BSR, q_BSHD


def _index(latent_BSR: Tensor, up: Layer, heads: int, turn_BSC: Tensor, rounding: Rounding = EXACT) -> bool:
    layers = plain(up)
    return (layers is not None and layers[0].matrix.shape[0] % heads == 0 and known(rounding)
            and _fits(latent_BSR, turn_BSC, layers[0].matrix.shape[0] // heads, *layers))


@index_queries.register("native", supports=_index)
def index_queries_native(latent_BSR: Tensor, up: Layer, heads: int, turn_BSC: Tensor, rounding: Rounding = EXACT) -> Tensor:
    """`index_queries` for few tokens."""
    (only,) = plain(up)
    (B, S, R), D, turn, latent = latent_BSR.shape, only.matrix.shape[0] // heads, turn_BSC.contiguous(), latent_BSR.contiguous()
    q_BSHD = latent.new_empty(B, S, heads, D)
    library().fathom_index_queries(latent.data_ptr(), latent.dtype is torch.bfloat16, *used(only), turn.data_ptr(), B * S, R, heads, D, turn.shape[-1],
                                   rounding is not EXACT, q_BSHD.data_ptr(), torch.get_num_threads())
    return q_BSHD


def _key(x_BSW: Tensor, down: Layer, norm: Layer, turn_BSC: Tensor, rounding: Rounding = EXACT) -> bool:
    if (layers := plain(down, norm)) is None:
        return False
    first, (weight_D, _) = layers
    return (first.matrix.shape[0] == weight_D.numel() and known(rounding)
            and (rounding is EXACT or rounding.rotary_channels == 2 * turn_BSC.shape[-1]) and _fits(x_BSW, turn_BSC, weight_D.numel(), first))


@shared_key.register("native", supports=_key)
def shared_key_native(x_BSW: Tensor, down: Layer, norm: Layer, turn_BSC: Tensor, rounding: Rounding = EXACT) -> Tensor:
    """`shared_key` for few tokens."""
    first, (weight_D, eps) = plain(down, norm)
    (B, S, W), D, x, turn, weight = x_BSW.shape, weight_D.numel(), x_BSW.contiguous(), turn_BSC.contiguous(), ready(weight_D)
    out_BSD = x.new_empty(B, S, D)
    library().fathom_shared_key(x.data_ptr(), x.dtype is torch.bfloat16, *used(first), weight.data_ptr(), turn.data_ptr(), B * S, W, D, turn.shape[-1],
                                eps, rounding is not EXACT, out_BSD.data_ptr(), torch.get_num_threads())
    return out_BSD


def _join(out_BSHD: Tensor, turn_BSC: Tensor, down: Matrix, up: Layer, groups: int) -> bool:
    (B, S, H, D), layers = out_BSHD.shape, plain(up)
    return (layers is not None and 0 < B * S <= most_rows(down) and down.shape[0] % (groups * _GROUP) == 0 and H * D == groups * down.shape[-1]
            and layers[0].matrix.shape[-1] == down.shape[0] and _turns(turn_BSC, out_BSHD.shape[:2], D)
            and projects(out_BSHD, Projection(down), *layers))


@join_heads.register("native", supports=_join)
def join_heads_native(out_BSHD: Tensor, turn_BSC: Tensor, down: Matrix, up: Layer, groups: int) -> Tensor:
    """`join_heads` for few tokens."""
    (last,), (B, S, H, D), heads, turn = plain(up), out_BSHD.shape, out_BSHD.contiguous(), turn_BSC.contiguous()
    W, low = last.matrix.shape
    y_BSW = heads.new_empty(B, S, W)
    library().fathom_join_heads(heads.data_ptr(), heads.dtype is torch.bfloat16, turn.data_ptr(), *places(down), kind_of(down), *used(last), B * S, H, D,
                                turn.shape[-1], groups, low // groups, W, y_BSW.data_ptr(), torch.get_num_threads())
    return y_BSW
