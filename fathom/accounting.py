"""Parameters, FLOPs and cache bytes as pure functions of a config and a context length.

Counts follow the report: totals leave the MTP block out; activated parameters are the ones a token multiplies with,
so the embedding table is not among them; FLOPs are two for each multiply-add of one token's forward pass.
"""

from dataclasses import dataclass

from fathom.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: `total` and `activated` of the model proper, `mtp` of its MTP blocks, `embedding` of the table."""

    total: int
    activated: int
    embedding: int
    mtp: int


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache: what every further token adds, and the fixed window and compressor tails."""

    per_token: float
    fixed: int

    def at(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        return round(self.per_token * tokens) + self.fixed


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of every tensor in the released layout (report-wise: MTP apart)."""
    layers = [_layer(config, layer) for layer in range(config.num_hidden_layers)]
    table = config.vocab_size * config.hidden_size
    ends = table + config.hidden_size + _collapse(config)  # head, final norm, collapse
    width = config.hidden_size
    mtp = sum(_layer(config, config.num_hidden_layers + depth)[0] + 2 * width * width + 3 * width + _collapse(config)
              for depth in range(config.num_nextn_predict_layers))
    return Parameters(total=table + ends + sum(total for total, _ in layers),
                      activated=ends + sum(activated for _, activated in layers), embedding=table, mtp=mtp)


def flops_per_token(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of one token's forward pass at position `context`, by part: weights, attention, indexer.

    MLA and DSA as they decode: queries go into the latent and values come out of it, so that a key costs 2 (L + P) + 2 L a head.
    """
    core = index = 0.0
    for layer in range(config.num_hidden_layers):
        read, scored, per_key = min(context, config.sliding_window), 0, 4 * config.head_dim
        if config.kind(layer) == "csa":
            scored = context // config.ratio(layer)
            read += min(scored, config.index_topk)
        elif config.kind(layer) == "hca":
            read += context // config.ratio(layer)
        elif config.kind(layer) != "window":
            read = context
        if config.kind(layer) in ("mla", "dsa"):
            per_key = 4 * config.latent_channels + 2 * config.qk_rope_head_dim
        if config.kind(layer) == "dsa":
            read, scored = min(context, config.index_topk), context
        core += per_key * read * config.num_attention_heads
        index += 2 * scored * config.index_n_heads * config.index_head_dim
    return {"weights": 2.0 * parameters(config).activated, "attention": core, "indexer": index}


def cache_bytes(config: ModelConfig, element_bytes: int = 4) -> CacheBytes:
    """Bytes of one sequence's cache as Fathom allocates it; compressor tails are float32 whatever the elements."""
    growth, fixed = 0.0, 0
    if config.attention != "v4":
        channels = baseline_channels(config) + (config.index_head_dim if config.attention == "dsa" else 0)
        return CacheBytes(config.num_hidden_layers * channels * element_bytes, 0)
    for layer in range(config.num_hidden_layers):
        fixed += config.sliding_window * config.head_dim * element_bytes
        kind, ratio = config.kind(layer), config.ratio(layer)
        if kind == "window":
            continue
        channels = config.head_dim + (config.index_head_dim if kind == "csa" else 0)
        halves = 2 if kind == "csa" else 1
        growth += channels * element_bytes / ratio
        fixed += halves * ratio * 2 * halves * channels * 4
    return CacheBytes(growth, fixed)


def baseline_channels(config: ModelConfig) -> int:
    """Numbers that a baseline keeps of a token in a layer, index keys apart: keys and values of GQA, latent and rotary key of MLA."""
    if config.attention == "gqa":
        return 2 * config.num_key_value_heads * config.head_dim
    return config.latent_channels + config.qk_rope_head_dim


def released_cache_bytes(config: ModelConfig) -> CacheBytes:
    """The same in the released formats: FP8 entries with BF16 rotary channels and scales, MXFP4 indexer keys.

    Per entry: one byte a plain channel, one scale byte per 64 of them padded to eight, two bytes a rotary channel (584 for 512
    channels); per key half a byte a channel and one scale byte per 32 (68 for 128). The tails are left out, as in the report.
    Baselines in the formats of their releases: GQA and MLA in BF16; DSA as DeepSeek-V3.2, latent and keys in FP8 with a float32 scale
    per 128 channels and rotary keys in BF16 (656 + 132).
    """
    if config.attention != "v4":
        token = 2 * baseline_channels(config)
        if config.attention == "dsa":
            token = sum(channels + -(-channels // 128) * 4 for channels in (config.latent_channels, config.index_head_dim))
            token += 2 * config.qk_rope_head_dim
        return CacheBytes(config.num_hidden_layers * token, 0)
    plain = config.head_dim - config.qk_rope_head_dim
    entry = plain + -(-plain // 64 // 8) * 8 + 2 * config.qk_rope_head_dim
    key = -(-config.index_head_dim // 2) + -(-config.index_head_dim // 32)
    growth = sum((entry + (key if config.kind(layer) == "csa" else 0)) / config.ratio(layer)
                 for layer in range(config.num_hidden_layers) if config.kind(layer) != "window")
    return CacheBytes(growth, config.num_hidden_layers * config.sliding_window * entry)


def _collapse(config: ModelConfig) -> int:
    return config.hc_mult * config.hc_mult * config.hidden_size + config.hc_mult + 1


def _compressor(config: ModelConfig, ratio: int, channels: int, halves: int) -> int:
    return halves * channels * (2 * config.hidden_size + ratio) + channels


def _attention(config: ModelConfig, layer: int) -> int:
    """Parameters of one layer's attention; a token multiplies with all of them."""
    width, heads, channels, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    kind, ratio = config.kind(layer), config.ratio(layer)
    if kind == "gqa":
        shared = config.num_key_value_heads
        return 2 * width * heads * channels + 2 * width * shared * channels + 2 * channels
    if kind in ("mla", "dsa"):
        rotary, latent = config.qk_rope_head_dim, config.latent_channels
        index_heads, index_channels = config.index_n_heads, config.index_head_dim
        indexer = index_heads * (rank * index_channels + width) + index_channels * (width + 2)
        return (width * rank + rank + rank * heads * (channels + rotary) + width * (latent + rotary) + latent
                + 2 * heads * channels * latent + heads * channels * width + (indexer if kind == "dsa" else 0))
    grouped = config.o_groups * config.o_lora_rank
    count = (rank * width + rank + heads * channels * rank + channels * width + channels
             + heads * channels // config.o_groups * grouped + grouped * width + heads)
    if kind != "window":
        count += _compressor(config, ratio, channels, 2 if kind == "csa" else 1)
    if kind == "csa":
        count += (config.index_n_heads * (config.index_head_dim * rank + width)
                  + _compressor(config, ratio, config.index_head_dim, 2))
    return count


def _layer(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Total and activated parameters of one block."""
    width, streams = config.hidden_size, config.hc_mult
    mixes = (2 + streams) * streams
    dense = _attention(config, layer) + 2 * (mixes * streams * width + mixes + 3) + 2 * width
    expert = 3 * width * config.moe_intermediate_size
    dense += expert + config.n_routed_experts * width + (0 if config.routes_by_hash(layer) else config.n_routed_experts)
    return dense + config.n_routed_experts * expert, dense + config.num_experts_per_tok * expert
