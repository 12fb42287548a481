"""The first layer's experts by a hash of the token, by a learned router, or one dense layer instead (report 2.1)."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.lab.experiment import Experiment, Variant, lower, swapped, worst
from fathom.model import block
from fathom.model.layout import Layout
from fathom.model.moe import MixtureOfExperts, Routing, SharedExpert

HASHED = 2  # layers


class NoRouter(nn.Module):
    """Stands where training looks for a router; it is never called."""

    by_hash = True


class DenseFeedForward(nn.Module):
    """As wide as the experts that a token takes together, in the place of MixtureOfExperts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = (config.num_experts_per_tok + 1) * config.moe_intermediate_size
        self.shared = SharedExpert(SimpleNamespace(hidden_size=config.hidden_size, moe_intermediate_size=width, swiglu_limit=config.swiglu_limit))
        self.router = NoRouter()
        self.one_E = config.n_routed_experts

    def forward(self, x_BSW: Tensor, token_BS: Tensor, layout: Layout, observe: bool) -> tuple[Tensor, Routing | None]:
        """The sublayer's output [B, S, W]; balanced by nature."""
        return self.shared(x_BSW), Routing(torch.ones(self.one_E), None) if observe else None


def dense_first(config: ModelConfig, layer: int) -> nn.Module:
    """A dense layer where hash routing would be, experts elsewhere."""
    return DenseFeedForward(config) if config.routes_by_hash(layer) else MixtureOfExperts(config, layer)


EXPERIMENT = Experiment(
    "early-layers", "Hash routing in the first layers replaces dense layers and learned routing there without loss.", "report 2.1",
    "Bits per byte with hash routing are below those of dense first layers, and of learned routing, by more than the noise (reproduced where "
    "both, partly where one or within the noise).",
    (Variant("hash", model={"num_hash_layers": HASHED}), Variant("learned", model={"num_hash_layers": 0}),
     Variant("dense", model={"num_hash_layers": HASHED}, swap=lambda: swapped((block, "MixtureOfExperts", dense_first)))),
    lambda numbers: worst(lower(numbers, "hash", "dense"), lower(numbers, "hash", "learned")))
