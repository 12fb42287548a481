"""Runs under torchrun: each way to spread a step against one process, on this rank; the findings go to OUT/RANK.json."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fathom.data.packing import Batch
from fathom.ops import IGNORE
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.train import loop
from fathom.train.loop import Loop, Stage
from fathom.train.objective import Losses, LossWeights, move_router_biases, objective
from fathom.train.parallel import clip_gradients, expert_parameters, gradient_norm, parallelise, take_weights, whole, whole_model
from fathom.train.rank_optimizer import make_optimizer
from fathom.train.ranks import ALONE, Parallel, Processes, connect
from fathom.train.shares import gradients, rank_rows, tokens_of
from tests.models import random_model, random_tokens, small_config

CONFIG = small_config([0, 4, 32], compress_ratios=[0, 4, 32, 4], sliding_window=16, index_topk=5, hidden_size=32, num_attention_heads=2,
                      head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=8, n_routed_experts=8, num_experts_per_tok=2,
                      moe_intermediate_size=16, index_n_heads=16, index_head_dim=8, hc_mult=2, hc_sinkhorn_iters=4)
LENGTH, ROWS, STEPS = 128, 5, 2
SETTINGS = Muon(precision="float32"), AdamW()
EXACT, PLAIN = torch.float64, torch.float32
# In float64, where nothing but a mistake is larger than 1e-9, and some in float32, as training runs.
MODES = {
    2: [(dict(data=2, accumulate=2), PLAIN), (dict(expert=2), EXACT), (dict(context=2), PLAIN), (dict(shard=2), EXACT)],
    4: [(dict(expert=2, context=2), PLAIN), (dict(shard=2, expert=2), EXACT), (dict(shard=2, context=2, accumulate=2), EXACT)],
}
MORE = {
    2: [(dict(data=2), PLAIN), (dict(data=2, accumulate=2), EXACT), (dict(expert=2), PLAIN), (dict(context=2), EXACT), (dict(shard=2), PLAIN)],
    4: [(mode, dtype) for dtype in (EXACT, PLAIN) for mode in (
        dict(data=4), dict(expert=4), dict(shard=4), dict(data=2, shard=2), dict(data=2, expert=2), dict(expert=2, context=2),
        dict(data=2, context=2), dict(data=2, context=2, accumulate=2), dict(context=4))],
}


class Documents:
    """Rows of documents of many lengths, some of which end just before, at or after the border between ranks."""

    sequence_length, pad_id = LENGTH, 2
    lengths = [[128], [64, 64], [63, 2, 63], [31, 33, 60, 3, 1], [5, 100, 23]]

    def rows(self, first: int, count: int) -> Batch:
        """Rows [first, first + count), the same for ever."""
        tokens = random_tokens(CONFIG, first + count, LENGTH + 1, seed=3)[first:]
        chosen = [self.lengths[row % len(self.lengths)] for row in range(first, first + count)]
        positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in chosen])
        targets = tokens[:, 1:].clone()
        targets[:, :-1][positions[:, 1:] == 0] = IGNORE
        return Batch(tokens[:, :-1], targets, positions)


def run(model, optimizer, ranks):
    """Steps of training: their losses, loads and gradient norms, and the first step's gradients."""
    found, grads = [], {}
    for step in range(STEPS):
        batch = rank_rows(Documents(), step * ROWS, ROWS, ranks)
        optimizer.zero_grad()
        losses = gradients(model, lambda rows, step: objective(model, rows, LossWeights(balance=0.1), 0.3, "sparse"), batch, step, ranks)
        if not step:
            grads = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        norm = gradient_norm(model, ranks)
        clip_gradients(model, norm, 1.0)
        optimizer.step(0.01)
        loads = [seen.routing.load_E.tolist() for seen in losses.observations]
        move_router_biases(model, losses.observations, 0.05)
        found.append({"parts": losses.parts, "loads": loads, "norm": float(norm), "tokens": tokens_of(batch, ranks)})
    return found, grads


