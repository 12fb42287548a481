"""Affinities by sqrt(softplus) against DeepSeek-V3's sigmoid (report 2.1)."""

import torch.nn.functional as F
from torch import Tensor

from fathom import ops
from fathom.lab.experiment import Experiment, Variant, lower, swapped
from fathom.model import moe

_Router = moe.Router


class SigmoidRouter(_Router):
    """A router whose affinities are sigmoids."""

    def forward(self, x_BSW: Tensor, token_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the other's: affinities [B, S, E], chosen experts and weights [B, S, K]."""
        affinity_BSE = F.linear(ops.wide(x_BSW), ops.wide(self.weight)).sigmoid()
        expert_BSK = self.table[token_BS] if self.by_hash else (affinity_BSE + self.bias).topk(self.chosen, sorted=False).indices
        weight_BSK = affinity_BSE.gather(-1, expert_BSK)
        return affinity_BSE, expert_BSK, weight_BSK / weight_BSK.sum(-1, keepdim=True) * self.scaling


EXPERIMENT = Experiment(
    "scoring", "Affinities by sqrt(softplus) are better than sigmoids.", "report 2.1",
    "Bits per byte with sqrt(softplus) are below those with sigmoids by more than the noise.",
    (Variant("sqrt-softplus"), Variant("sigmoid", swap=lambda: swapped((moe, "Router", SigmoidRouter)))),
    lambda numbers: lower(numbers, "sqrt-softplus", "sigmoid"))
