"""One block: streams in, attention, streams out; streams in, experts, streams out (report 2, figure 2)."""

from typing import NamedTuple

from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.model.attention import Attention, Phase
from fathom.model.baselines.dsa import SparseLatentAttention
from fathom.model.baselines.gqa import GroupedQueryAttention
from fathom.model.baselines.mla import LatentAttention
from fathom.model.cache import LayerCache
from fathom.model.hyper_connections import HyperConnection
from fathom.model.layers import RMSNorm
from fathom.model.layout import Layout
from fathom.model.moe import MixtureOfExperts, Routing


ATTENTION = {"v4": Attention, "gqa": GroupedQueryAttention, "mla": LatentAttention, "dsa": SparseLatentAttention}  # by config.attention


class Observation(NamedTuple):
    """What training reads from a block beside its output."""

    index_loss: Tensor | None
    routing: Routing


class Block(nn.Module):
    """Attention and experts, each between normalised streams."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_streams = HyperConnection(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = ATTENTION[config.attention](config, layer)
        self.moe_streams = HyperConnection(config)
        self.moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MixtureOfExperts(config, layer)

    def forward(self, X_BSNW: Tensor, token_BS: Tensor, layout: Layout, cache: LayerCache | None,
                phase: Phase) -> tuple[Tensor, Observation | None]:
        """The streams [B, S, N, W] after the block and, in training (`phase` set), an Observation."""
        x_BSW, post_BSN, res_BSNN = self.attention_streams.open(X_BSNW)
        y_BSW, index_loss = self.attention(self.attention_norm(x_BSW), layout, cache, phase)
        X_BSNW = self.attention_streams.close(X_BSNW, y_BSW, post_BSN, res_BSNN)
        x_BSW, post_BSN, res_BSNN = self.moe_streams.open(X_BSNW)
        y_BSW, routing = self.moe(self.moe_norm(x_BSW), token_BS, layout, observe=phase is not None)
        X_BSNW = self.moe_streams.close(X_BSNW, y_BSW, post_BSN, res_BSNN)
        return X_BSNW, None if routing is None else Observation(index_loss, routing)
