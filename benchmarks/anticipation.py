"""What anticipatory routing costs while it is on (report 4.2.3 gives about 20%): steps of the tiny preset with and without, in turn.

    python benchmarks/anticipation.py [--rounds 7] [--length 512] [--rows 2]
"""

import argparse
import platform
import statistics
import time

import torch

from fathom.config import ModelConfig
from fathom.data.packing import Batch
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.train.loop import Loop, Stage, _step
from fathom.train.objective import LossWeights, objective
from fathom.train.stability import Guard, Stability
from fathom.train.watch import Watch


def main() -> None:
    """Time `rounds` pairs of steps, processor seconds of this process, and print the medians and their ratio."""
    parser = argparse.ArgumentParser()
    for name, value in (("rounds", 7), ("length", 512), ("rows", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    config = ModelConfig.preset("tiny")
    model = Transformer(config).initialise(0).train()
    optimizer = Optimizer(model.named_parameters(), config, Muon(), AdamW())

    def batch(step: int) -> Batch:
        tokens = torch.randint(0, config.vocab_size, (options.rows, options.length + 1), generator=torch.Generator().manual_seed(step))
        return Batch(tokens[:, :-1], tokens[:, 1:].clone(), torch.arange(options.length).expand(options.rows, -1))

    stage = Stage(batch=batch, loss=lambda data, step: objective(model, data, LossWeights(), 0.3, "sparse"), rate=lambda step: 1e-3,
                  bias_speed=lambda step: 0.001, validate=None, quantised=lambda step: False)
    plain, ahead, watch = Guard(Stability()), Guard(Stability(lag=4)), Watch(model, 0)
    ahead._anticipate_until = 1 << 30
    seconds: dict[str, list[float]] = {"plain": [], "anticipating": []}
    for step in range(options.rounds + 2):
        for name, guard in (("plain", plain), ("anticipating", ahead)):
            began = time.process_time()
            _step(model, optimizer, stage, step, Loop(), guard, watch)
            if step >= 2:  # the first ones look several steps ahead at once
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads; tiny, "
          f"{options.rows} rows of {options.length} tokens, {options.rounds} pairs")
    for name, values in seconds.items():
        print(f"{name:13s} {medians[name] * 1e3:7.1f} ms of processor time a step ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})")
    print(f"anticipatory routing costs {medians['anticipating'] / medians['plain'] - 1:.0%}")


if __name__ == "__main__":
    main()
