"""What one more token costs where a config's V4 attention is replaced by GQA, MLA or DSA: pure functions of the shape.

Only attention is replaced; experts, streams, embedding and head stay, and so does the number of layers. As in fathom.accounting,
FLOPs are two for each multiply-add of one token's forward pass at a context, and bytes are those of one sequence's cache.

Per layer, with width W, H heads of D channels, G key/value heads, query rank R, latent L, rotary channels P, index heads I of C:

    attention  weights                                                    a key costs             cached a token
    GQA        2 W H D + 2 W G D                                          4 H D                   2 G D
    MLA        W R + R + R H (D + P) + W (L + P) + L + 2 H D L + H D W    4 H L + 2 H P           L + P
    DSA        MLA's + R I C + W C + W I                                  MLA's, of 2,048 keys    L + P + C
                                                                          and 2 I C of all

MLA is counted as it decodes: queries go into the latent and values come out of it (H D L each). Its latent is four heads wide, as
DeepSeek-V3's (512 for heads of 128; beside it 64 rotary channels, here the config's).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fathom.accounting import cache_bytes, flops_per_token, parameters
from fathom.config import ModelConfig

MOST_KV_HEADS = 8
LATENT_HEADS = 4  # width of MLA's latent, in heads
DSA_TOPK = 2048


@dataclass(frozen=True)
class Baseline:
    """A model of the same shape with another attention: numbers of all layers together."""

    name: str
    weights: int  # parameters that a token multiplies with
    flops_per_key: int  # of attention, for each key read
    cached_per_token: int  # numbers
    most_keys: int | None = None
    index_flops_per_token: int = 0  # for each token behind

    def flops(self, context: int) -> float:
        """FLOPs of one token's forward pass with `context` tokens behind it."""
        read = context if self.most_keys is None else min(context, self.most_keys)
        return 2.0 * self.weights + self.flops_per_key * read + self.index_flops_per_token * context

    def cache_bytes(self, context: int, element_bytes: int = 4) -> int:
        """Bytes of one sequence's cache after `context` tokens."""
        return self.cached_per_token * context * element_bytes


def gqa(config: ModelConfig) -> Baseline:
    """Grouped queries: as many key/value heads as divide the heads, eight at most."""
    width, heads, channels, layers = _shape(config)
    shared = max(count for count in range(1, MOST_KV_HEADS + 1) if heads % count == 0)
    weights = 2 * width * heads * channels + 2 * width * shared * channels
    return Baseline(f"GQA, {shared} KV heads", _rest(config) + layers * weights, layers * 4 * heads * channels,
                    layers * 2 * shared * channels)


def mla(config: ModelConfig) -> Baseline:
    """Multi-head latent attention, absorbed as it decodes."""
    width, heads, channels, layers = _shape(config)
    rank, rotary, latent = config.q_lora_rank, config.qk_rope_head_dim, LATENT_HEADS * channels
    weights = (width * rank + rank + rank * heads * (channels + rotary) + width * (latent + rotary) + latent
               + 2 * heads * channels * latent + heads * channels * width)
    return Baseline(f"MLA, latent {latent} + {rotary}", _rest(config) + layers * weights,
                    layers * heads * (4 * latent + 2 * rotary), layers * (latent + rotary))


def dsa(config: ModelConfig) -> Baseline:
    """MLA that reads the best keys of a token-by-token indexer (DeepSeek-V3.2)."""
    plain, layers = mla(config), config.num_hidden_layers
    heads, channels = config.index_n_heads, config.index_head_dim
    weights = config.q_lora_rank * heads * channels + config.hidden_size * (channels + heads)
    return Baseline(f"DSA, top {DSA_TOPK:,}", plain.weights + layers * weights, plain.flops_per_key,
                    plain.cached_per_token + layers * channels, DSA_TOPK, layers * 2 * heads * channels)


def curves(config: ModelConfig, contexts: Sequence[int], element_bytes: int = 4) -> dict[str, dict[str, list[float]]]:
    """FLOPs a token and cache bytes at each context, V4's first."""
    found = {"V4": {"flops": [sum(flops_per_token(config, context).values()) for context in contexts],
                    "cache_bytes": [cache_bytes(config, element_bytes).at(context) for context in contexts]}}
    for baseline in (gqa(config), mla(config), dsa(config)):
        found[baseline.name] = {"flops": [baseline.flops(context) for context in contexts],
                                "cache_bytes": [baseline.cache_bytes(context, element_bytes) for context in contexts]}
    return found


def _shape(config: ModelConfig) -> tuple[int, int, int, int]:
    return config.hidden_size, config.num_attention_heads, config.head_dim, config.num_hidden_layers


def _rest(config: ModelConfig) -> int:
    """Parameters a token multiplies with outside attention: those of a window-only model without its window attention."""
    width, heads, channels, layers = _shape(config)
    rank, grouped = config.q_lora_rank, config.o_groups * config.o_lora_rank
    window = (rank * width + rank + heads * channels * rank + channels * width + channels
              + heads * channels // config.o_groups * grouped + grouped * width + heads)
    plain = dataclasses.replace(config, compress_ratios=(0,) * layers)
    return parameters(plain).activated - layers * window
