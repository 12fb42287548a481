"""V4 attention: window and compressed entries in one softmax, inverse rotation, grouped output (report 2.3.1 - 2.3.3)."""

from typing import Literal

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.cache import LayerCache
from fathom.model.compressor import Compressor
from fathom.model.indexer import Indexer
from fathom.model.layers import Linear, RMSNorm
from fathom.model.layout import Layout

# What a training forward reads and teaches: all visible entries and no indexer ("dense", the first stage), all visible entries,
# from which the indexer learns ("warmup"), or the indexer's selection, from which it goes on learning ("sparse"). None:
# inference, the selection and nothing extra.
Phase = Literal["dense", "warmup", "sparse"] | None


class Attention(nn.Module):
    """One layer's attention, of the kind that its compression ratio names: window only, CSA or HCA."""

    rounding = ops.EXACT  # of keys, entries and index vectors

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        width, heads, channels = config.hidden_size, config.num_attention_heads, config.head_dim
        self.heads, self.groups, self.ratio, self.eps = heads, config.o_groups, config.ratio(layer), config.rms_norm_eps
        self.query_down = Linear(width, config.q_lora_rank)
        self.query_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.query_up = Linear(config.q_lora_rank, heads * channels)
        self.key_value = Linear(width, channels)
        self.key_value_norm = RMSNorm(channels, self.eps)
        self.output_down = Linear(heads * channels // self.groups, self.groups * config.o_lora_rank)
        self.output_up = Linear(self.groups * config.o_lora_rank, width)
        self.sink = nn.Parameter(torch.empty(heads))
        self.compressor = self.indexer = None
        if self.ratio:
            self.compressor = Compressor(width, channels, self.ratio, self.eps)
        if config.kind(layer) == "csa":
            self.indexer = Indexer(config, self.ratio)

    def forward(self, x_BSW: Tensor, layout: Layout, cache: LayerCache | None,
                phase: Phase) -> tuple[Tensor, Tensor | None]:
        """The sublayer's output [B, S, W] and, in training of a layer with an indexer, the indexer's loss."""
        turn_BSC = layout.compressed_turn_BSC if self.ratio else layout.window_turn_BSC
        latent_BSR, q_BSHD = ops.low_rank_queries(x_BSW, self.query_down, self.query_norm, self.query_up, self.heads, turn_BSC, self.eps)
        kv_BTD = ops.shared_key(x_BSW, self.key_value, self.key_value_norm, turn_BSC, self.rounding)
        if cache is not None:
            kv_BTD = cache.window.extend(kv_BTD, layout.moves, slots=layout.window_slots)
        window = ops.Window(kv_BTD, layout.key_place_BT, layout.place_BS, layout.reach_BS)

        entries = index_loss = scorer = selected_BSK = None
        if self.indexer is not None and phase != "dense":
            scorer = self.indexer(x_BSW.detach(), latent_BSR.detach(), layout, cache and cache.keys, self.rounding)
            if phase != "warmup":
                selected_BSK = self.indexer.select(scorer, layout)
        if self.compressor is not None:
            entries = self.compressor(x_BSW, layout, cache and cache.entries, self.rounding.entries, selected_BSK)
        if scorer is not None and phase is not None:
            index_loss = self.indexer.objective(scorer, q_BSHD, window, entries, self.sink)

        out_BSHD = ops.attention(q_BSHD, window, entries, self.sink)
        return ops.join_heads(out_BSHD, turn_BSC, self.output_down.matrix, self.output_up, self.groups), index_loss
