"""The report's figures that arithmetic alone can check, each beside the same figure from first principles (`fathom lab cost`).

A figure holds within 2%; where ours differs by more, `why` names the rounding or the counting choice behind it.
"""

from dataclasses import dataclass
from functools import cache

from fathom.accounting import parameters, released_cache_bytes
from fathom.config import ModelConfig
from fathom.lab.cost import MILLION, cached_bytes, equivalent_flops
from fathom.lab.shapes import LLAMA, V2, V32

TOLERANCE = 0.02


@dataclass(frozen=True)
class Figure:
    """A published number and ours; `why` where they differ by more than the tolerance."""

    name: str
    source: str
    published: float
    ours: float
    formula: str
    why: str = ""

    @property
    def error(self) -> float:
        """Relative difference of ours."""
        return self.ours / self.published - 1

    @property
    def holds(self) -> bool:
        """Whether ours is within the tolerance."""
        return abs(self.error) <= TOLERANCE


@cache
def figures() -> tuple[Figure, ...]:
    """All of them, computed now."""
    pro, flash = ModelConfig.preset("pro"), ModelConfig.preset("flash")
    return (*_costs("Pro", pro, 27, 3.7, 10, 9.5), *_costs("Flash", flash, 10, 9.8, 7, 13.7), *_axes(), *_baselines(pro, flash),
            *_sizes("Flash", flash, 284e9, 13e9), *_sizes("Pro", pro, 1.6e12, 49e9), *_windows(pro, flash))


def _costs(name: str, config: ModelConfig, flops_share: float, flops_times: float, cache_share: float,
           cache_times: float) -> list[Figure]:
    flops = equivalent_flops(V32, MILLION) / equivalent_flops(config, MILLION)
    kept = cached_bytes(V32, MILLION) / cached_bytes(config, MILLION)
    where = "report abstract, 2.3.4, figure 1"
    rounded = f"the exact {100 / kept:.1f}% is printed as a whole percent; the ratio beside it, {cache_times}, holds"
    return [Figure(f"{name}: FLOPs of a token at 1M, times fewer than V3.2", where, flops_times, flops, "equivalent FP8 FLOPs, V3.2 / V4"),
            Figure(f"{name}: the same in percent of V3.2", where, flops_share, 100 / flops, "V4 / V3.2"),
            Figure(f"{name}: KV cache at 1M, times smaller than V3.2", where, cache_times, kept, "bytes, V3.2 / V4"),
            Figure(f"{name}: the same in percent of V3.2", where, cache_share, 100 / kept, "V4 / V3.2", rounded)]


def _axes() -> list[Figure]:
    return [Figure("V3.2: FLOPs of a token at 1M, in TFLOPs", "report figure 1, right: top of the axis", 1.2,
                   equivalent_flops(V32, MILLION) / 1e12, "weights + 2 x core attention + indexer"),
            Figure("V3.2: KV cache at 1M, in GB", "report figure 1, right: about 50", 50, cached_bytes(V32, MILLION) / 1e9,
                   "61 x 2^20 x (656 + 132)")]


def _baselines(pro: ModelConfig, flash: ModelConfig) -> list[Figure]:
    gqa, mla = LLAMA.cached_bytes, V2.cached_bytes
    times = {name: cached_bytes(V32, MILLION) / cached_bytes(config, MILLION) for name, config in (("Pro", pro), ("Flash", flash))}
    found = [Figure("V2's MLA: cache a token, times smaller than 8 KV heads of 128 in BF16", "DeepSeek-V2 report; 4,096 / 1,152", 3.6, gqa / mla,
                    "2 x 2 x 8 x 128 / (2 x (512 + 64))"),
             Figure("V3.2: keys read at 128K, times fewer than there are", "DeepSeek-V3.2 report: top 2,048", 64, 131072 / V32.topk, "131,072 / 2,048")]
    for name, published in (("Pro", 34), ("Flash", 49)):
        found.append(Figure(f"{name}: KV cache, times smaller than 8 KV heads by way of MLA", "product of the two ratios before", published,
                            times[name] * gqa / mla, "V3.2 / V4 times GQA / MLA, which takes V3.2's cache for MLA in BF16"))
    for name, config in (("Pro", pro), ("Flash", flash)):
        bytes_gqa = config.num_hidden_layers * gqa * MILLION
        found.append(Figure(f"{name}: KV cache at 1M in percent of 8 KV heads in BF16", "report 2.3.4: about 2%", 2.0,
                            100 * cached_bytes(config, MILLION) / bytes_gqa, f"V4 / ({config.num_hidden_layers} x 4,096 x 2^20)"))
    return found


def _sizes(name: str, config: ModelConfig, total: float, activated: float) -> list[Figure]:
    counts = parameters(config)
    return [Figure(f"{name}: parameters", "report 4.2.1", total, counts.total, "every tensor of the layout, MTP apart"),
            Figure(f"{name}: activated parameters", "report 4.2.1", activated, counts.activated, "without the embedding table",
                   f"printed as whole billions; exact {counts.activated / 1e9:.2f}B without the embedding table")]


def _windows(pro: ModelConfig, flash: ModelConfig) -> list[Figure]:
    """Window entries against compressed ones, a token: 584 bytes in each layer, and what entries grow by without index keys."""
    found = []
    for name, config in (("Flash", flash), ("Pro", pro)):
        keys = sum(68 / config.ratio(layer) for layer in range(config.num_hidden_layers) if config.kind(layer) == "csa")
        entries = released_cache_bytes(config).per_token - keys
        found.append(Figure(f"{name}: window entries of all tokens, times the compressed ones", "report 3.5.2: about 8", 8,
                            config.num_hidden_layers * 584 / entries, "layers x 584 / bytes a token without index keys"))
    return found
