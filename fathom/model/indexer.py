"""The lightning indexer: which compressed entries a query reads, and the objective that teaches it (report 2.3.1).

Selection gives the indexer no gradient. It learns by matching the attention that the heads really gave to the
entries (DeepSeek-V3.2's objective), on detached inputs, so that the rest of the model never feels it.
"""

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.cache import Stream
from fathom.model.compressor import Compressor
from fathom.model.layers import Linear
from fathom.model.layout import Layout


class Indexer(nn.Module):
    """Scores every visible entry with a few cheap heads over keys of its own."""

    def __init__(self, config: ModelConfig, ratio: int):
        super().__init__()
        self.ratio, self.topk, self.heads = ratio, config.index_topk, config.index_n_heads
        self.query_up = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.head_weights = Linear(config.hidden_size, config.index_n_heads)
        self.compressor = Compressor(config.hidden_size, config.index_head_dim, ratio, config.rms_norm_eps)

    def forward(self, x_BSW: Tensor, latent_BSR: Tensor, layout: Layout,
                stream: Stream | None, rounding: ops.Rounding = ops.EXACT) -> tuple[Tensor, Tensor, Tensor | ops.Recorded]:
        """Queries [B, S, H, D], head weights [B, S, H] and keys [B, M, D], from which scores are made; a cache in the released formats gives
        keys as they lie there.
        """
        q_BSHD = ops.index_queries(latent_BSR, self.query_up, self.heads, layout.compressed_turn_BSC, rounding)
        return q_BSHD, self.head_weights(x_BSW), self.compressor(x_BSW, layout, stream, rounding.index).kv_BMD

    @torch.no_grad()
    def select(self, scorer: tuple[Tensor, Tensor, Tensor | ops.Recorded], layout: Layout) -> Tensor | None:
        """Slots [B, S, K] of the entries to read, -1 for none; None where every visible entry is read anyway."""
        blocks = layout.blocks[self.ratio]
        if blocks.entries <= self.topk:
            return None
        return ops.index_topk(*scorer, blocks.first_BS, blocks.count_BS, self.topk)

    @staticmethod
    def objective(scorer: tuple[Tensor, Tensor, Tensor], q_BSHD: Tensor, window: ops.Window, entries: ops.Entries,
                  sink_H: Tensor) -> Tensor:
        """KL of the scores' softmax from the attention that the entries got, over the entries that were read."""
        return ops.index_objective(*scorer, q_BSHD, window, entries, sink_H)
