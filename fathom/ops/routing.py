"""Which experts a token takes, and with what weights (report 2.1)."""

import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.ops.precision import wide


@op
def route(x_BSW: Tensor, embedding_EW: Tensor, scaling: float, bias_E: Tensor | None, chosen: int,
          expert_BSK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Affinities sqrt(softplus(x . e)) [B, S, E], chosen experts [B, S, K] and their weights [B, S, K], all in float32.

    The experts are those given, or the `chosen` best by affinity plus bias, in any order.
    """
    affinity_BSE = F.softplus(F.linear(wide(x_BSW), wide(embedding_EW))).sqrt()
    if expert_BSK is None:
        expert_BSK = (affinity_BSE + bias_E).topk(chosen, sorted=False).indices
    weight_BSK = affinity_BSE.gather(-1, expert_BSK)
    return affinity_BSE, expert_BSK, weight_BSK / weight_BSK.sum(-1, keepdim=True) * scaling
