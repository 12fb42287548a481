"""The layout of one decoded token a row, made of tensors alone, so that a step can be recorded once and replayed with other numbers (CUDA graphs).

Nothing is asked of the device and no shape depends on a number. What `Layout` leaves out where a call does not need it happens at every token:
each row's latest block is pooled, and what comes of an incomplete one goes to a spare place behind the row, which nobody reads.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from fathom.config import ModelConfig, kind_of_ratio
from fathom.model.cache import Cache, Moves
from fathom.model.layout import Blocks, Layout


class StepLayout(Layout):
    """Of the token at place cache.length_B of each row, in rows of `places` places, a multiple of all ratios, with more behind them."""

    def __init__(self, config: ModelConfig, cache: Cache, places: int, ratios: Collection[int] | None = None):
        """`ratios`: those of whose blocks a row may complete one, if not of all."""
        self.places, self.ratios = places, config.ratios if ratios is None else ratios
        one_B = torch.ones_like(cache.length_B)
        moves = Moves(cache.length_B, one_B, 1, known=(True, places))
        super().__init__(config, cache.length_B[:, None], one_B, cache, moves)

    def _blocks(self, ratio: int, cached: bool) -> Blocks:
        if ratio not in self.ratios:
            return self._no_blocks(ratio, self.places // ratio)
        row_B = torch.arange(len(self.start_B), device=self.start_B.device)
        step_R, overlap = torch.arange(1 - ratio, 1, device=row_B.device), kind_of_ratio(ratio) == "csa"
        ring = 2 * ratio if overlap else ratio
        position_B, count_BS = self.start_B + 1 - ratio, (self.position_BS + 1) // ratio

        def flat(step_R: Tensor) -> Tensor:
            """Index into [B, ring + 1] of the tokens at steps up to this one, 0; those before it are in the ring."""
            in_ring_BR = (self.start_B[:, None] + step_R) % ring
            return row_B[:, None] * (ring + 1) + in_ring_BR.where(step_R < 0, ring)

        slot_B = (self.start_B // ratio).where((self.start_B + 1) % ratio == 0, self.places // ratio)
        previous_BR, has_previous_B = (flat(step_R - ratio), position_B >= ratio) if overlap else (None, None)
        return Blocks(row_B, slot_B, position_B, flat(step_R), previous_BR, has_previous_B, torch.zeros_like(count_BS), count_BS,
                      self.places // ratio)
