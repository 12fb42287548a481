"""What a compressor reads of a few tokens, in one call."""

import torch
from torch import Tensor

from fathom.ops.compress import compressor_inputs
from fathom.ops.linear import Layer
from fathom.ops.native.library import library, plain, projects, ready, used
from fathom.ops.native.linear import most_rows


def _supports(x_BSW: Tensor, value: Layer, gate: Layer, bias_RC: Tensor, position_BS: Tensor) -> bool:
    if (layers := plain(value, gate)) is None:
        return False
    C, W = layers[0].matrix.shape
    return (x_BSW.shape[:-1] == position_BS.shape and x_BSW.shape[-1] == W and layers[1].matrix.shape == (C, W) and bias_RC.shape[1] == C
            and position_BS.dtype is torch.int64 and 0 < position_BS.numel() <= most_rows(layers[0].matrix)
            and projects(x_BSW, *layers, in_float32=True))


@compressor_inputs.register("native", supports=_supports)
def compressor_inputs_native(x_BSW: Tensor, value: Layer, gate: Layer, bias_RC: Tensor, position_BS: Tensor) -> Tensor:
    """`compressor_inputs` for few tokens."""
    values, scores = plain(value, gate)
    (C, W), x, bias, position = values.matrix.shape, x_BSW.contiguous(), ready(bias_RC), position_BS.contiguous()
    out_BSC = torch.empty(*position.shape, 2 * C)
    library().fathom_compressor_inputs(x.data_ptr(), x.dtype is torch.bfloat16, *used(values), *used(scores), bias.data_ptr(), position.data_ptr(),
                                       position.numel(), W, C, len(bias), out_BSC.data_ptr(), torch.get_num_threads())
    return out_BSC
