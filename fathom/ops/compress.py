"""Pooling tokens into compressed entries, overlapping (CSA, eq. 9-12) or not (HCA, eq. 20-23).

Works on flat lists of complete blocks, so that whole sequences, packed documents, ragged chunks and single
decoded tokens are the same call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import composed, op
from fathom.ops.linear import Layer
from fathom.ops.precision import wide


@composed
def compressor_inputs(x_BSW: Tensor, value: Layer, gate: Layer, bias_RC: Tensor, position_BS: Tensor) -> Tensor:
    """What pooling reads of each token [B, S, 2 C] in float32: its value, and its score with the bias of its place in the block of R."""
    score_BSC = gate(x_BSW) + F.embedding(position_BS % len(bias_RC), wide(bias_RC))
    return torch.cat([value(x_BSW), score_BSC], -1)


@op
def pool_blocks(value_BJC: Tensor, score_BJC: Tensor, current_NR: Tensor, previous_NR: Tensor | None,
                has_previous_N: Tensor | None) -> Tensor:
    """Softmax-pool each block's R tokens, channel by channel -> [N, D] in float32.

    `current_NR` (and `previous_NR`) are flat indices into the first two axes [B * J]. Without overlap C = D.
    With overlap C = 2 D and one softmax runs over 2 R tokens: the previous block's first halves, where there is
    a previous block, and the current block's second halves.
    """
    value_IC, score_IC = wide(value_BJC).flatten(0, 1), wide(score_BJC).flatten(0, 1)
    if previous_NR is None:
        value_NRD, score_NRD = _rows(value_IC, current_NR), _rows(score_IC, current_NR)
    else:
        D = value_IC.shape[1] // 2
        previous_score_NRD = _rows(score_IC[:, :D], previous_NR)
        previous_score_NRD = previous_score_NRD.masked_fill(~has_previous_N[:, None, None], float("-inf"))
        value_NRD = torch.cat([_rows(value_IC[:, :D], previous_NR), _rows(value_IC[:, D:], current_NR)], 1)
        score_NRD = torch.cat([previous_score_NRD, _rows(score_IC[:, D:], current_NR)], 1)
    return (score_NRD.softmax(1) * value_NRD).sum(1)


def _rows(x_IC: Tensor, index_NR: Tensor) -> Tensor:
    return x_IC.index_select(0, index_NR.flatten()).unflatten(0, index_NR.shape)
