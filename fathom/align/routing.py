"""Keep routing: the experts that a rollout took are taken again in training, so that both see the same sub-model (DeepSeek-V3.2).

Applied to a model from outside, by hooks on its routers. Layers that route by a table of tokens need none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fathom.model.moe import Router
from fathom.model.transformer import Transformer


@contextmanager
def recorded_routing(model: Transformer) -> Iterator[list[Tensor]]:
    """Inside, each learned router of the trunk appends the experts [B, S, K] that it chose, in the order of layers."""
    chosen: list[Tensor] = []
    handles = [router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1])) for router in _routers(model)]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed_routing(model: Transformer, experts: list[Tensor]) -> Iterator[None]:
    """Inside, each learned router of the trunk takes these experts [B, S, K], weighted by its present affinities."""
    def replay(kept_BSK: Tensor):
        def hook(module: Router, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            affinity_BSE = output[0]
            expert_BSK = kept_BSK.long()
            weight_BSK = affinity_BSE.gather(-1, expert_BSK)
            return affinity_BSE, expert_BSK, weight_BSK / weight_BSK.sum(-1, keepdim=True) * module.scaling

        return hook

    handles = [router.register_forward_hook(replay(kept_BSK)) for router, kept_BSK in zip(_routers(model), experts, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routers(model: Transformer) -> list[nn.Module]:
    return [block.moe.router for block in model.blocks if not block.moe.router.by_hash]
