"""The hybrid of window, CSA and HCA against GQA, MLA, DSA and its own parts, at equal parameters and tokens (report 2.3).

Parameters are made equal by the width of the experts, to a percent. Beside bits per byte: how much a passage's second occurrence gains
from its first, at distances, and what a token costs.
"""

import json
from pathlib import Path

import torch

from fathom.accounting import flops_per_token, parameters, released_cache_bytes
from fathom.config import ModelConfig
from fathom.lab.experiment import Experiment, Numbers, Trained, Variant, Verdict, lower, mean, noise

KINDS: dict[str, dict] = {
    "hybrid": {}, "gqa": {"attention": "gqa", "num_key_value_heads": 2}, "mla": {"attention": "mla"},
    "dsa": {"attention": "dsa", "index_topk": 64}, "window only": {"compress_ratios": [0, 0, 0, 0, 0]},
    "CSA only": {"compress_ratios": [4, 4, 4, 4, 0]}, "HCA only": {"compress_ratios": [32, 32, 32, 32, 0]}}
DISTANCES = (48, 128, 384)
PASSAGE, PASSAGES = 32, 16
FAR = 1 << 17


def equal(changes: dict, base: dict) -> dict:
    """The changes, with the width of experts that brings the model's parameters nearest to the base's."""
    goal = parameters(ModelConfig.from_dict(base)).total
    widths = range(8, 3 * base["moe_intermediate_size"])
    best = min(widths, key=lambda width: abs(parameters(ModelConfig.from_dict(base | changes | {"moe_intermediate_size": width})).total - goal))
    return changes | {"moe_intermediate_size": best}


def equalised(base: Path) -> dict[str, dict]:
    """Every kind's changes, for the base config in a file."""
    values = json.loads(base.read_text(encoding="utf-8"))
    return {name: equal(changes, values) for name, changes in KINDS.items()}


# For recipes/models/lab.json; a test recomputes them.
WIDTHS = {"hybrid": 48, "gqa": 52, "mla": 38, "dsa": 34, "window only": 55, "CSA only": 43, "HCA only": 52}


@torch.no_grad()
def recall(trained: Trained) -> dict[str, float]:
    """Nats a token that a passage's second occurrence gains from the first, so many tokens behind it."""
    tokens_T = torch.cat([batch.tokens_BS.flatten() for batch in trained.held_out])
    gains = {}
    for distance in DISTANCES:
        nats = []
        for number in range(max(1, min(PASSAGES, len(tokens_T) // (2 * PASSAGE + distance)))):
            begin = number * (2 * PASSAGE + distance)
            passage, between = tokens_T[begin:begin + PASSAGE], tokens_T[begin + PASSAGE:begin + PASSAGE + distance - PASSAGE]
            row = torch.cat([passage, between, passage])[None]
            log_p = trained.model(row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
            nats.append(float(log_p[-(PASSAGE - 1):].mean() - log_p[:PASSAGE - 1].mean()))
        gains[f"recall_at_{distance}"] = sum(nats) / len(nats)
    return gains


def _measure(trained: Trained) -> dict[str, float]:
    config = trained.model.config
    return recall(trained) | {"flops_at_128k": sum(flops_per_token(config, FAR).values()), "parameters": float(parameters(config).total),
                              "cache_bytes_at_128k": float(released_cache_bytes(config).at(FAR))}


def _judge(numbers: Numbers) -> Verdict:
    best = min(("gqa", "mla", "dsa"), key=lambda name: mean(numbers, name))
    margin = noise(numbers, ("hybrid", best)) + 0.01 * mean(numbers, best)
    par, gain = mean(numbers, "hybrid") - mean(numbers, best) <= margin, lower(numbers, "hybrid", "window only")
    smaller = mean(numbers, best, "cache_bytes_at_128k") / mean(numbers, "hybrid", "cache_bytes_at_128k")
    outcome = "reproduced" if par and gain.outcome == "reproduced" else "partly" if par or gain.outcome == "reproduced" else "not"
    far = f"recall_at_{DISTANCES[-1]}"
    return Verdict(outcome, f"bits {mean(numbers, 'hybrid'):.4f} against {mean(numbers, best):.4f} of {best}, the best full attention, with a "
                            f"cache {smaller:.1f} times smaller at 128K; {gain.ours}; recall over {DISTANCES[-1]} tokens {mean(numbers, 'hybrid', far):.2f} "
                            f"nats (hybrid), {mean(numbers, best, far):.2f} ({best}), {mean(numbers, 'window only', far):.2f} (window only)")


EXPERIMENT = Experiment(
    "attention", "The hybrid of CSA and HCA keeps the quality of full attention at a fraction of cache and FLOPs.", "report 2.3, 2.3.4",
    "Bits per byte of the hybrid are at most 1% (and the noise) above the best of GQA, MLA and DSA, and below window only by more than the "
    "noise: reproduced where both hold, partly where one does. Equal parameters, tokens and steps.",
    tuple(Variant(name, model=changes | {"moe_intermediate_size": WIDTHS[name]}) for name, changes in KINDS.items()), _judge, _measure,
    seeds=(0, 1))
