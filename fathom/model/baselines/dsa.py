"""DeepSeek sparse attention as in V3.2: latent attention over the tokens that a lightning indexer chooses one by one.

The indexer's keys are one vector a token, normalised with LayerNorm; it learns as V4's does, whose objective is V3.2's.
"""

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.baselines.mla import LatentAttention
from fathom.model.cache import LayerCache
from fathom.model.layers import Linear
from fathom.model.layout import Layout


class TokenIndexer(nn.Module):
    """Scores every earlier token with a few cheap heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.topk = config.index_n_heads, config.index_topk
        self.query_up = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.key = Linear(config.hidden_size, config.index_head_dim)
        self.key_norm = nn.LayerNorm(config.index_head_dim, eps=config.rms_norm_eps)
        self.head_weights = Linear(config.hidden_size, config.index_n_heads)

    def forward(self, x_BSW: Tensor, latent_BSR: Tensor, layout: Layout, cache: LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, D], head weights [B, S, H] and keys [B, M, D], from which scores are made."""
        turn_BSC = layout.compressed_turn_BSC
        q_BSHD = ops.rotate(self.query_up(latent_BSR).unflatten(-1, (self.heads, -1)), turn_BSC[:, :, None])
        key_BSD = ops.rotate(self.key_norm(self.key(x_BSW)), turn_BSC)
        return q_BSHD, self.head_weights(x_BSW), key_BSD if cache is None else cache.keys.extend(key_BSD, layout.tokens)

    @torch.no_grad()
    def select(self, scorer: tuple[Tensor, Tensor, Tensor], layout: Layout) -> Tensor | None:
        """Slots [B, S, K] of the tokens to read, -1 for none; None where every earlier token is read anyway."""
        tokens = layout.tokens
        return None if tokens.kept <= self.topk else ops.index_topk(*scorer, tokens.first_BS, tokens.count_BS, self.topk)


class SparseLatentAttention(LatentAttention):
    """One layer's attention to the chosen earlier tokens of the document."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.indexer = TokenIndexer(config)

    def forward(self, x_BSW: Tensor, layout: Layout, cache: LayerCache | None, phase: str | None) -> tuple[Tensor, Tensor | None]:
        """The sublayer's output [B, S, W] and, in training, the indexer's loss; all tokens are read in the phase "dense"."""
        latent_BSR, kept_BMC = self.latents(x_BSW, layout, cache)
        tokens = layout.tokens
        scorer = self.indexer(x_BSW.detach(), latent_BSR.detach(), layout, cache)
        selected_BSK = None if phase == "dense" else self.indexer.select(scorer, layout)
        expand = self.expands(x_BSW.shape[1])
        heads = self.form(latent_BSR, kept_BMC, layout, expand)
        out_BSHC = ops.grouped_attention(*heads, tokens.first_BS, tokens.count_BS, selected_BSK, self.scale)
        index_loss = None
        if phase is not None:
            with torch.no_grad():
                mass_BSM = ops.key_mass(heads.q, heads.key, tokens.first_BS, tokens.count_BS, selected_BSK, self.scale)
            read_BSM = ops.attended_entries(ops.Entries(kept_BMC, tokens.first_BS, tokens.count_BS, selected_BSK))
            index_loss = ops.index_divergence(ops.index_scores(*scorer), mass_BSM, read_BSM)
        return self.leave(out_BSHC, expand), index_loss
