"""Fathom's own measuring process: `python -m fathom.lab.bench.child JSON`."""

from typing import Any

import torch
from torch import Tensor

from fathom.checkpoint.layouts import FLOAT32
from fathom.checkpoint.names import released_name
from fathom.data.packing import Batch
from fathom.devices import use_device
from fathom.engine.engine import dtype_of
from fathom.engine.graphs import Steps
from fathom.engine.settings import EngineSettings
from fathom.lab.bench.measure import measure, serve
from fathom.lab.bench.plan import Case
from fathom.memory import keep_freed_memory
from fathom.model.cache import Cache
from fathom.model.transformer import Transformer
from fathom.ops import IGNORE, products_in
from fathom.ops.precision import narrow_dtype
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.train.loop import Loop
from fathom.train.objective import LossWeights, move_router_biases, objective

RATE, BIAS_SPEED = 1e-4, 1e-3


class Fathom:
    """Our model with random weights, in the dtypes that `load_model` would give it."""

    settings = ("",)

    def __init__(self, case: Case):
        self.model = cast(Transformer(case.config).initialise(case.seed), dtype_of("float32" if case.kind == "train" else case.dtype)).to(use_device(case.device)).eval()
        self.chunk, self.mtp, self.matrices = case.chunk or EngineSettings.prefill_chunk, case.mtp, case.optimizer
        self.products = narrow_dtype(case.dtype, self.model.head.weight.device)  # of training: its weights are float32
        self.optimizer: Optimizer | None = None
        self.steps: Steps | None = None
        self.facts: dict[str, Any] = {}

    def use(self, setting: str) -> None:
        """There is one way."""

    def new_cache(self, batch: int, tokens: int) -> Cache:
        """An empty cache, with the places that recorded steps want behind its tokens."""
        return self.model.new_cache(batch, min(tokens + Steps.spare(self.model.config), self.model.config.max_position_embeddings))

    def feed(self, cache: Cache, token_BS: Tensor) -> None:
        """Extend the cache by tokens [B, S] and compute the logits after the last one; single tokens as the engine does, as recorded steps."""
        if token_BS.shape[1] > 1:
            self.model(token_BS, cache=cache, last_only=True)
            return
        if self.steps is None or self.steps.cache is not cache:
            self.steps = Steps(self.model, cache)
        self.steps.step(token_BS[:, 0].tolist())

    def train(self, token_BS: Tensor) -> None:
        """A step as in pre-training after its dense start: losses, gradients, clipping, optimiser, router biases."""
        if self.optimizer is None:
            keep_freed_memory()
            self.model.train()
            self.optimizer = Optimizer(self.model.named_parameters(), self.model.config, Muon(), AdamW(), self.matrices)
        self.optimizer.zero_grad()
        target_BS = torch.cat([token_BS[:, 1:], torch.full_like(token_BS[:, :1], IGNORE)], 1)
        position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand(token_BS.shape)
        with products_in(self.products):
            losses = objective(self.model, Batch(token_BS, target_BS, position_BS), LossWeights(), self.mtp, "sparse")
            losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), Loop().clip_norm)
        self.optimizer.step(RATE)
        move_router_biases(self.model, losses.observations, BIAS_SPEED)


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Weights in `dtype`, except those that stay float32 in every layout."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not FLOAT32.search(released_name(name)):
            tensor.data = tensor.data.to(dtype)
    return model


if __name__ == "__main__":
    serve(lambda text: measure(Case.from_json(text), Fathom))
