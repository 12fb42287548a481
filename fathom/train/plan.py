"""What a recipe costs before it runs: parameters, tokens, FLOPs, memory of a rank, days. Nothing is computed, the model is on `meta`.

The counts are arithmetic of the recipe and of the shapes (report 4.2 for the schedules); only the throughput is an assumption, and the
recipe's section [plan] names it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fathom.accounting import flops_per_token, parameters
from fathom.config import ModelConfig
from fathom.errors import RecipeError
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Matrices, Muon, Optimizer
from fathom.optim.schedules import Attention, Schedule

CONTEXTS = 256  # places of a sequence at which FLOPs are counted, for their mean
MASTER_BYTES = 4  # weights, gradients and optimiser state are float32


@dataclass(frozen=True)
class Plan:
    """The machine that --dry-run counts with. `ranks` share weights, gradients and optimiser state; `expert_ranks` of them one layer's
    experts while they compute it, `sequence_ranks` one sequence; a rank holds `rows` sequences at a time. Throughput is
    `flops_per_second` of all ranks together or, without it, ranks x `peak_flops` (of one H100 in BF16) x `mfu`. What a run on an
    accelerator comes to is recorded as its share of `peak_flops`.
    """

    ranks: int = 1
    expert_ranks: int = 1
    sequence_ranks: int = 1
    rows: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    flops_per_second: float | None = None
    peak_flops: float = 989e12
    mfu: float = 0.4

    def __post_init__(self):
        for name in ("ranks", "expert_ranks", "sequence_ranks", "rows", "peak_flops"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: above 0")
        for name in ("expert_ranks", "sequence_ranks"):
            if self.ranks % getattr(self, name):
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: a divisor of ranks, {self.ranks}")
        if not 0 < self.mfu <= 1:
            raise RecipeError(f"mfu is {self.mfu}; allowed: above 0, at most 1")
        if self.flops_per_second is not None and self.flops_per_second <= 0:
            raise RecipeError(f"flops_per_second is {self.flops_per_second}; allowed: above 0")

    @property
    def throughput(self) -> float:
        """FLOPs a second of all ranks together."""
        return self.flops_per_second or self.ranks * self.peak_flops * self.mfu

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the forward pass."""
        return 4 if self.compute_dtype == "float32" else 2


@dataclass(frozen=True)
class Segment:
    """Steps [first, end) of one length and one kind of attention: their tokens, and FLOPs of training on one."""

    first: int
    end: int
    length: int
    attention: Attention
    tokens: int
    flops_per_token: float


@dataclass(frozen=True)
class Cost:
    """What a recipe comes to. Memory is bytes of one rank, by part; duration is in seconds."""

    parameters: int  # of the model on `meta`, all of them
    segments: list[Segment]
    memory: dict[str, float]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def flops(self) -> float:
        """FLOPs of all steps."""
        return sum(segment.tokens * segment.flops_per_token for segment in self.segments)


class Optimizers(NamedTuple):
    """Settings of both optimisers, and which of them moves the matrices."""

    muon: Muon
    adamw: AdamW
    matrices: Matrices = "muon"


def cost(config: ModelConfig, schedule: Schedule, plan: Plan, optimizers: Optimizers, recompute_above: int) -> Cost:
    """Count a run of `schedule` on `plan`'s machine; takes seconds whatever the size."""
    with torch.device("meta"):
        model = Transformer(config)
        state = Optimizer(model.named_parameters(), config, *optimizers).state_tensors()
    count = sum(parameter.numel() for parameter in model.parameters())
    segments = [Segment(first, end, schedule.length_at(first), schedule.attention_at(first), schedule.tokens_in(first, end),
                        training_flops_per_token(config, schedule.length_at(first), schedule.attention_at(first),
                                                 schedule.mtp_weight > 0))
                for first, end in schedule.segments()]
    memory = {"weights (float32)": MASTER_BYTES * count / plan.ranks,
              "gradients (float32)": MASTER_BYTES * count / plan.ranks,
              "optimiser (float32)": sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / plan.ranks}
    if plan.ranks > 1:
        memory[f"two gathered blocks ({plan.compute_dtype})"] = 2 * plan.compute_bytes * _largest_block(model, plan)
    for length in schedule.lengths:
        memory[f"activations at {length:,} tokens"] = activation_bytes(
            config, plan.rows * length / plan.sequence_ranks, plan.compute_bytes, recompute_above)
    seconds = sum(segment.tokens * segment.flops_per_token for segment in segments) / plan.throughput
    return Cost(count, segments, memory, seconds)


def training_flops_per_token(config: ModelConfig, length: int, attention: Attention, mtp: bool = True) -> float:
    """FLOPs of training on one token of a document of `length` tokens: the mean over its positions, forward and twice that backward.

    Dense attention reads all visible entries and leaves the indexer out. In the warm-up only the indexer has a backward pass. When it
    selects, every visible entry is scored once more, to learn. MTP: its block, its projections and the head once more. Counted are
    products only, and recomputed blocks not.
    """
    reading = dataclasses.replace(config, index_topk=length) if attention != "sparse" else config
    contexts = [int((place + 0.5) * length / CONTEXTS) for place in range(CONTEXTS)]
    parts: dict[str, float] = {}
    for context in contexts:
        for name, value in flops_per_token(reading, context).items():
            parts[name] = parts.get(name, 0.0) + value / CONTEXTS
    forward = parts["weights"] + parts["attention"]
    if attention == "warmup":
        return forward + 3 * parts["indexer"]
    more = 2.0 * _mtp_weights(config) if mtp else 0.0
    return 3 * (forward + more) + (4 * parts["indexer"] if attention == "sparse" else 0.0)


