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
    """FLOPs of one token's forward pass at position `context`, by part: weights, attention, indexer."""
    core = index = 0.0
    for layer in range(config.num_hidden_layers):
        read = min(context, config.sliding_window)
        if config.kind(layer) == "csa":
            entries = context // config.ratio(layer)
            read += min(entries, config.index_topk)
            index += 2 * entries * config.index_n_heads * config.index_head_dim
        elif config.kind(layer) == "hca":
            read += context // config.ratio(layer)
        core += 4 * read * config.num_attention_heads * config.head_dim
    return {"weights": 2.0 * parameters(config).activated, "attention": core, "indexer": index}


def cache_bytes(config: ModelConfig, element_bytes: int = 4) -> CacheBytes:
    """Bytes of one sequence's cache as Fathom allocates it; compressor tails are float32 whatever the elements."""
    growth, fixed = 0.0, 0
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


def released_cache_bytes(config: ModelConfig) -> CacheBytes:
    """The same in the released formats: FP8 entries with BF16 rotary channels and scales, MXFP4 indexer keys.

    Per entry: one byte a plain channel, one scale byte per 64 of them padded to eight, two bytes a rotary channel (584 for 512
    channels); per key half a byte a channel and one scale byte per 32 (68 for 128). The tails are left out, as in the report.
    """
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


def _layer(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Total and activated parameters of one block."""
    width, heads, channels, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    ratio, kind, streams = config.ratio(layer), config.kind(layer), config.hc_mult
    grouped = config.o_groups * config.o_lora_rank
    dense = (rank * width + rank + heads * channels * rank + channels * width + channels
             + heads * channels // config.o_groups * grouped + grouped * width + heads)
    if kind != "window":
        dense += _compressor(config, ratio, channels, 2 if kind == "csa" else 1)
    if kind == "csa":
        dense += (config.index_n_heads * (config.index_head_dim * rank + width)
                  + _compressor(config, ratio, config.index_head_dim, 2))
    mixes = (2 + streams) * streams
    dense += 2 * (mixes * streams * width + mixes + 3) + 2 * width
    expert = 3 * width * config.moe_intermediate_size
    dense += expert + config.n_routed_experts * width + (0 if config.routes_by_hash(layer) else config.n_routed_experts)
    return dense + config.n_routed_experts * expert, dense + config.num_experts_per_tok * expert
