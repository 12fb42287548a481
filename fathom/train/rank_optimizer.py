"""Muon on many ranks: every matrix is whole on one rank, which keeps its momentum and orthogonalises it (report 3.4.1).

Matrices go to ranks by their cost, the dearest first to the rank that has least to do. Stacked experts are cut, other matrices
never. Owners pass the new weights on. AdamW is cheap: every rank does it for the weights it has.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Matrices, Muon, Optimizer, parameter_groups
from fathom.train.parallel import expert_parameters, local, whole
from fathom.train.ranks import Group, Ranks


class Piece(NamedTuple):
    """Some whole matrices: rows `begin` to `end` along dim 0 of a parameter, of one part of the experts where those are sharded."""

    name: str
    begin: int
    end: int
    part: int | None
    owner: int
    key: str  # its own name, by which parameter_groups knows what it is


def assign(shapes: dict[str, tuple[int, ...]], sharded: set[str], holders: list[list[int]]) -> list[Piece]:
    """Cut parameters [.., n, m] into pieces and give each an owner among the ranks that hold it: all, or those of one part of the experts."""
    everyone = sorted(rank for ranks in holders for rank in ranks)
    wanted = []
    for name, shape in shapes.items():
        for part, candidates in enumerate(holders) if name in sharded else [(None, everyone)]:
            pieces = min(shape[0], len(candidates)) if len(shape) == 3 else 1
            borders = [shape[0] * index // pieces for index in range(pieces + 1)]
            for begin, end in zip(borders, borders[1:], strict=False):
                wanted.append((_cost(shape, end - begin), name, begin, end, part, candidates))
    load, plan = dict.fromkeys(everyone, 0), []
    for cost, name, begin, end, part, candidates in sorted(wanted, key=lambda piece: -piece[0]):  # stable: the same on every rank
        owner = min(candidates, key=lambda rank: (load[rank], rank))
        load[owner] += cost
        key = f"{name}[{begin}:{end}]" if len(shapes[name]) == 3 else name
        plan.append(Piece(name, begin, end, part, owner, key))
    return plan


def _cost(shape: tuple[int, ...], rows: int) -> int:
    """Of the Newton-Schulz steps of `rows` rows along dim 0: each product takes the smaller side twice and the larger once."""
    matrices, (n, m) = (rows, shape[1:]) if len(shape) == 3 else (1, shape)
    return matrices * min(n, m) ** 2 * max(n, m)


class RankOptimizer(Optimizer):
    """Optimizer over this rank's pieces. Its state, in files, is that of one process."""

    def __init__(self, model: Transformer, muon: Muon, adamw: AdamW, ranks: Ranks, by: Matrices = "muon"):
        self.ranks, self.decay = ranks, muon.weight_decay
        self.whole = dict(model.named_parameters())
        matrices, others = parameter_groups(self.whole.items(), model.config) if by == "muon" else ({}, list(self.whole))
        self.plan = assign({name: tuple(self.whole[name].shape) for name in matrices}, expert_parameters(model), ranks.holders)
        self.pieces = {piece: self._own(piece) for piece in self.plan if piece.owner == ranks.rank}
        super().__init__([*((piece.key, tensor) for piece, tensor in self.pieces.items()),
                          *((name, self.whole[name]) for name in others)], model.config, muon, adamw, by)

    def _own(self, piece: Piece) -> nn.Parameter:
        """What Muon updates: the weights themselves or, where they lie in parts on several ranks, zeros, which become the update."""
        parameter = self.whole[piece.name]
        if isinstance(parameter, DTensor):
            return nn.Parameter(torch.zeros(piece.end - piece.begin, *parameter.shape[1:], dtype=parameter.dtype, device=self.ranks.device))
        return nn.Parameter(parameter.detach()[piece.begin:piece.end])

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient, at this learning rate; all ranks together."""
        for name in dict.fromkeys(piece.name for piece in self.plan):
            grad = self.whole[name].grad
            full = None if grad is None else whole(grad)
            for piece, tensor in self.pieces.items():
                if piece.name == name:
                    tensor.grad = None if full is None else full[piece.begin:piece.end]
        super().step(rate)
        everyone = [piece for piece in self.plan if piece.part is None]
        experts = [piece for piece in self.plan if piece.part == self.ranks.expert_index]
        self._pass_on(everyone, self.ranks.world, rate)
        if experts:
            self._pass_on(experts, self.ranks.expert_holders, rate)

    def _pass_on(self, pieces: list[Piece], group: Group, rate: float) -> None:
        """Every owner's results to all ranks of the group, in one call for each owner."""
        pieces = [piece for piece in pieces if self.whole[piece.name].grad is not None]
        for owner in dist.get_process_group_ranks(group):
            given = [piece for piece in pieces if piece.owner == owner]
            if not given:
                continue
            sizes = [(piece.end - piece.begin) * self.whole[piece.name][0].numel() for piece in given]
            if owner == self.ranks.rank:
                flat = torch.cat([self.pieces[piece].detach().reshape(-1) for piece in given])
            else:
                flat = torch.empty(sum(sizes), dtype=self.whole[given[0].name].dtype, device=self.ranks.device)
            dist.broadcast(flat, owner, group=group)
            for piece, result in zip(given, flat.split(sizes), strict=True):
                self._take(piece, result, rate)

    def _take(self, piece: Piece, result: Tensor, rate: float) -> None:
        """Put an owner's result in its place."""
        parameter = self.whole[piece.name]
        result = result.view(piece.end - piece.begin, *parameter.shape[1:])
        if not isinstance(parameter, DTensor):
            if piece.owner != self.ranks.rank:
                parameter[piece.begin:piece.end] = result
            return
        shard = local(parameter)  # FSDP gives the first ranks ceil(rows / ranks) rows each
        each = -(-parameter.shape[0] // self.ranks.parallel.shard)
        first = each * self.ranks.mesh.get_local_rank("shard")
        begin, end = max(piece.begin, first), min(piece.end, first + len(shard))
        if begin < end:
            rows = shard[begin - first:end - first]
            rows.mul_(1 - rate * self.decay).add_(result[begin - piece.begin:end - piece.begin])
        if piece in self.pieces:
            self.pieces[piece].zero_()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        super().zero_grad()
        for parameter in self.whole.values():
            parameter.grad = None

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state, named as one process names it, on the first rank; all ranks must ask for it."""
        own, matrices = super().state_tensors(), {piece.name for piece in self.plan}
        state: dict[str, Tensor] = {}
        for name in self.whole:
            if name in matrices:
                parts = [self._momentum(piece, own) for piece in sorted(self.plan, key=lambda piece: (piece.part or 0, piece.begin))
                         if piece.name == name]
                if self.ranks.first:
                    state[f"{name}.momentum"] = torch.cat(parts).cpu()
            else:
                state |= {key: whole(own[key]).cpu() for key in (f"{name}.step", f"{name}.exp_avg", f"{name}.exp_avg_sq")}
        return state

    def _momentum(self, piece: Piece, own: dict[str, Tensor]) -> Tensor:
        """A piece's momentum on the first rank."""
        if piece.owner == self.ranks.rank:
            momentum = own[f"{piece.key}.momentum"]
            if not self.ranks.first:
                dist.send(momentum.contiguous(), 0)
            return momentum
        parameter = self.whole[piece.name]
        momentum = torch.empty(piece.end - piece.begin, *parameter.shape[1:], dtype=parameter.dtype, device=self.ranks.device)
        if self.ranks.first:
            dist.recv(momentum, piece.owner)
        return momentum

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take this rank's part of a whole state; CheckpointError as in Optimizer."""
        names, own, given = {f"{piece.name}.momentum" for piece in self.plan}, super().state_tensors(), {}
        for name, tensor in tensors.items():
            if name not in names:
                like = own.get(name)
                given[name] = tensor if not isinstance(like, DTensor) or like.shape != tensor.shape else distribute_tensor(
                    tensor.to(self.ranks.device), like.device_mesh, like.placements, src_data_rank=None)
        for piece in self.pieces:
            if f"{piece.name}.momentum" in tensors:
                before = (piece.part or 0) * self.whole[piece.name].shape[0]
                given[f"{piece.key}.momentum"] = tensors[f"{piece.name}.momentum"][before + piece.begin:before + piece.end]
        super().load_state_tensors(given)


def make_optimizer(model: Transformer, muon: Muon, adamw: AdamW, ranks: Ranks, matrices: Matrices = "muon") -> Optimizer:
    """The optimiser for one process or many."""
    if ranks.count == 1:
        return Optimizer(model.named_parameters(), model.config, muon, adamw, matrices)
    return RankOptimizer(model, muon, adamw, ranks, matrices)
