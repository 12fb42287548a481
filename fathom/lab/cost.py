"""`fathom lab cost`: FLOPs of one token and bytes of the KV cache against context, counted as the report counts (section 2.3.4).

FLOPs are equivalent FP8 FLOPs: two for each multiply-add, times 1 for FP8 products, 2 for BF16 and 1/2 for FP4. The report gives no
formulas; of the plausible conventions only this one gives its figures for both sizes: weight products in FP8 except head, routers,
compressors, head weights of indexers and hyper-connections in BF16; core attention in BF16; V4's index products in FP4, V3.2's in FP8.
"""

from typing import NamedTuple

from fathom.accounting import flops_per_token, parameters, released_cache_bytes
from fathom.config import ModelConfig
from fathom.lab.shapes import SHAPES, Shape

FP8_EQUIVALENT = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0}
CONTEXTS = tuple(1 << power for power in range(12, 21))
MILLION = 1 << 20
V4 = ("flash", "pro")

FORMULAS = """\
FLOPs of a token at context N, each times 1 (FP8), 2 (BF16) or 1/2 (FP4):
  weights     2 x activated parameters: FP8; head, routers, compressors, indexers' head weights, hyper-connections: BF16
  V4          BF16: 4 H D keys a layer; keys = min(N, 128) and in CSA + min(N/4, top-k), in HCA + N/128
              FP4: 2 I C N/4 in each CSA layer, I = 64 index heads of C = 128 channels
  V3.2 (DSA)  BF16: H (2 (L + P) + 2 L) min(N, 2048) a layer, latent L = 512 and P = 64;  FP8: 2 I C N a layer
  V2 (MLA)    BF16: H (2 (L + P) + 2 L) N a layer
  GQA         BF16: 4 H D N a layer
Bytes of the cache after N tokens:
  V4          584 an entry (448 FP8 + 128 BF16 rotary + 8 scales), N/4 entries with a key of 68 (FP4) in CSA, N/128 in HCA, 128 in windows
  V3.2        656 (512 FP8 + 16 scales + 128 BF16 rotary) + 132 (128 FP8 + 4 scale) a token and layer
  V2          2 (L + P) = 1,152 a token and layer;  GQA: 2 x 2 G D = 4,096 with G = 8 heads of 128"""


class Product(NamedTuple):
    """FLOPs of one part of a token's forward pass, and the precision they are done in."""

    part: str
    flops: float
    precision: str


def model(name: str) -> ModelConfig | Shape:
    """A model of the tables by name."""
    return SHAPES[name] if name in SHAPES else ModelConfig.preset(name)


def products(of: ModelConfig | Shape, context: int) -> list[Product]:
    """The products of one token with `context` tokens up to and with itself."""
    if isinstance(of, Shape):
        return _shape_products(of, context)
    flops, wide = flops_per_token(of, context), 2.0 * _bf16_parameters(of)
    return [Product("weights", flops["weights"] - wide, "fp8"), Product("weights kept in BF16", wide, "bf16"),
            Product("attention", flops["attention"], "bf16"), Product("indexer", flops["indexer"], "fp4")]


def equivalent_flops(of: ModelConfig | Shape, context: int) -> float:
    """Equivalent FP8 FLOPs of one token."""
    return sum(product.flops * FP8_EQUIVALENT[product.precision] for product in products(of, context))


def cached_bytes(of: ModelConfig | Shape, context: int) -> int:
    """Bytes of one sequence's cache after `context` tokens, in the formats of the release; compressor tails left out."""
    return of.layers * of.cached_bytes * context if isinstance(of, Shape) else released_cache_bytes(of).at(context)


def table(names: tuple[str, ...] = (*V4, *SHAPES), contexts: tuple[int, ...] = CONTEXTS) -> dict[str, dict]:
    """Parameters, and per context equivalent FLOPs, their parts and cache bytes, of each model."""
    rows = {}
    for name in names:
        of = model(name)
        counts = parameters(of) if isinstance(of, ModelConfig) else None
        rows[name] = {"total": counts.total if counts else of.parameters(activated=False),
                      "activated": counts.activated if counts else of.parameters(activated=True), "contexts": list(contexts),
                      "flops": [equivalent_flops(of, context) for context in contexts],
                      "parts": [[product._asdict() for product in products(of, context)] for context in contexts],
                      "cache_bytes": [cached_bytes(of, context) for context in contexts]}
    return rows


def _bf16_parameters(config: ModelConfig) -> int:
    """Parameters that the release keeps in BF16 or float32 products: head, routers, compressors, index head weights, streams."""
    width, layers = config.hidden_size, range(config.num_hidden_layers)
    count = config.vocab_size * width + config.num_hidden_layers * config.n_routed_experts * width
    count += config.num_hidden_layers * 2 * (2 + config.hc_mult) * config.hc_mult**2 * width
    for layer in layers:
        kind = config.kind(layer)
        if kind == "csa":
            count += 2 * 2 * (config.head_dim + config.index_head_dim) * width + config.index_n_heads * width
        elif kind == "hca":
            count += 2 * config.head_dim * width
    return count


def _shape_products(shape: Shape, context: int) -> list[Product]:
    wide = 2.0 * (shape.head_parameters + shape.router_parameters)
    read = min(context, shape.topk) if shape.topk else context
    a_key = 4 * shape.head_channels if shape.attention == "gqa" else 4 * shape.latent + 2 * shape.rotary
    index = 2.0 * context * shape.index_heads * shape.index_channels
    return [Product("weights", 2.0 * shape.parameters(activated=True) - wide, shape.precision),
            Product("weights kept in BF16", wide, "bf16"),
            Product("attention", float(shape.layers * shape.heads * a_key * read), "bf16"),
            Product("indexer", shape.layers * index, "fp8")]
