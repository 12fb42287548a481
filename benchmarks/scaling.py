"""How much faster a training step is on several processes than on one: the same batch, one thread a process.

    python benchmarks/scaling.py            # 1 and 2 processes in turn, data parallel; prints a table and JSON

Each round runs every case in fresh processes; the fastest step of all rounds counts, since other programs only make steps slower.
Efficiency is t(1) / (n t(n)).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fathom.config import ModelConfig
from fathom.data.packing import Batch
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Muon
from fathom.train.loop import Loop, Stage, take_step
from fathom.train.objective import LossWeights, objective
from fathom.train.parallel import parallelise
from fathom.train.rank_optimizer import make_optimizer
from fathom.train.ranks import Parallel, join
from fathom.train.shares import rank_rows


class RandomRows:
    """Rows of random tokens, one document each."""

    pad_id = 0

    def __init__(self, vocab_size: int, length: int):
        self.vocab_size, self.sequence_length = vocab_size, length

    def rows(self, first: int, count: int) -> Batch:
        """The rows [first, first + count)."""
        generator = torch.Generator().manual_seed(first)
        tokens = torch.randint(0, self.vocab_size, (count, self.sequence_length + 1), generator=generator)
        return Batch(tokens[:, :-1], tokens[:, 1:].clone(), torch.arange(self.sequence_length).expand(count, -1))


def worker(options: argparse.Namespace) -> None:
    """Time steps on this rank; the first one writes them."""
    config = ModelConfig.preset(options.model)
    with join(Parallel(**json.loads(options.parallel))) as ranks:
        model = parallelise(Transformer(config).initialise(0).train(), ranks)
        optimizer = make_optimizer(model, Muon(), AdamW(), ranks)
        data = RandomRows(config.vocab_size, options.length)
        stage = Stage(batch=lambda step: rank_rows(data, step * options.rows, options.rows, ranks),
                      loss=lambda batch, step: objective(model, batch, LossWeights(), 0.3, "sparse"),
                      rate=lambda step: 1e-3, bias_speed=lambda step: 1e-3, validate=None, quantised=lambda step: False)
        seconds = []
        for step in range(options.steps + 1):
            began = time.perf_counter()
            take_step(model, optimizer, stage, step, Loop(), ranks)
            seconds.append(time.perf_counter() - began)
        if ranks.first:
            Path(options.worker).write_text(json.dumps(seconds[1:]))


def measure(options: argparse.Namespace, parallel: dict[str, int]) -> list[float]:
    """Seconds of each step with this many processes."""
    ranks = torch.Size(parallel.values()).numel()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, "--worker", str(out),
                   "--parallel", json.dumps(parallel), "--model", options.model, "--rows", str(options.rows), "--length", str(options.length),
                   "--steps", str(options.steps)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    """Measure the cases in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("length", 256), ("steps", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--cases", nargs="+", default=['{"data": 1}', '{"data": 2}'], help="[parallel] sections as JSON; the first is one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--parallel", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    cases = [json.loads(case) for case in options.cases]
    seconds = [[] for _ in cases]
    for _ in range(options.rounds):
        for found, case in zip(seconds, cases, strict=True):
            found += measure(options, case)
    result = {"model": options.model, "rows": options.rows, "length": options.length, "torch": torch.__version__,
              "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "cases": []}
    for found, case in zip(seconds, cases, strict=True):
        ranks, best = torch.Size(case.values()).numel(), min(found)
        middle = sorted(found)[len(found) // 2]
        efficiency = min(seconds[0]) / (ranks * best)
        result["cases"].append({"parallel": case, "fastest_step": best, "median_step": middle, "efficiency": efficiency})
        print(f"{case}: fastest step {best:.3f} s, median {middle:.3f} s, efficiency {efficiency:.0%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
