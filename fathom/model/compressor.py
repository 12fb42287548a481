"""Tokens to compressed entries: one program for whole sequences, packed documents, prefill chunks and decode.

Report 2.3.1 (eq. 9-12, overlapping, CSA) and 2.3.2 (eq. 20-23, HCA). Used for attention entries and indexer keys alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import kind_of_ratio
from fathom.model.cache import Stream
from fathom.model.layers import Linear, RMSNorm
from fathom.model.layout import Layout


class Compressor(nn.Module):
    """Pools each block of `ratio` tokens into one entry of `channels` channels, normalised and rotated to its first token."""

    def __init__(self, width: int, channels: int, ratio: int, norm_eps: float):
        super().__init__()
        outputs = 2 * channels if kind_of_ratio(ratio) == "csa" else channels
        self.ratio = ratio
        self.value = Linear(width, outputs, wide=True)
        self.gate = Linear(width, outputs, wide=True)
        self.position_bias = nn.Parameter(torch.empty(ratio, outputs))
        self.norm = RMSNorm(channels, norm_eps)

    def forward(self, x_BSW: Tensor, layout: Layout, stream: Stream | None, rounded: Callable[[Tensor], Tensor] = ops.EXACT.entries,
                selected_BSK: Tensor | None = None) -> ops.Entries:
        """What the new tokens' queries may read: all entries of the rows so far or, where given, the selected ones.

        New entries are `rounded`; those of `stream` come first, which is brought up to date.
        """
        blocks = layout.blocks[self.ratio]
        new_ND = self._completed(x_BSW, layout, stream, rounded)
        if stream is None:
            empty_BMD = new_ND.new_zeros(x_BSW.shape[0], blocks.entries, new_ND.shape[-1])
            kv_BMD = empty_BMD.index_put((blocks.row_N, blocks.slot_N), new_ND)
        else:
            if new_ND is not None:
                stream.put(blocks.row_N, blocks.slot_N, new_ND)
            kv_BMD, selected_BSK = stream.read(blocks.entries, selected_BSK)
        return ops.Entries(kv_BMD, blocks.first_BS, blocks.count_BS, selected_BSK)

    def _completed(self, x_BSW: Tensor, layout: Layout, stream: Stream | None, rounded: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Entries [N, D] of the blocks that this call's tokens complete; None where none is complete, as after most decoded tokens."""
        blocks = layout.blocks[self.ratio]
        raw_BJC = ops.compressor_inputs(x_BSW, self.value, self.gate, self.position_bias, layout.position_BS)
        if stream is not None:
            raw_BJC = stream.tail.extend(raw_BJC, layout.moves, blocks.rows_R)
            if not len(blocks.row_N) and not torch.is_grad_enabled():
                return None
        value_BJC, score_BJC = raw_BJC.chunk(2, -1)
        pooled_ND = ops.pool_blocks(value_BJC, score_BJC, blocks.current_NR, blocks.previous_NR, blocks.has_previous_N)
        return rounded(ops.rotate(self.norm(pooled_ND.to(x_BSW.dtype)), layout.turn(blocks.position_N, compressed=True)))
