"""Where the tokens of one call stand: positions, rotary turns, the blocks they complete, what each may see.

Made once per call and shared by all layers. A document starts where its position is 0, so positions alone keep packed
documents apart: blocks are counted from the document's start and no reach goes past it (report 3.4.3, 4.1).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fathom.config import ModelConfig, kind_of_ratio
from fathom.model.cache import Cache, Moves, Tokens
from fathom.model.layers import rotary_frequencies


@dataclass(frozen=True)
class Blocks:
    """The N blocks of one ratio that this call's tokens complete, and the entries that each query may read.

    Token indices are flat over [R, J], R the rows in `rows_R` and J the joined axis of `Ring.extend`; without a cache over [B, S].
    """

    row_N: Tensor
    slot_N: Tensor  # where the entry goes on its row
    position_N: Tensor  # of the block's first token, in its document
    current_NR: Tensor
    previous_NR: Tensor | None  # with overlap only
    has_previous_N: Tensor | None
    first_BS: Tensor
    count_BS: Tensor
    entries: int  # per row, for all queries of the call
    rows_R: Tensor | None = None  # those that complete a block, if not all do; their raw tokens alone are needed


class Layout:
    """Positions [B, S] of the new tokens, and everything that follows from them.

    Without a cache the rows are whole; `position_BS` may restart inside a row (packed documents). With a cache row b
    continues at cache.length_B[b] with its first count_B[b] tokens; what follows them is padding.
    """

    def __init__(self, config: ModelConfig, position_BS: Tensor, count_B: Tensor, cache: Cache | None, moves: Moves | None = None):
        B, S = position_BS.shape
        self.position_BS, self.count_B = position_BS, count_B
        self.start_B = torch.zeros_like(count_B) if cache is None else cache.length_B.clone()
        self.moves = moves or Moves(self.start_B, count_B, S)
        step_S = torch.arange(S, device=position_BS.device)
        self.place_BS = self.start_B[:, None] + step_S
        self.reach_BS = position_BS.clamp(max=config.sliding_window - 1)
        self.key_place_BT, self.window_slots = self.place_BS, 0
        if cache is not None:  # the ring's slot r holds the last position up to `last` that is r modulo its size
            R, single = config.sliding_window, int(S == 1)  # a single token is in the ring before it is read
            self.window_slots = min(R, self.moves.longest + single)  # the others are empty
            last_B1 = self.start_B[:, None] - 1 + single
            self.key_place_BT = last_B1 - (last_B1 - torch.arange(self.window_slots, device=step_S.device)) % R
            if not single:
                self.key_place_BT = torch.cat([self.key_place_BT, self.place_BS], 1)
        channels, device = config.qk_rope_head_dim, position_BS.device
        self._window_frequency = rotary_frequencies(channels, config.rope_theta, None, device)
        self._compressed_frequency = rotary_frequencies(channels, config.compress_rope_theta, config.rope_scaling, device)
        self.window_turn_BSC = self.turn(position_BS, compressed=False)
        self.compressed_turn_BSC = self.turn(position_BS, compressed=True)
        self.real_BS = step_S < count_B[:, None]
        self.blocks = {ratio: self._blocks(ratio, cached=cache is not None)
                       for ratio in sorted(config.ratios)}

    @cached_property
    def tokens(self) -> Tokens:
        """Every token as an entry of its own; a query sees its document's up to itself."""
        row_N, step_N = self.real_BS.nonzero(as_tuple=True)
        slot_N = self.place_BS[row_N, step_N]
        return Tokens(row_N, step_N, slot_N, self.place_BS - self.position_BS, (self.position_BS + 1).where(self.real_BS, 0),
                      int((self.start_B + self.count_B).max()))

    def turn(self, position: Tensor, compressed: bool) -> Tensor:
        """Rotary turns [..., C] in complex64 at integer positions, for compressed layers or window-only ones."""
        frequency = self._compressed_frequency if compressed else self._window_frequency
        angle = position[..., None].float() * frequency
        return torch.complex(angle.cos(), angle.sin())

    def _blocks(self, ratio: int, cached: bool) -> Blocks:
        B, S = self.position_BS.shape
        if cached and S == 1 and not self._ends(ratio):
            return self._no_blocks(ratio, max(start // ratio for start, _ in self._spans))
        ends_BS = ((self.position_BS + 1) % ratio == 0) & self.real_BS
        done_BS = (self.start_B // ratio)[:, None] + ends_BS.cumsum(1)  # blocks of the row up to and with each token
        count_BS = (self.position_BS + 1) // ratio
        row_N, end_N = ends_BS.nonzero(as_tuple=True)
        rows_R, place_N = row_N.unique(return_inverse=True) if cached else (None, row_N)
        if rows_R is not None and len(rows_R) == B:
            rows_R = None
        offset_R = torch.arange(1 - ratio, 1, device=row_N.device)
        position_N = self.position_BS[row_N, end_N] + 1 - ratio
        overlap = kind_of_ratio(ratio) == "csa"
        ring = (2 * ratio if overlap else ratio) if cached else 0

        def flat(step_NR: Tensor) -> Tensor:
            """Index into [R, J] of tokens at steps of this call; negative steps are still in the ring."""
            in_ring = (self.start_B[row_N, None] + step_NR) % max(ring, 1)
            return place_N[:, None] * (ring + S) + (ring + step_NR).where(step_NR >= 0, in_ring)

        step_NR = end_N[:, None] + offset_R
        entries = int(done_BS.max()) if cached else S // ratio
        return Blocks(row_N, done_BS[row_N, end_N] - 1, position_N, flat(step_NR),
                      flat(step_NR - ratio) if overlap else None, position_N >= ratio if overlap else None,
                      (done_BS - count_BS).clamp(min=0), count_BS.where(self.real_BS, 0), entries, rows_R)

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """Each row's start and count: of a few rows, numbers are asked sooner than tensors."""
        return list(zip(self.start_B.tolist(), self.count_B.tolist(), strict=True))

    def _ends(self, ratio: int) -> bool:
        """Whether one of the rows' single tokens completes a block."""
        return any((start + count) % ratio == 0 and count for start, count in self._spans)

    def _no_blocks(self, ratio: int, entries: int) -> Blocks:
        """As `_blocks` where a single token a row completes none, which are most decoded tokens; rows have so many `entries`."""
        none_N, none_NR = self.count_B.new_empty(0), self.count_B.new_empty(0, ratio)
        count_BS, overlap = self.place_BS // ratio, kind_of_ratio(ratio) == "csa"
        return Blocks(none_N, none_N, none_N, none_NR, none_NR if overlap else None, none_N.bool() if overlap else None,
                      torch.zeros_like(count_BS), count_BS * self.count_B[:, None], entries, none_N)
