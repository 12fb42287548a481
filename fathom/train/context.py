"""Context parallelism: every rank has a part of every row, in the order of the ranks (report 3.4.3, two steps).

First each rank hands its last raw items to the next one: window keys, and what unfinished blocks still need. Then all gather the
entries that each has made. The model knows it as a cache, which it asks for what came before its tokens.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.config import ModelConfig, kind_of_ratio
from fathom.errors import RecipeError
from fathom.model.cache import Moves
from fathom.model.layout import Blocks, Layout
from fathom.model.transformer import Transformer
from fathom.train.ranks import Group, Ranks


class Made(NamedTuple):
    """Where the entries of one ratio come from and go: how many each rank makes, and the row and slot of all, rank after rank."""

    counts: list[int]
    row_N: Tensor
    slot_N: Tensor


class PartLayout(Layout):
    """The layout of this rank's part of whole rows: theirs, cut. `position_BS` are of the whole rows."""

    def __init__(self, config: ModelConfig, position_BS: Tensor, count_B: Tensor, ranks: Ranks):
        super().__init__(config, position_BS, count_B, None)
        S = _part_length(config, position_BS.shape[1], ranks.context_ranks)
        begin = ranks.context_index * S
        self.part = slice(begin, begin + S)
        self.key_place_BT = torch.arange(begin - config.sliding_window, begin + S, device=position_BS.device).expand(len(position_BS), -1)
        for name in ("position_BS", "place_BS", "reach_BS", "window_turn_BSC", "compressed_turn_BSC", "real_BS"):
            setattr(self, name, getattr(self, name)[:, self.part])
        self.moves = Moves(self.start_B, count_B, S)
        whole, self.blocks, self.made = self.blocks, {}, {}
        for ratio, blocks in whole.items():
            self.blocks[ratio], self.made[ratio] = self._cut(ratio, blocks, position_BS.shape[1], ranks)

    def _cut(self, ratio: int, blocks: Blocks, row_length: int, ranks: Ranks) -> tuple[Blocks, Made]:
        """The blocks that end in this part, and who makes which."""
        S, ring = self.part.stop - self.part.start, tail_size(ratio)
        maker_N = blocks.current_NR[:, -1] % row_length // S
        own_N = maker_N == ranks.context_index
        order_N = maker_N.argsort(stable=True)
        made = Made(maker_N.bincount(minlength=ranks.context_ranks).tolist(), blocks.row_N[order_N], blocks.slot_N[order_N])

        def near(index_NR: Tensor | None) -> Tensor | None:
            """Flat indices into [B, ring + S] of those into the whole rows; a first block has nothing before it."""
            if index_NR is None:
                return None
            place_NR = index_NR[own_N] % row_length - self.part.start + ring
            return blocks.row_N[own_N, None] * (ring + S) + place_NR.clamp(min=0)

        return Blocks(blocks.row_N[own_N], blocks.slot_N[own_N], blocks.position_N[own_N], near(blocks.current_NR), near(blocks.previous_NR),
                      None if blocks.has_previous_N is None else blocks.has_previous_N[own_N],
                      blocks.first_BS[:, self.part], blocks.count_BS[:, self.part], blocks.entries), made


def tail_size(ratio: int) -> int:
    """Raw tokens before its own that a compressor may need: of the block that it finishes and, with overlap, of the one before."""
    return 2 * ratio if kind_of_ratio(ratio) == "csa" else ratio


def _part_length(config: ModelConfig, length: int, ranks: int) -> int:
    needed = max([config.sliding_window, *(tail_size(ratio) for ratio in config.compress_ratios if ratio)])
    if length % ranks or length // ranks < needed:
        raise RecipeError(f"sequences of {length} tokens do not part among {ranks} context ranks: each part must have the same length, "
                          f"of at least {needed} (the window, or the tokens of a block); lower parallel.context or lengthen sequences")
    return length // ranks


class _FromBefore(torch.autograd.Function):
    """The last `size` items of the rank before, zeros on the first, in front of this rank's [B, S, C] -> [B, size + S, C]."""

    @staticmethod
    def forward(ctx, own_BSC: Tensor, size: int, group: Group) -> Tensor:
        ctx.size, ctx.group = size, group
        before_BRC = own_BSC.new_zeros(own_BSC.shape[0], size, own_BSC.shape[2])
        _pass(own_BSC[:, own_BSC.shape[1] - size:].contiguous(), before_BRC, 1, group)
        return torch.cat([before_BRC, own_BSC], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BJC: Tensor) -> tuple[Tensor | None, ...]:
        after_BRC = grad_BJC.new_zeros(grad_BJC.shape[0], ctx.size, grad_BJC.shape[2])
        _pass(grad_BJC[:, :ctx.size].contiguous(), after_BRC, -1, ctx.group)
        grad_BSC = grad_BJC[:, ctx.size:].clone()
        grad_BSC[:, grad_BSC.shape[1] - ctx.size:] += after_BRC
        return grad_BSC, None, None


