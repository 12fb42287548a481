"""ModelConfig: the released `config.json` as one frozen dataclass, its presets and its rules.

Field names are the released ones, unchanged (report section 4.2.1 for the sizes). Every rule a config must
obey is checked here, once, when it is made; nothing else in the package checks it again.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fathom.errors import ConfigError

LayerKind = Literal["window", "csa", "hca", "gqa", "mla", "dsa"]

# What a model attends with: V4's window and compressed entries, or an attention to compare it with (model/baselines).
ATTENTIONS = ("v4", "gqa", "mla", "dsa")

# A compressed layer selects its entries with an indexer (CSA) up to this ratio and reads all of them (HCA)
# beyond. The released models use 4 and 128 only; entries this coarse are too few to be worth selecting from.
LARGEST_INDEXED_RATIO = 16


@dataclass(frozen=True)
class RopeScaling:
    """YaRN settings of the compressed layers."""

    beta_fast: float = 32
    beta_slow: float = 1
    factor: float = 16
    original_max_position_embeddings: int = 65536
    type: str = "yarn"


@dataclass(frozen=True)
class QuantizationConfig:
    """How a released checkpoint's FP8 tensors are stored."""

    activation_scheme: str = "dynamic"
    fmt: str = "e4m3"
    quant_method: str = "fp8"
    scale_fmt: str | None = "ue8m0"
    weight_block_size: tuple[int, ...] = (128, 128)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V4 model's shape. Fields without a default must be given; the rest are those of both releases.

    `compress_ratios` names each layer's attention (and, behind the layers, each MTP block's): 0 reads the
    window only, a ratio up to 16 is CSA (overlapping blocks, selected by an indexer), a larger one is HCA.
    `attention` replaces all of them by a baseline that keeps every token: "gqa" (num_key_value_heads), "mla" (kv_lora_rank, by
    default four heads wide) or "dsa" (MLA with the indexer's fields); keys are rotated as in compressed layers.
    Raises ConfigError naming the field, its value and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    compress_ratios: tuple[int, ...]

    qk_rope_head_dim: int = 64
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    routed_scaling_factor: float = 1.5
    num_hash_layers: int = 3
    sliding_window: int = 128
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    swiglu_limit: float = 10.0
    rope_theta: float = 10000
    compress_rope_theta: float = 160000
    rope_scaling: RopeScaling | None = None
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 1048576
    bos_token_id: int = 0
    eos_token_id: int = 1

    # Beyond the released fields, and in config.json only where they are used.
    attention: str = "v4"
    kv_lora_rank: int | None = None

    # Fixed by the architecture; part of the file format, so they are kept and checked.
    num_key_value_heads: int = 1
    n_shared_experts: int = 1
    hidden_act: str = "silu"
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False

    # About the file rather than the model.
    architectures: tuple[str, ...] = ("DeepseekV4ForCausalLM",)
    model_type: str = "deepseek_v4"
    torch_dtype: str = "bfloat16"
    transformers_version: str = "4.57.1"
    use_cache: bool = True
    expert_dtype: str | None = None
    quantization_config: QuantizationConfig | None = None

    def __post_init__(self):
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _typed(item.name, getattr(self, item.name), _TYPES[item.name]))
        for name, allowed, holds in _RULES:
            if not holds(self):
                raise ConfigError(f"config field {name} is {_plain(getattr(self, name))!r}; allowed: {allowed}")

    # ---- the layer schedule

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer; layers from num_hidden_layers on are the MTP blocks. 0 compresses nothing."""
        listed = self.attention == "v4" and layer < len(self.compress_ratios)
        return self.compress_ratios[layer] if listed else 0

    def kind(self, layer: int) -> LayerKind:
        """Attention kind of a layer: "window", "csa" (with indexer and overlap) or "hca"; or the baseline in its place."""
        return kind_of_ratio(self.ratio(layer)) if self.attention == "v4" else self.attention

    @property
    def ratios(self) -> frozenset[int]:
        """The compression ratios in use, without 0."""
        return frozenset(self.ratio(layer) for layer in range(len(self.compress_ratios))) - {0}

    @property
    def latent_channels(self) -> int:
        """Width of MLA's latent: kv_lora_rank or, where absent, DeepSeek-V3's four heads."""
        return self.kv_lora_rank or 4 * self.head_dim

    def routes_by_hash(self, layer: int) -> bool:
        """Whether the layer's experts come from the token-id table."""
        return layer < min(self.num_hash_layers, self.num_hidden_layers)

    # ---- config.json

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Build from the keys of a config.json; unknown and missing keys raise ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError(f"a model config must be a JSON object, not {type(values).__name__}")
        _reject_unknown("config field", values, cls)
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ConfigError(f"config field {missing[0]} is missing (and {len(missing) - 1} more)"
                              if len(missing) > 1 else f"config field {missing[0]} is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of config.json; absent optional sections are left out, as released."""
        values = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        if self.attention == "v4":
            del values["attention"]
        return {name: value for name, value in values.items() if value is not None or name == "rope_scaling"}

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json, or the one inside a folder."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """One of `tiny`, `nano`, `flash`, `pro`, with any fields changed."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes)


def kind_of_ratio(ratio: int) -> LayerKind:
    """Attention kind that a compression ratio stands for."""
    return "window" if ratio == 0 else "csa" if ratio <= LARGEST_INDEXED_RATIO else "hca"


def _plain(value: Any) -> Any:
    """Tuples become lists, all the way down: what JSON holds."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _reject_unknown(what: str, values: dict[str, Any], cls: type) -> None:
    known = [item.name for item in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            raise ConfigError(f"unknown {what} {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the annotated type of config field `name`, or a ConfigError."""
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in kind.__args__:
            return None
        kind = next(option for option in kind.__args__ if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"config field {name} is {value!r}; allowed: an object or null")
        _reject_unknown(f"config field in {name}:", value, kind)
        hints = typing.get_type_hints(kind)
        return kind(**{key: _typed(f"{name}.{key}", item, hints[key]) for key, item in value.items()})
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"config field {name} is {value!r}; allowed: a list")
        return tuple(_typed(f"{name}[{i}]", item, kind.__args__[0]) for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # kept as it was written: 10000 stays 10000 in config.json
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"config field {name} is {value!r}; allowed: {_TYPE_WORDS[kind]}")
    return value


