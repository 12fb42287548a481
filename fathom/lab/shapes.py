"""The models that the report measures V4 against, by their published configs: arithmetic only, nothing of them is run.

Sizes: config.json of deepseek-ai/DeepSeek-V3.2-Exp and DeepSeek-V2, meta-llama/Llama-3.1-405B. MTP is left out, as for V4. Parameters
are checked in the tests against transformers' own models on the meta device.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder with GQA, MLA or DSA and dense or expert layers; widths in channels, `precision` of its weight products."""

    name: str
    attention: str  # gqa, mla or dsa
    precision: str  # of weights: fp8 or bf16
    vocabulary: int
    width: int
    layers: int
    heads: int
    head_channels: int  # of plain keys and of values
    dense_width: int
    dense_layers: int
    kv_heads: int = 0
    query_rank: int = 0
    latent: int = 0
    rotary: int = 0
    experts: int = 0
    chosen: int = 0
    shared: int = 0
    expert_width: int = 0
    routed_bias: bool = False
    index_heads: int = 0
    index_channels: int = 0
    topk: int = 0

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        W, H, D = self.width, self.heads, self.head_channels
        if self.attention == "gqa":
            return 2 * W * H * D + 2 * W * self.kv_heads * D
        R, L, P = self.query_rank, self.latent, self.rotary
        indexer = R * self.index_heads * self.index_channels + W * (self.index_channels + self.index_heads) + 2 * self.index_channels
        return W * R + R + R * H * (D + P) + W * (L + P) + L + 2 * L * H * D + H * D * W + (indexer if self.topk else 0)

    @property
    def router_parameters(self) -> int:
        """Of all layers."""
        return (self.layers - self.dense_layers) * self.experts * (self.width + self.routed_bias)

    @property
    def head_parameters(self) -> int:
        """Of the vocabulary's table, which the model has twice."""
        return self.vocabulary * self.width

    def parameters(self, activated: bool) -> int:
        """All parameters, or those a token multiplies with (without the embedding)."""
        sparse, expert = self.layers - self.dense_layers, 3 * self.width * self.expert_width
        count = self.layers * (self.attention_parameters + 2 * self.width) + self.width + self.head_parameters
        count += self.dense_layers * 3 * self.width * self.dense_width + self.router_parameters
        count += sparse * (self.shared + (self.chosen if activated else self.experts)) * expert
        return count + (0 if activated else self.head_parameters)

    @property
    def cached_bytes(self) -> int:
        """Bytes a token leaves in one layer, in the format of the release."""
        if self.attention == "gqa":
            return 2 * self.kv_heads * self.head_channels * 2
        if self.attention == "mla":
            return 2 * (self.latent + self.rotary)
        return sum(width + 4 * -(-width // 128) for width in (self.latent, self.index_channels)) + 2 * self.rotary


V32 = Shape("deepseek-v3.2", "dsa", "fp8", 129280, 7168, 61, 128, 128, dense_width=18432, dense_layers=3, query_rank=1536, latent=512,
            rotary=64, experts=256, chosen=8, shared=1, expert_width=2048, routed_bias=True, index_heads=64, index_channels=128, topk=2048)
V2 = Shape("deepseek-v2", "mla", "bf16", 102400, 5120, 60, 128, 128, dense_width=12288, dense_layers=1, query_rank=1536, latent=512,
           rotary=64, experts=160, chosen=6, shared=2, expert_width=1536)
LLAMA = Shape("llama-3.1-405b", "gqa", "bf16", 128256, 16384, 126, 128, 128, dense_width=53248, dense_layers=126, kv_heads=8)
SHAPES = {shape.name: shape for shape in (V32, V2, LLAMA)}
