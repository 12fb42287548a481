"""What one more token costs where a config's V4 attention is replaced by GQA, MLA or DSA, by fathom.accounting.

Only attention is replaced; experts, streams, embedding and head stay, and so does the number of layers. GQA gets as many key/value heads
as divide the heads, eight at most; MLA a latent four heads wide; DSA reads 2,048 tokens, as DeepSeek-V3.2.
"""

import dataclasses
from collections.abc import Sequence

from fathom.accounting import cache_bytes, flops_per_token
from fathom.config import ModelConfig

MOST_KV_HEADS = 8
DSA_TOPK = 2048


def rivals(config: ModelConfig) -> dict[str, ModelConfig]:
    """The same shape with each attention, by a name for tables; V4's own first."""
    shared = max(count for count in range(1, MOST_KV_HEADS + 1) if config.num_attention_heads % count == 0)
    latent = dataclasses.replace(config, attention="mla")
    return {"V4": config,
            f"GQA, {shared} KV heads": dataclasses.replace(config, attention="gqa", num_key_value_heads=shared),
            f"MLA, latent {latent.latent_channels} + {config.qk_rope_head_dim}": latent,
            f"DSA, top {DSA_TOPK:,}": dataclasses.replace(config, attention="dsa", index_topk=DSA_TOPK)}


def curves(config: ModelConfig, contexts: Sequence[int], element_bytes: int = 4) -> dict[str, dict[str, list[float]]]:
    """FLOPs a token and cache bytes at each context, V4's first."""
    return {name: {"flops": [sum(flops_per_token(rival, context).values()) for context in contexts],
                   "cache_bytes": [cache_bytes(rival, element_bytes).at(context) for context in contexts]}
            for name, rival in rivals(config).items()}
