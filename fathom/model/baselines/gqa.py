"""Grouped-query attention as in Llama 3 and Qwen3: every token's keys and values are kept, a few heads of them for all queries.

Queries and keys are RMS-normalised per head (Qwen3), which also keeps Muon from growing them without bound; their trailing channels
are rotated, as V4's. With qk_rope_head_dim = head_dim all of them are.
"""

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.cache import LayerCache
from fathom.model.layers import Linear, RMSNorm
from fathom.model.layout import Layout


class GroupedQueryAttention(nn.Module):
    """One layer's attention to all earlier tokens of the document."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ratio, self.indexer = 1, None  # as in V4's place: every token is an entry, and all are read
        width, channels, self.groups = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.heads, self.scale = config.num_attention_heads, channels**-0.5
        self.query = Linear(width, self.heads * channels)
        self.key = Linear(width, self.groups * channels)
        self.value = Linear(width, self.groups * channels)
        self.query_norm = RMSNorm(channels, config.rms_norm_eps)
        self.key_norm = RMSNorm(channels, config.rms_norm_eps)
        self.output = Linear(self.heads * channels, width)

    def forward(self, x_BSW: Tensor, layout: Layout, cache: LayerCache | None, phase: str | None) -> tuple[Tensor, None]:
        """The sublayer's output [B, S, W]; nothing to teach beside it."""
        turn_BSC = layout.compressed_turn_BSC[:, :, None]
        q_BSHD = ops.rotate(self.query_norm(self.query(x_BSW).unflatten(-1, (self.heads, -1))), turn_BSC)
        key_BSGD = ops.rotate(self.key_norm(self.key(x_BSW).unflatten(-1, (self.groups, -1))), turn_BSC)
        value_BSGD = self.value(x_BSW).unflatten(-1, (self.groups, -1))
        tokens = layout.tokens
        if cache is not None:
            kept_BMC = cache.entries.extend(torch.cat([key_BSGD, value_BSGD], 2).flatten(2), tokens)
            key_BSGD, value_BSGD = (half.unflatten(-1, (self.groups, -1)) for half in kept_BMC.chunk(2, -1))
        out_BSHD = ops.grouped_attention(q_BSHD, key_BSGD, value_BSGD, tokens.first_BS, tokens.count_BS, None, self.scale)
        return self.output(out_BSHD.flatten(2)), None
