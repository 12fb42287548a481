"""Multi-token prediction: one more block that sees the next token and predicts the one after (report 2.1)."""

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.model.attention import Phase
from fathom.model.block import Block, Observation
from fathom.model.cache import LayerCache
from fathom.model.hyper_connections import StreamCollapse
from fathom.model.layers import Linear, RMSNorm
from fathom.model.layout import Layout


class MTPBlock(Block):
    """A block fed with the trunk's streams and the embedding of each position's next token.

    Norm and collapse of the streams are the block's; embedding and head are the model's, unless `own_ends` gave it its own, as the
    released base models have them.
    """

    def __init__(self, config: ModelConfig, depth: int):
        super().__init__(config, config.num_hidden_layers + depth)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_norm = RMSNorm(width, eps)
        self.hidden_norm = RMSNorm(width, eps)
        self.embed_proj = Linear(width, width)
        self.hidden_proj = Linear(width, width)
        self.collapse = StreamCollapse(config)
        self.norm = RMSNorm(width, eps)
        self.embed: nn.Embedding | None = None
        self.head: Linear | None = None

    def own_ends(self, config: ModelConfig) -> None:
        """Give the block an embedding [V, W] and a head [V, W] of its own, unset."""
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size,
                                  _weight=torch.empty(config.vocab_size, config.hidden_size))
        self.head = Linear(config.hidden_size, config.vocab_size, wide=True)

    def predict(self, X_BSNW: Tensor, next_embedding_BSW: Tensor, next_token_BS: Tensor, layout: Layout,
                phase: Phase, cache: LayerCache | None = None) -> tuple[Tensor, Tensor, Observation | None]:
        """The hidden state for the head [B, S, W], the block's own streams [B, S, N, W], and an Observation."""
        X_BSNW = (self.embed_proj(self.embed_norm(next_embedding_BSW))[:, :, None]
                  + self.hidden_proj(self.hidden_norm(X_BSNW)))
        X_BSNW, observation = self.forward(X_BSNW, next_token_BS, layout, cache, phase)
        return self.norm(self.collapse(X_BSNW)), X_BSNW, observation
