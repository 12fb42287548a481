"""What a compressor reads of tokens, of a few in one call, and the pooling of any number."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.compress import compressor_inputs, pool_blocks
from fathom.ops.linear import Layer, Matrix
from fathom.ops.native.library import library, plain, projects, ready, runs, threads, trains, used
from fathom.ops.native.linear import most_rows
from fathom.ops.native.tiles import suits_tiles, tiled_product
from fathom.ops.rounding import EXACT


def _supports(x_BSW: Tensor, value: Layer, gate: Layer, bias_RC: Tensor, position_BS: Tensor) -> bool:
    if (layers := plain(value, gate)) is None:
        return False
    matrix, other = (layer.matrix for layer in layers)
    if not (matrix.shape == other.shape and x_BSW.shape == (*position_BS.shape, matrix.shape[1]) and bias_RC.shape[1] == len(matrix)
            and position_BS.dtype is torch.int64):
        return False
    if _few(position_BS, matrix):
        return projects(x_BSW, *layers, in_float32=True)
    return (all(each.in_float32 and each.rounding is EXACT and isinstance(each.matrix, Tensor) for each in layers) and runs(x_BSW, matrix, other, bias_RC)
            and matrix.dtype is other.dtype and suits_tiles(x_BSW, matrix))


def _few(position_BS: Tensor, matrix: Matrix) -> bool:
    return 0 < position_BS.numel() <= most_rows(matrix)


@compressor_inputs.register("native", supports=_supports)
def compressor_inputs_native(x_BSW: Tensor, value: Layer, gate: Layer, bias_RC: Tensor, position_BS: Tensor) -> Tensor:
    """`compressor_inputs`; products of bfloat16 are summed, and kept, in float32."""
    values, scores = plain(value, gate)
    (C, W), x, bias, position = values.matrix.shape, x_BSW.contiguous(), ready(bias_RC), position_BS.contiguous()
    out_BSC = torch.empty(*position.shape, 2 * C)
    if not _few(position_BS, values.matrix):
        for projection, out_NC in zip((values, scores), out_BSC.view(-1, 2 * C).chunk(2, 1), strict=True):
            tiled_product(x, projection.matrix, out_NO=out_NC)
        out_BSC[..., C:] += F.embedding(position % len(bias), bias)
        return out_BSC
    library().fathom_compressor_inputs(x.data_ptr(), x.dtype is torch.bfloat16, *used(values), *used(scores), bias.data_ptr(), position.data_ptr(),
                                       position.numel(), W, C, len(bias), out_BSC.data_ptr(), torch.get_num_threads())
    return out_BSC


def _pools(value_BJC: Tensor, score_BJC: Tensor, current_NR: Tensor, previous_NR: Tensor | None, has_previous_N: Tensor | None) -> bool:
    return (current_NR.numel() > 0 and value_BJC.dtype is score_BJC.dtype is torch.float32 and value_BJC.shape == score_BJC.shape
            and (runs(value_BJC, score_BJC) or trains(value_BJC, score_BJC)))


@pool_blocks.register("native", supports=_pools)
def pool_blocks_native(value_BJC: Tensor, score_BJC: Tensor, current_NR: Tensor, previous_NR: Tensor | None, has_previous_N: Tensor | None) -> Tensor:
    """`pool_blocks` in one pass, of values and scores where they lie, if they lie alike; no token is twice in a list."""
    pool = _Pool.apply if torch.is_grad_enabled() else partial(_pooled, None)
    return pool(value_BJC, score_BJC, current_NR, previous_NR, has_previous_N)


def _lying_alike(value_BJC: Tensor, score_BJC: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are or copied, so that one step leads from token to token, and from row to row."""
    B, J, C = value_BJC.shape
    step = value_BJC.stride(1)
    if all(x.stride(2) == 1 and x.stride(1) == step and (B == 1 or x.stride(0) == J * step) for x in (value_BJC, score_BJC)):
        return value_BJC, score_BJC
    return value_BJC.contiguous(), score_BJC.contiguous()


def _pooled(ctx, value_BJC: Tensor, score_BJC: Tensor, *lists: Tensor | None) -> Tensor:
    value, score = _lying_alike(value_BJC, score_BJC)
    lists = [None if x is None else x.contiguous() for x in lists]
    (N, R), D = lists[0].shape, value.shape[2] if lists[1] is None else value.shape[2] // 2
    out_ND = torch.empty(N, D)
    library().fathom_pool_blocks(value.data_ptr(), score.data_ptr(), value.stride(1), *(None if x is None else x.data_ptr() for x in lists), N, R, D,
                                 out_ND.data_ptr(), threads(2 * N * R * D))
    if ctx is not None:
        ctx.save_for_backward(value, score, *lists)
    return out_ND


class _Pool(torch.autograd.Function):
    forward = staticmethod(_pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        value, score, *lists = ctx.saved_tensors
        (B, J, C), (N, D), step, grad = value.shape, grad_ND.shape, value.stride(1), grad_ND.contiguous()
        value_grad, score_grad = (torch.zeros(B * J * step).as_strided((B, J, C), (J * step, step, 1)) for _ in range(2))
        library().fathom_pool_backward(
            value.data_ptr(), score.data_ptr(), grad.data_ptr(), step, *(None if x is None else x.data_ptr() for x in lists), N, lists[0].shape[1], D,
            value_grad.data_ptr(), score_grad.data_ptr(), threads(4 * lists[0].numel() * D))
        return value_grad, score_grad, None, None, None