def activation_bytes(config: ModelConfig, tokens: float, element_bytes: int, recompute_above: int) -> float:
    """Bytes that a training step keeps of `tokens` tokens on a rank for its backward pass, or its peak where blocks are recomputed.

    A block keeps, in numbers a token (letters as in docs/architecture.md, D channels of a head, R query rank, O o_lora_rank, e index):
      streams    2 N W + 6 W + 4 (N N + 2 N)
      attention  2 R + 3 H D + 2 D + G O;  CSA 4 D + 3 D / ratio + He De + He + 4 De;  HCA 2 D + 3 D / ratio
      experts    3 E + 2 K F + 3 F
    and each head N W + 2 W, each MTP block as much again; beside them the gradient of each head lies ready in float32. Recomputed: N W a
    block of the trunk, and one block at a time. Within 6% of the tensors that autograd saved with the kernels in C, for tiny; without
    them it saves a seventh more.
    """
    W, N, depths = config.hidden_size, config.hc_mult, config.num_nextn_predict_layers
    blocks = [_block_numbers(config, layer) for layer in range(config.num_hidden_layers + depths)]
    trunk, mtp = blocks[:config.num_hidden_layers], blocks[config.num_hidden_layers:]
    ends = (1 + 2 * depths) * (N + 2) * W
    kept = len(trunk) * N * W + max(trunk) if tokens > recompute_above else sum(trunk)
    return tokens * element_bytes * (kept + sum(mtp) + ends) + (1 + depths) * config.vocab_size * W * 4


def show(recipe_text: str, config: ModelConfig, plan: Plan, found: Cost, console: Console) -> None:
    """Print the resolved recipe and the counts."""
    console.print(recipe_text, highlight=False, markup=False, soft_wrap=True)
    counts = parameters(config)
    table = Table(title="before it runs", title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("parameters", f"{counts.total:,} and {counts.mtp:,} for MTP"),
        ("activated a token", f"{counts.activated:,} ({counts.activated + counts.embedding:,} with the embedding)"),
        ("steps", f"{found.segments[-1].end:,}"), ("tokens", f"{found.tokens:,} ({found.tokens / 1e12:.2f}T)"),
        ("training FLOPs", f"{found.flops:.3e}"),
        ("throughput", f"{plan.throughput:.3e} FLOP/s" + ("" if plan.flops_per_second else
                       f" = {plan.ranks:,} ranks x {plan.peak_flops:.3g} x {plan.mfu:.0%}")),
        ("duration", _duration(found.seconds)),
    ):
        table.add_row(name, value)
    console.print(table)
    stages = Table(title="stages", title_justify="left", box=None, pad_edge=False)
    for name in ("steps from", "to", "length", "attention", "tokens", "FLOPs a token", "duration"):
        stages.add_column(name, justify="left" if name == "attention" else "right")
    for segment in found.segments:
        seconds = segment.tokens * segment.flops_per_token / plan.throughput
        stages.add_row(f"{segment.first:,}", f"{segment.end:,}", f"{segment.length:,}", segment.attention,
                       f"{segment.tokens:.3e}", f"{segment.flops_per_token:.3e}", _duration(seconds))
    console.print(stages)
    memory = Table(title=f"memory of each of {plan.ranks:,} ranks", title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, size in found.memory.items():
        memory.add_row(name, f"{size / 2**30:,.2f} GiB")
    memory.add_row("at most together", f"{_peak(found.memory) / 2**30:,.2f} GiB")
    console.print(memory)


def _peak(memory: dict[str, float]) -> float:
    """Everything that stays and the longest stage's activations."""
    activations = [size for name, size in memory.items() if name.startswith("activations")]
    return sum(memory.values()) - sum(activations) + max(activations)


def _largest_block(model: Transformer, plan: Plan) -> float:
    """Parameters of the largest block as one rank gathers it: all but the experts, and its share of these."""
    def size(block: torch.nn.Module) -> float:
        experts = sum(parameter.numel() for name, parameter in block.named_parameters() if ".experts." in f".{name}")
        return sum(parameter.numel() for parameter in block.parameters()) - experts + experts / plan.expert_ranks

    return max(size(block) for block in [*model.blocks, *model.mtp])


def _mtp_weights(config: ModelConfig) -> int:
    """Parameters that a token multiplies with in the MTP blocks: six experts' worth of each, not all, and the streams' projection N times."""
    W, depths = config.hidden_size, config.num_nextn_predict_layers
    idle = (config.n_routed_experts - config.num_experts_per_tok) * 3 * W * config.moe_intermediate_size
    return parameters(config).mtp - depths * idle + depths * ((config.hc_mult - 1) * W * W + config.vocab_size * W)


def _block_numbers(config: ModelConfig, layer: int) -> float:
    W, N, D, K, F = (config.hidden_size, config.hc_mult, config.head_dim, config.num_experts_per_tok, config.moe_intermediate_size)
    numbers: float = 2 * N * W + 6 * W + 4 * (N * N + 2 * N)
    numbers += 2 * config.q_lora_rank + 3 * config.num_attention_heads * D + 2 * D + config.o_groups * config.o_lora_rank
    kind, ratio = config.kind(layer), config.ratio(layer)
    if kind in ("csa", "hca"):
        numbers += (4 if kind == "csa" else 2) * D + 3 * D / ratio
    if kind == "csa":
        numbers += config.index_n_heads * config.index_head_dim + config.index_n_heads + 4 * config.index_head_dim
    return numbers + 3 * config.n_routed_experts + 2 * K * F + 3 * F


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} seconds"