def distance(found, expected):
    """Norm of the difference over the norm of what is expected; both may be zero."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30)) if (found - expected).abs().max() > 0 else 0.0


def alone(model):
    """The steps on one process: model and optimiser after them, what `run` found."""
    reference = copy.deepcopy(model)
    optimizer = Optimizer(reference.named_parameters(), CONFIG, *SETTINGS)
    return reference, optimizer, *run(reference, optimizer, ALONE)


def compare(model, mode, reference, single, expected, expected_grads):
    """How far this mode is from one process, beginning from `model`."""
    ranks = Processes(Parallel(**mode))
    spread = parallelise(copy.deepcopy(model), ranks)
    optimizer = make_optimizer(spread, *SETTINGS, ranks)
    found, grads = run(spread, optimizer, ranks)
    sharded, E = expert_parameters(spread), CONFIG.n_routed_experts // ranks.expert_ranks
    own = slice(ranks.expert_index * E, (ranks.expert_index + 1) * E)
    expected_grads = {name: grad[own] if name in sharded else grad for name, grad in expected_grads.items()}
    total = torch.stack([grad.norm() for grad in expected_grads.values()]).norm()
    result = {
        "losses": max(abs(one["parts"][name] / two["parts"][name] - 1) for one, two in zip(found, expected, strict=True)
                      for name in two["parts"]),
        "parts": [sorted(one["parts"]) == sorted(two["parts"]) for one, two in zip(found, expected, strict=True)],
        "loads": [one["loads"] == two["loads"] for one, two in zip(found, expected, strict=True)],
        "tokens": [one["tokens"] == two["tokens"] for one, two in zip(found, expected, strict=True)],
        "norm": max(abs(one["norm"] / two["norm"] - 1) for one, two in zip(found, expected, strict=True)),
        "gradients": float(torch.stack([(grads[name] - grad).norm() for name, grad in expected_grads.items()]).norm() / total),
        "each_gradient": max((distance(grads[name], grad), name) for name, grad in expected_grads.items()),
    }
    state, full = optimizer.state_tensors(), whole_model(spread, ranks)
    if ranks.first:
        # Newton-Schulz and AdamW's signs amplify rounding where a gradient is next to nothing, so not each tensor, but all together.
        floats = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
        moved, off = ([(other[name] - base[name]).norm() for name in floats] for other, base in (
            (reference.state_dict(), model.state_dict()), (full.state_dict(), reference.state_dict())))
        result["weights"] = float(torch.stack(off).norm() / torch.stack(moved).norm())
        wanted = single.state_tensors()
        result["state_names"] = sorted(state) == sorted(wanted)
        result["state"] = max((distance(state[name], tensor), name) for name, tensor in wanted.items() if tensor.norm() > 1e-12)
    kept = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    boxes = [kept if ranks.first else None]
    dist.broadcast_object_list(boxes, src=0)
    optimizer.load_state_tensors(boxes[0])
    again = optimizer.state_tensors()
    take_weights(spread, model, ranks)
    back = whole_model(spread, ranks).state_dict()
    result["weights_survive"] = all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items()) if ranks.first else True
    result["state_survives"] = all(torch.equal(again[name], kept[name]) for name in kept) if ranks.first else True
    return result


def diverge(model):
    """The message of a step whose loss is no number on the last rank alone, and whether the weights stayed."""
    ranks = Processes(Parallel(data=int(os.environ["WORLD_SIZE"])))
    before = copy.deepcopy(model.state_dict())

    def loss(rows, step):
        losses = objective(model, rows, LossWeights(), 0.3, "sparse")
        return Losses(losses.total * float("nan"), losses.parts, losses.observations) if ranks.rank == ranks.count - 1 else losses

    stage = Stage(lambda step: rank_rows(Documents(), 0, ROWS, ranks), loss, lambda step: 0.1, lambda step: 0.1, None, lambda step: False)
    optimizer = make_optimizer(model, *SETTINGS, ranks)
    try:
        loop.take_step(model, optimizer, stage, 6, Loop(), ranks)
    except loop.Diverged as error:
        return str(error), error.told, all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def main():
    out, world = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    connect(120)
    model = random_model(CONFIG).train()
    models = {dtype: copy.deepcopy(model).to(dtype) for dtype in (EXACT, PLAIN)}
    expected = {dtype: alone(each) for dtype, each in models.items()}
    results = {}
    for mode, dtype in MODES[world] + (MORE[world] if os.environ.get("FATHOM_ALL_MODES") else []):
        name = " ".join(f"{key}={value}" for key, value in mode.items()) + f" {dtype}".replace("torch.", "")
        results[name] = compare(models[dtype], mode, *expected[dtype])
    results["diverged"] = diverge(models[PLAIN])
    Processes(Parallel(data=world)).part()
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
