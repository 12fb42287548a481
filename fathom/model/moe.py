"""DeepSeekMoE: hash and learned routing, balance without an auxiliary loss, one shared expert (report 2.1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.config import ModelConfig
from fathom.model.layers import Linear
from fathom.model.layout import Layout
from fathom.quant.formats import Packed


class Routing(NamedTuple):
    """What training reads from a MoE layer: tokens per expert [E], and the balance loss where routing is learned."""

    load_E: Tensor
    balance: Tensor | None


class Router(nn.Module):
    """Affinities sqrt(softplus(x . e)); experts by the best biased affinity, or by a fixed table of the token id.

    `bias` [E] steers selection only and is moved by the trainer, not by gradients. `table` [V, K] is the hash layers'. `foreseen`
    [B, S, K], set from outside, is a selection made beforehand (anticipatory routing, report 4.2.3).
    """

    foreseen: Tensor | None = None

    def __init__(self, config: ModelConfig, by_hash: bool):
        super().__init__()
        self.chosen, self.scaling, self.by_hash = config.num_experts_per_tok, config.routed_scaling_factor, by_hash
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if by_hash:
            self.register_buffer("table", torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.empty(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_BSW: Tensor, token_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Affinities [B, S, E], chosen experts [B, S, K] and their weights [B, S, K], in float32."""
        if self.by_hash:
            return ops.route(x_BSW, self.weight, self.scaling, None, self.chosen, self.table[token_BS])
        return ops.route(x_BSW, self.weight, self.scaling, self.bias, self.chosen, self.foreseen)


class Experts(nn.Module):
    """The weights of E SwiGLU experts: gate and up [E, F, W], down [E, W, F]; with scales beside them where they are packed."""

    rounding = ops.EXACT  # of the inputs of all products

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, F_, W = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate = nn.Parameter(torch.empty(E, F_, W))
        self.up = nn.Parameter(torch.empty(E, F_, W))
        self.down = nn.Parameter(torch.empty(E, W, F_))
        for name in ("gate_scale", "up_scale", "down_scale"):
            self.register_buffer(name, None)

    def forward(self, x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, limit: float) -> Tensor:
        """The weighted sum of each token's K experts [N, W] in float32."""
        return ops.routed_experts(x_NW, expert_NK, weight_NK, *self.matrices(), limit, self.rounding)

    def matrices(self) -> list[ops.Matrix]:
        """Gate, up and down."""
        return [codes if scale is None else Packed(codes, scale) for codes, scale in (
            (self.gate, self.gate_scale), (self.up, self.up_scale), (self.down, self.down_scale))]


class SharedExpert(nn.Module):
    """The expert that every token takes; clamped like the others."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate = Linear(config.hidden_size, config.moe_intermediate_size)
        self.up = Linear(config.hidden_size, config.moe_intermediate_size)
        self.down = Linear(config.moe_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu_expert(x, self.gate, self.up, self.down, self.limit)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and the shared expert. `balance` makes the balance loss; it is set from outside where rows are split."""

    balance = ops.sequence_balance

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.limit = config.swiglu_limit
        self.router = Router(config, config.routes_by_hash(layer))
        self.experts = Experts(config)
        self.shared = SharedExpert(config)

    def forward(self, x_BSW: Tensor, token_BS: Tensor, layout: Layout,
                observe: bool) -> tuple[Tensor, Routing | None]:
        """The sublayer's output [B, S, W] and, where `observe`, what training reads."""
        affinity_BSE, expert_BSK, weight_BSK = self.router(x_BSW, token_BS)
        routed_NW = self.experts(x_BSW.flatten(0, 1), expert_BSK.flatten(0, 1), weight_BSK.flatten(0, 1), self.limit)
        out_BSW = (routed_NW.view(*x_BSW.shape) + ops.wide(self.shared(x_BSW))).to(x_BSW.dtype)
        if not observe:
            return out_BSW, None
        load_E = expert_BSK[layout.real_BS].flatten().bincount(minlength=affinity_BSE.shape[-1])
        balance = None if self.router.by_hash else self.balance(affinity_BSE, expert_BSK, layout.real_BS)
        return out_BSW, Routing(load_E, balance)


def balanced_table(tokens: int, experts: int, chosen: int, generator: torch.Generator) -> Tensor:
    """Random experts [tokens, chosen] (int64) for hash routing: distinct for each token, each expert equally often.

    Tokens are dealt in random rounds of `experts` tokens; in a round token i takes `chosen` distinct places of a shuffled
    circle of experts, so every expert is taken exactly `chosen` times. The last, short round takes the least used ones.
    """
    table = torch.empty(tokens, chosen, dtype=torch.int64)
    place = torch.arange(experts)
    shuffled = torch.randperm(tokens, generator=generator)
    whole = tokens - tokens % experts
    for begin in range(0, whole, experts):
        circle = torch.randperm(experts, generator=generator)
        offsets = torch.randperm(experts, generator=generator)[:chosen]
        table[shuffled[begin:begin + experts]] = circle[(place[:, None] + offsets) % experts]
    used = torch.zeros(experts)
    for token in shuffled[whole:]:
        least = (used + torch.rand(experts, generator=generator)).topk(chosen, largest=False).indices
        used[least] += 1
        table[token] = least
    return table