_TYPES = typing.get_type_hints(ModelConfig)
_TYPE_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def _at_least(least: float, *names: str) -> list[tuple[str, str, Any]]:
    return [(name, f"at least {least}", lambda c, n=name: getattr(c, n) >= least) for name in names]


def _exactly(name: str, value: Any) -> tuple[str, str, Any]:
    return name, f"{value!r} (the only one DeepSeek-V4 has)", lambda c: getattr(c, name) == value


_RULES: list[tuple[str, str, Any]] = [
    *_at_least(1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank",
               "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
               "index_n_heads", "index_head_dim", "index_topk", "sliding_window", "hc_mult", "hc_sinkhorn_iters",
               "max_position_embeddings"),
    *_at_least(0, "num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "initializer_range"),
    *((name, "above 0", lambda c, n=name: getattr(c, n) > 0)
      for name in ("rope_theta", "compress_rope_theta", "rms_norm_eps", "hc_eps", "swiglu_limit",
                   "routed_scaling_factor")),
    ("qk_rope_head_dim", "even, from 2 to head_dim and to index_head_dim",
     lambda c: c.qk_rope_head_dim % 2 == 0 and 2 <= c.qk_rope_head_dim <= min(c.head_dim, c.index_head_dim)),
    ("o_groups", "a divisor of num_attention_heads", lambda c: c.num_attention_heads % c.o_groups == 0),
    ("num_experts_per_tok", "at most n_routed_experts", lambda c: c.num_experts_per_tok <= c.n_routed_experts),
    ("compress_ratios", "one integer for each layer, then one for each MTP block",
     lambda c: len(c.compress_ratios) in (c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)),
    ("compress_ratios", "0 (window only) or at least 2",
     lambda c: all(ratio == 0 or ratio >= 2 for ratio in c.compress_ratios)),
    ("rope_scaling", "type \"yarn\" with factor at least 1, or null",
     lambda c: c.rope_scaling is None or (c.rope_scaling.type == "yarn" and c.rope_scaling.factor >= 1)),
    ("expert_dtype", "\"fp4\", \"fp8\" or absent", lambda c: c.expert_dtype in (None, "fp4", "fp8")),
    ("attention", ", ".join(f'"{name}"' for name in ATTENTIONS), lambda c: c.attention in ATTENTIONS),
    ("kv_lora_rank", "at least 1, with attention \"mla\" or \"dsa\"",
     lambda c: c.kv_lora_rank is None or (c.kv_lora_rank >= 1 and c.attention in ("mla", "dsa"))),
    ("num_key_value_heads", "1, or with attention \"gqa\" a divisor of num_attention_heads",
     lambda c: c.num_key_value_heads == 1 or (c.attention == "gqa" and c.num_key_value_heads >= 1
                                              and c.num_attention_heads % c.num_key_value_heads == 0)),
    _exactly("n_shared_experts", 1), _exactly("hidden_act", "silu"),
    _exactly("scoring_func", "sqrtsoftplus"), _exactly("topk_method", "noaux_tc"), _exactly("norm_topk_prob", True),
    _exactly("attention_bias", False), _exactly("attention_dropout", 0.0), _exactly("tie_word_embeddings", False),
    _exactly("model_type", "deepseek_v4"),
]

_RELEASED = {"rope_scaling": dataclasses.asdict(RopeScaling()), "expert_dtype": "fp4", "quantization_config": dataclasses.asdict(QuantizationConfig())}

PRESETS: dict[str, dict[str, Any]] = {
    # About 3M parameters: learns in minutes on two CPU cores.
    "tiny": dict(
        vocab_size=4096, hidden_size=160, num_hidden_layers=4, num_attention_heads=4, head_dim=64,
        qk_rope_head_dim=16, q_lora_rank=64, o_groups=2, o_lora_rank=64, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64, index_n_heads=4, index_head_dim=32, index_topk=32, num_hash_layers=1,
        sliding_window=64, compress_ratios=[0, 4, 128, 4, 0], max_position_embeddings=65536,
        rope_scaling=None, torch_dtype="float32"),
    # About 100M parameters, 20M of them activated: one GPU.
    "nano": dict(
        vocab_size=16384, hidden_size=384, num_hidden_layers=10, num_attention_heads=8, head_dim=128,
        qk_rope_head_dim=32, q_lora_rank=192, o_groups=2, o_lora_rank=128, n_routed_experts=42, num_experts_per_tok=2,
        moe_intermediate_size=160, index_n_heads=8, index_head_dim=64, index_topk=128, num_hash_layers=2,
        compress_ratios=[0, 0, 4, 128, 4, 128, 4, 128, 4, 128, 0], max_position_embeddings=131072,
        rope_scaling={"original_max_position_embeddings": 8192}, torch_dtype="float32"),
    "flash": dict(
        vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
        qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, n_routed_experts=256,
        num_experts_per_tok=6, moe_intermediate_size=2048, index_n_heads=64, index_head_dim=128, index_topk=512,
        routed_scaling_factor=1.5, compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0], **_RELEASED),
    "pro": dict(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, head_dim=512,
        qk_rope_head_dim=64, q_lora_rank=1536, o_groups=16, o_lora_rank=1024, n_routed_experts=384,
        num_experts_per_tok=6, moe_intermediate_size=3072, index_n_heads=64, index_head_dim=128, index_topk=1024,
        routed_scaling_factor=2.5, compress_ratios=[128, 128] + [4, 128] * 29 + [4, 0], **_RELEASED),
}
