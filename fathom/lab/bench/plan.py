"""What is measured: the models, the cases, and the rules they must obey. Imports no torch: a wrong word fails at once."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fathom.config import PRESETS, ModelConfig
from fathom.errors import ConfigError, InputError

Kind = Literal["prefill", "decode", "train"]
Matrices = Literal["muon", "adamw"]

DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of an element
PEERS = {"transformers": (0, 4, 128)}  # compression ratios that the peer has
DECODE_STEPS = 16  # tokens of one timed run: four CSA blocks
DECODE_WARM_UP = 4  # tokens for each setting that a program may try, one more before them

# 121M parameters, 29M activated; the shape that docs/performance.md reports.
BENCH_S = ModelConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers=8, compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128), num_attention_heads=8,
    head_dim=128, qk_rope_head_dim=32, q_lora_rank=256, o_groups=2, o_lora_rank=128, n_routed_experts=32, num_experts_per_tok=4,
    moe_intermediate_size=256, num_hash_layers=2, index_n_heads=8, index_head_dim=64, index_topk=128, sliding_window=128,
    max_position_embeddings=262144, torch_dtype="float32")


class BenchError(InputError):
    """A benchmark that cannot be run as asked."""


@dataclass(frozen=True)
class Case:
    """One measurement by one program. `length`: tokens of the prompt, of the context, or of a training row."""

    kind: Kind
    program: str  # "fathom" or a peer
    config: ModelConfig
    length: int
    batch: int
    dtype: str
    repeats: int
    threads: int | None = None  # torch's own choice
    chunk: int | None = None  # the program's own choice
    steps: int = DECODE_STEPS
    mtp: float = 0.0  # weight of the MTP loss
    optimizer: Matrices = "muon"  # what moves our matrices; a peer has AdamW
    seed: int = 0
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens that one timed run computes."""
        return self.batch * (self.steps if self.kind == "decode" else self.length)

    def to_json(self) -> str:
        """The argument of the process that measures it."""
        return json.dumps(dataclasses.asdict(self) | {"config": self.config.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """The case that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"config": ModelConfig.from_dict(values["config"])})


@dataclass(frozen=True)
class Plan:
    """What all cases of a run share. Raises BenchError, or ConfigError for the model."""

    model: str = "bench-s"
    dtype: str = "float32"
    threads: int | None = None
    repeats: int = 3
    against: str | None = None
    peer_dtype: str | None = None  # `dtype`, unless given
    seed: int = 0
    device: str = "cpu"  # whether it is here, the first process says

    def __post_init__(self):
        for name in (self.dtype, self.peer_dtype or self.dtype):
            if name not in DTYPES:
                raise BenchError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
        for name, value in (("threads", self.threads), ("repeats", self.repeats)):
            if value is not None and value < 1:
                raise BenchError(f"{name} is {value}; allowed: at least 1")
        config = self.config
        if self.against is None:
            return
        if self.against not in PEERS:
            raise BenchError(f"unknown peer {self.against!r}; allowed: {', '.join(PEERS)}")
        if importlib.util.find_spec(self.against) is None:
            raise BenchError(f"{self.against} is not installed; pip install {self.against}, or leave --against out")
        missing = set(config.compress_ratios) - set(PEERS[self.against])
        if missing:
            raise BenchError(f"{self.against} has no compression ratio {min(missing)}; leave --against out")

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        if self.model == "bench-s":
            return BENCH_S
        if self.model in PRESETS:
            return ModelConfig.preset(self.model)
        if not Path(self.model).exists():
            raise ConfigError(f"model {self.model!r} is no file; allowed: bench-s, {', '.join(PRESETS)}, or a config.json")
        return ModelConfig.load(self.model)

    def prefill(self, lengths: str, chunk: int | None = None) -> list[Case]:
        """Prompts of these lengths (as in "2048,8192"), in chunks."""
        if chunk is not None and chunk < 1:
            raise BenchError(f"chunk is {chunk}; allowed: at least 1")
        return self._cases("prefill", ((length, 1) for length in _numbers("lengths", lengths)), 0, chunk=chunk)

    def decode(self, lengths: str, batch: int = 1) -> list[Case]:
        """One row after contexts of these lengths, and `batch` rows after the shortest."""
        if batch < 1:
            raise BenchError(f"batch is {batch}; allowed: at least 1")
        contexts = _numbers("lengths", lengths)
        sizes = [(length, 1) for length in contexts] + ([(min(contexts), batch)] if batch > 1 else [])
        return self._cases("decode", sizes, decode_tokens(self.repeats, DECODE_STEPS, 2))

    def train(self, tokens: str, mtp: float = 0.0, optimizer: str = "muon") -> list[Case]:
        """Whole training steps of one row of so many tokens."""
        if optimizer not in get_args(Matrices):
            raise BenchError(f"optimizer is {optimizer!r}; allowed: {', '.join(get_args(Matrices))}")
        if mtp < 0 or (mtp and not self.config.num_nextn_predict_layers):
            raise BenchError(f"mtp is {mtp}; allowed: 0 or above, and above 0 only for a model with an MTP block")
        return self._cases("train", ((length, 1) for length in _numbers("tokens", tokens)), 0, mtp=mtp, optimizer=optimizer)

    def _cases(self, kind: Kind, sizes: Iterable[tuple[int, int]], further: int, mtp: float = 0.0,
               **ours: Any) -> list[Case]:
        """For each length and batch our case, then the peer's; a model without MTP blocks where they are not used."""
        config, cases = self.config, []
        if not mtp:
            config = dataclasses.replace(config, num_nextn_predict_layers=0,
                                         compress_ratios=config.compress_ratios[:config.num_hidden_layers])
        shared: dict[str, Any] = dict(config=config, repeats=self.repeats, threads=self.threads, seed=self.seed, device=self.device)
        for length, batch in sizes:
            if length + further > config.max_position_embeddings:
                raise BenchError(f"length {length} is too long for the model: max_position_embeddings is "
                                 f"{config.max_position_embeddings}" + (f", and {further} tokens follow" if further else ""))
            cases.append(Case(kind, "fathom", length=length, batch=batch, dtype=self.dtype, mtp=mtp, **ours, **shared))
            if self.against:
                cases.append(Case(kind, self.against, length=length, batch=batch, dtype=self.peer_dtype or self.dtype, optimizer="adamw", **shared))
        return cases


def decode_tokens(repeats: int, steps: int, settings: int) -> int:
    """Tokens that a decode case adds to its context at most, warm-up included."""
    return repeats * steps + settings * (1 + DECODE_WARM_UP)


def _numbers(name: str, text: str) -> list[int]:
    """The integers of "64,128", each at least 1."""
    try:
        values = [int(word.replace("_", "")) for word in text.split(",")]
    except ValueError:
        raise BenchError(f"{name} is {text!r}; allowed: whole numbers with commas between them") from None
    if min(values) < 1:
        raise BenchError(f"{name} has {min(values)}; allowed: at least 1")
    return list(dict.fromkeys(values))
