"""From seconds to figures: throughput, shares of the machine's ceilings, ratios. Pure functions."""

import dataclasses
import statistics
from typing import Any

from fathom.accounting import flops_per_token, parameters
from fathom.config import ModelConfig
from fathom.lab.bench.plan import DTYPES, Case

POINTS = 64  # contexts, evenly spaced over a sequence, that stand for all of its positions


def figures(case: Case, outcome: dict[str, Any], ceilings: dict[str, Any] | None) -> dict[str, Any]:
    """What is reported of a measured case: medians with the fastest and slowest run, bytes, and its share of a ceiling."""
    seconds = outcome["seconds"]
    middle = statistics.median(seconds)
    row = {"tokens_per_second": _spread(case.tokens, seconds), "seconds": seconds, "peak_bytes": outcome["bytes_peak"],
           "extra_bytes": outcome["bytes_peak"] - outcome["bytes_before"]}
    row |= {name: value for name, value in outcome.items() if name not in ("seconds", "bytes_before", "bytes_peak")}
    if case.kind == "decode":
        row["ms_per_step"] = {"median": 1e3 * middle / case.steps, "least": 1e3 * min(seconds) / case.steps,
                              "most": 1e3 * max(seconds) / case.steps}
        row["bytes_per_step"] = decode_bytes(case.config, case.length, case.batch, DTYPES[case.dtype])
        if ceilings:
            row["share_of_bandwidth"] = row["bytes_per_step"] * case.steps / middle / (1e9 * ceilings["read"])
    else:
        row["flops_per_token"] = arithmetic(case)
        if ceilings:
            speed = row["flops_per_token"] * case.tokens / middle / 1e9
            row["share_of_matmul"] = speed / matmul(ceilings, case.dtype)
            row["share_of_torch_matmul"] = speed / matmul(ceilings, case.dtype, "torch")
    return row


def matmul(ceilings: dict[str, Any], dtype: str, way: str | None = None) -> float:
    """The fastest matrix product in GFLOP/s: of one way to compute it, or of all."""
    return max(speed for name, shapes in ceilings[dtype].items() if way in (None, name) for speed in shapes.values())


def arithmetic(case: Case) -> float:
    """FLOPs that a token of this prompt or training row needs, by the layout of the model alone.

    A prompt's head is computed once a chunk and not counted; a training step counts as three forward passes, its optimiser
    and the indexer's objective not at all.
    """
    forward = mean_flops(case.config, case.length)
    head = 2 * case.config.vocab_size * case.config.hidden_size
    if case.kind == "prefill":
        return forward - head
    return 3 * (forward + (_mtp_flops(case.config, case.length, head) if case.mtp else 0))


def mean_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a token's forward pass, the mean over the positions of a sequence: weights, attention, indexer."""
    contexts = [(2 * point + 1) * length // (2 * POINTS) for point in range(POINTS)]
    return statistics.fmean(sum(flops_per_token(config, context).values()) for context in contexts)


def decode_bytes(config: ModelConfig, context: int, batch: int, element_bytes: int) -> int:
    """Bytes that one token of each of `batch` rows reads: activated weights once, and each row's own cache.

    Experts are counted as distinct ones among so many independent uniform choices.
    """
    E, K = config.n_routed_experts, config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    distinct = E * (1 - (1 - K / E) ** batch)
    weights = parameters(config).activated + config.num_hidden_layers * (distinct - K) * expert
    cache = 0
    for layer in range(config.num_hidden_layers):
        entries = context // config.ratio(layer) if config.ratio(layer) else 0
        read = min(entries, config.index_topk) if config.kind(layer) == "csa" else entries
        cache += (min(context, config.sliding_window) + read) * config.head_dim
        cache += entries * config.index_head_dim if config.kind(layer) == "csa" else 0
    return round(element_bytes * (weights + batch * cache))


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Give each of our rows its throughput over each peer's at the same case: `ratio`, by the peer's name."""
    for row in rows:
        others = [other for other in rows if other["program"] != "fathom" and "failed" not in other and all(
            other[name] == row[name] for name in ("kind", "length", "batch"))]
        if row["program"] == "fathom" and "failed" not in row and others:
            row["ratio"] = {other["program"]: row["tokens_per_second"]["median"] / other["tokens_per_second"]["median"]
                            for other in others}


def _spread(tokens: int, seconds: list[float]) -> dict[str, float]:
    return {"median": tokens / statistics.median(seconds), "least": tokens / max(seconds), "most": tokens / min(seconds)}


def _mtp_flops(config: ModelConfig, length: int, head: int) -> float:
    """The MTP blocks: as layers of their own, each with two projections of the width and a pass through the head."""
    depths = config.num_nextn_predict_layers
    ratios = tuple(config.ratio(layer) for layer in range(config.num_hidden_layers + depths))
    deeper = dataclasses.replace(config, num_hidden_layers=len(ratios), compress_ratios=ratios, num_nextn_predict_layers=0)
    alone = dataclasses.replace(config, compress_ratios=ratios[:config.num_hidden_layers], num_nextn_predict_layers=0)
    return mean_flops(deeper, length) - mean_flops(alone, length) + depths * (4 * config.hidden_size**2 + head)