def _pass(sent: Tensor, received: Tensor, step: int, group: Group) -> None:
    """Send to the rank `step` further in the group and receive from the one `step` before; nothing beyond the ends."""
    members = dist.get_process_group_ranks(group)
    index = members.index(dist.get_rank())
    ends = [(dist.isend, sent, index + step), (dist.irecv, received, index - step)]
    calls = [dist.P2POp(call, tensor, members[peer], group) for call, tensor, peer in ends if 0 <= peer < len(members)]
    for work in dist.batch_isend_irecv(calls):
        work.wait()


class _Gather(torch.autograd.Function):
    """All ranks' entries [sum of counts, D], rank after rank."""

    @staticmethod
    def forward(ctx, own_ND: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group, most = counts, group, max(counts)
        if not most:
            return own_ND.clone()
        padded = torch.cat([own_ND, own_ND.new_zeros(most - len(own_ND), own_ND.shape[1])])
        all_RMD = own_ND.new_empty(len(counts), most, own_ND.shape[1])
        dist.all_gather(list(all_RMD), padded, group=group)
        return torch.cat([part[:count] for part, count in zip(all_RMD, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND = grad_ND.contiguous().clone()
        if len(grad_ND):
            dist.all_reduce(grad_ND, group=ctx.group)
        return grad_ND.split(ctx.counts)[dist.get_rank(ctx.group)], None, None


class _Before:
    """In the place of a Ring: the last items of the rank before."""

    def __init__(self, size: int, group: Group):
        self.size, self.group = size, group

    def extend(self, new_BSC: Tensor, moves: Moves, rows_R: Tensor | None = None, slots: int | None = None) -> Tensor:
        """The rank before's last items followed by the new ones [B, R + S, C]."""
        return _FromBefore.apply(new_BSC, self.size, self.group)


class _Gathered:
    """In the place of a Stream: the entries of all ranks."""

    def __init__(self, ratio: int, layout: PartLayout, group: Group):
        self.made, self.group, self.rows = layout.made[ratio], group, len(layout.start_B)
        self.tail = _Before(tail_size(ratio), group)
        self.own_ND: Tensor | None = None

    def put(self, row_N: Tensor, slot_N: Tensor, entries_ND: Tensor) -> None:
        """Hand in this rank's entries."""
        self.own_ND = entries_ND

    def read(self, count: int, selected_BSK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every rank's entries [B, M, D], and the selection as it is."""
        all_ND, self.own_ND = _Gather.apply(self.own_ND, self.made.counts, self.group), None
        empty_BMD = all_ND.new_zeros(self.rows, count, all_ND.shape[1])
        return empty_BMD.index_put((self.made.row_N, self.made.slot_N), all_ND), selected_BSK


class _PartLayer:
    """In the place of a LayerCache."""

    def __init__(self, config: ModelConfig, layer: int, layout: PartLayout, group: Group):
        ratio = config.ratio(layer)
        self.window = _Before(config.sliding_window, group)
        self.entries = _Gathered(ratio, layout, group) if ratio else None
        self.keys = _Gathered(ratio, layout, group) if config.kind(layer) == "csa" else None


class PartCache:
    """In the place of a Cache for a training step: one layer for each block and MTP block."""

    def __init__(self, config: ModelConfig, layout: PartLayout, ranks: Ranks):
        self.layers = [_PartLayer(config, layer, layout, ranks.context_group)
                       for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers)]


class PartBalance:
    """The sequence balance loss of rows whose tokens lie on several ranks; each rank's result is its part of the sum."""

    def __init__(self, group: Group):
        self.group = group

    def __call__(self, score_BSE: Tensor, chosen_BSK: Tensor, counted_BS: Tensor) -> Tensor:
        """As ops.sequence_balance, with the choices and numbers of tokens of whole rows."""
        E, K = score_BSE.shape[-1], chosen_BSK.shape[-1]
        counted_BS1 = counted_BS[..., None].to(score_BSE.dtype)
        chosen_BE = torch.zeros_like(score_BSE[:, 0]).scatter_add(
            1, chosen_BSK.flatten(1), counted_BS1.expand_as(chosen_BSK).flatten(1)).detach()
        whole = torch.cat([chosen_BE, counted_BS1.sum(1)], 1)
        dist.all_reduce(whole, group=self.group)
        tokens_B1 = whole[:, E:].clamp(min=1)
        share_BSE = score_BSE / score_BSE.sum(-1, keepdim=True)
        mean_share_BE = (share_BSE * counted_BS1).sum(1) / tokens_B1
        return (whole[:, :E] * E / (K * tokens_B1) * mean_share_BE).sum(-1).mean()


def balance_over(model: Transformer, group: Group) -> None:
    """Let every MoE layer count its balance loss over whole rows."""
    for block in [*model.blocks, *model.mtp]:
        block.moe.balance = PartBalance(group)
