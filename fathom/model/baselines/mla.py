"""Multi-head latent attention as in DeepSeek-V2 and -V3: a token leaves one latent for the keys and values of all heads, and a rotary key.

The same numbers come out in two ways. Expanded: keys and values of every head are made from the latents, cheap per pair of query and key.
Absorbed: queries go into the latent and values come out of it, so that all heads share one key; nothing is made for earlier tokens.
Equations 1 - 11 of the DeepSeek-V3 report; no attention-magnitude factor, as in V4.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.cache import LayerCache
from fathom.model.layers import Linear, RMSNorm
from fathom.model.layout import Layout


class Heads(NamedTuple):
    """Queries [B, S, H, D], keys [B, M, G, D] and values [B, M, G, C] of one of the two forms."""

    q: Tensor
    key: Tensor
    value: Tensor


class LatentAttention(nn.Module):
    """One layer's attention to all earlier tokens of the document."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ratio, self.indexer = 1, None  # as in V4's place: every token is an entry, and all are read
        width, channels, rotary, latent = config.hidden_size, config.head_dim, config.qk_rope_head_dim, config.latent_channels
        self.heads, self.channels, self.latent, self.rotary = config.num_attention_heads, channels, latent, rotary
        self.scale = (channels + rotary) ** -0.5
        self.query_down = Linear(width, config.q_lora_rank)
        self.query_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.query_up = Linear(config.q_lora_rank, self.heads * (channels + rotary))
        self.latent_down = Linear(width, latent + rotary)
        self.latent_norm = RMSNorm(latent, config.rms_norm_eps)
        self.key_up = Linear(latent, self.heads * channels)
        self.value_up = Linear(latent, self.heads * channels)
        self.output = Linear(self.heads * channels, width)

    def forward(self, x_BSW: Tensor, layout: Layout, cache: LayerCache | None, phase: str | None) -> tuple[Tensor, None]:
        """The sublayer's output [B, S, W]; nothing to teach beside it."""
        latent_BSR, kept_BMC = self.latents(x_BSW, layout, cache)
        tokens, expand = layout.tokens, self.expands(x_BSW.shape[1])
        heads = self.form(latent_BSR, kept_BMC, layout, expand)
        out_BSHC = ops.grouped_attention(*heads, tokens.first_BS, tokens.count_BS, None, self.scale)
        return self.leave(out_BSHC, expand), None

    def latents(self, x_BSW: Tensor, layout: Layout, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """The query latents [B, S, R] of the new tokens, and latents and rotary keys [B, M, L + P] of all so far."""
        latent_BSL, rotary_BSP = self.latent_down(x_BSW).split([self.latent, self.rotary], -1)
        kept_BSC = ops.rotate(torch.cat([self.latent_norm(latent_BSL), rotary_BSP], -1), layout.compressed_turn_BSC)
        kept_BMC = kept_BSC if cache is None else cache.entries.extend(kept_BSC, layout.tokens)
        return self.query_norm(self.query_down(x_BSW)), kept_BMC

    def expands(self, queries: int) -> bool:
        """Whether expanding costs less for so many queries a key: L (D + D) once for 2 L - 2 D saved with each."""
        return queries * (self.latent - self.channels) > self.latent * self.channels

    def form(self, latent_BSR: Tensor, kept_BMC: Tensor, layout: Layout, expand: bool) -> Heads:
        """Queries, keys and values, expanded or absorbed."""
        q_BSHD = ops.rotate(self.query_up(latent_BSR).unflatten(-1, (self.heads, -1)), layout.compressed_turn_BSC[:, :, None])
        latent_BML, rotary_BMP = kept_BMC.split([self.latent, self.rotary], -1)
        if not expand:
            plain_BSHD, turned_BSHP = q_BSHD.split([self.channels, self.rotary], -1)
            into_BSHL = torch.einsum("bshd,hdl->bshl", plain_BSHD, self._per_head(self.key_up, q_BSHD.dtype))
            return Heads(torch.cat([into_BSHL, turned_BSHP], -1), kept_BMC[:, :, None], latent_BML[:, :, None])
        key_BMHD, value_BMHD = (up(latent_BML).unflatten(-1, (self.heads, -1)) for up in (self.key_up, self.value_up))
        shared_BMHP = rotary_BMP[:, :, None].expand(-1, -1, self.heads, -1)
        return Heads(q_BSHD, torch.cat([key_BMHD, shared_BMHP], -1), value_BMHD)

    def leave(self, out_BSHC: Tensor, expand: bool) -> Tensor:
        """From what attention gave, heads' values or latents, to the width [B, S, W]."""
        if not expand:
            out_BSHC = torch.einsum("bshl,hdl->bshd", out_BSHC, self._per_head(self.value_up, out_BSHC.dtype))
        return self.output(out_BSHC.flatten(2))

    def _per_head(self, up: Linear, dtype: torch.dtype) -> Tensor:
        return ops.dense(up.matrix, dtype).unflatten(0, (self.heads, -1))
