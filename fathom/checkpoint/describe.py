"""What a model is, in one table: sizes, layers, and what a token costs."""

from itertools import groupby
from pathlib import Path

from rich.table import Table

from fathom.accounting import cache_bytes, flops_per_token, parameters, released_cache_bytes
from fathom.checkpoint.training import find_model
from fathom.config import PRESETS, ModelConfig
from fathom.errors import InputError

KIND_NAMES = {"window": "window", "csa": "CSA", "hca": "HCA", "gqa": "GQA", "mla": "MLA", "dsa": "DSA"}


def describe(model: str, context: int | None = None) -> Table:
    """A table about a preset, a model folder or a run; costs at `context` tokens (by default 4,096 and the longest)."""
    if model in PRESETS:
        config = ModelConfig.preset(model)
    elif Path(model).is_dir():
        config = ModelConfig.load(find_model(model))
    else:
        raise InputError(f"{model!r} is neither a folder nor a preset; presets: {', '.join(PRESETS)}")
    counts, growth = parameters(config), cache_bytes(config)
    table = Table(title=model, show_header=False)
    for name, value in (
        ("parameters", f"{_count(counts.total)} (and {_count(counts.mtp)} for MTP)"),
        ("activated per token", f"{_count(counts.activated)} ({_count(counts.activated + counts.embedding)} with the "
                                "embedding table)"),
        ("layers", f"{config.num_hidden_layers} of width {config.hidden_size}, {config.hc_mult} residual streams"),
        ("schedule", schedule(config)),
        ("experts", f"{config.n_routed_experts} of width {config.moe_intermediate_size}, {config.num_experts_per_tok} a "
                    f"token and 1 shared; the first {config.num_hash_layers} layers route by hash"),
        ("window", f"{config.sliding_window} tokens"),
        ("longest context", f"{config.max_position_embeddings:,} tokens"),
        ("cache per token", f"{growth.per_token:,.1f} bytes in float32, "
                            f"{released_cache_bytes(config).per_token:,.1f} in the released formats"),
        ("cache, fixed", f"{growth.fixed / 1e6:,.2f} MB in float32"),
    ):
        table.add_row(name, value)
    for tokens in sorted({4096, config.max_position_embeddings}) if context is None else [context]:
        flops = flops_per_token(config, tokens)
        parts = ", ".join(f"{part} {_count(value)}" for part, value in flops.items())
        table.add_row(f"FLOPs per token at {tokens:,}", f"{_count(sum(flops.values()))} ({parts})")
    return table


def schedule(config: ModelConfig) -> str:
    """The layer kinds in order, repeats folded: "window x2, (CSA/4, HCA/128) x20, CSA/4"."""
    names = [KIND_NAMES[config.kind(layer)] + (f"/{config.ratio(layer)}" if config.ratio(layer) else "")
             for layer in range(config.num_hidden_layers)]
    folded, at = [], 0
    while at < len(names):
        pair, repeats = names[at:at + 2], 1
        while len(set(pair)) == 2 and names[at + 2 * repeats:at + 2 * repeats + 2] == pair:
            repeats += 1
        if repeats > 1:
            folded.append(f"({', '.join(pair)}) x{repeats}")
            at += 2 * repeats
        else:
            run = len(list(next(group for _, group in groupby(names[at:]))))
            folded.append(names[at] + (f" x{run}" if run > 1 else ""))
            at += run
    return ", ".join(folded)


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f}{letter}"
    return f"{value:.0f}"
