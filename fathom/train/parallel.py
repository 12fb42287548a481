"""Parallelism applied to a model from outside, and what goes with it: adding up gradients, their norm, the whole model again.

Data parallelism needs nothing but the sum of gradients. That sum is made here, not by DistributedDataParallel, which averages and
wraps one forward call, where a step has several and a loss that is normalised over all of them.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fathom.checkpoint.layouts import meta_model
from fathom.errors import RecipeError
from fathom.model.transformer import Transformer
from fathom.train.context import balance_over
from fathom.train.experts import ShardedExperts
from fathom.train.ranks import Group, Ranks

BUCKET = 1 << 24  # numbers that are added up in one call


def parallelise(model: Transformer, ranks: Ranks) -> Transformer:
    """Give this rank its part of a whole model, which every rank has made or loaded alike; changes and returns it.

    RecipeError where the experts do not divide by the expert ranks, or an attention needs whole rows.
    """
    model.to(ranks.device)
    if ranks.expert_ranks > 1:
        _shard_experts(model, ranks)
    if ranks.context_ranks > 1:
        if model.config.attention != "v4":
            raise ranks.together(RecipeError(f"attention {model.config.attention!r} reads whole rows; set parallel.context = 1"))
        balance_over(model, ranks.context_group)
    if ranks.parallel.shard > 1:
        _shard_weights(model, ranks)
    return model


def _shard_experts(model: Transformer, ranks: Ranks) -> None:
    if model.config.n_routed_experts % ranks.expert_ranks:
        raise ranks.together(RecipeError(f"parallel: {model.config.n_routed_experts} experts do not divide among {ranks.expert_ranks} "
                                         "expert ranks; choose a divisor for parallel.expert"))
    for block in [*model.blocks, *model.mtp]:
        block.moe.experts = ShardedExperts(block.moe.experts, ranks.expert_index, ranks.expert_ranks, ranks.expert_group)


def _shard_weights(model: Transformer, ranks: Ranks) -> None:
    """FSDP2, replicated over `data` and sharded over `shard`; each block gathers its weights when it runs. Gradients are sums."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # the model changes nothing in place
    mesh = ranks.mesh["data", "shard"] if ranks.parallel.data > 1 else ranks.mesh["shard"]
    for block in [*model.blocks, *model.mtp]:
        fully_shard(block, mesh=mesh)
    for block in model.mtp:
        register_fsdp_forward_method(block, "predict")
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "features")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def expert_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of which this rank holds some experts only."""
    return {f"{prefix}.{name}" for prefix, module in model.named_modules() if isinstance(module, ShardedExperts)
            for name, _ in module.named_parameters()}


def local(x: Tensor) -> Tensor:
    """The numbers of a parameter or gradient that lie on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A parameter, gradient or state with all that FSDP gave to other ranks; all of these must ask for it."""
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


@torch.no_grad()
def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Let every `grad` be the sum over all ranks. A parameter without one on some ranks counts as zero there."""
    if ranks.count == 1:
        return
    parameters = dict(model.named_parameters())
    present = ranks.sum(torch.tensor([parameter.grad is not None for parameter in parameters.values()], dtype=torch.int32))
    sharded, dense, experts = expert_parameters(model), [], []
    for (name, parameter), ranks_with in zip(parameters.items(), present.tolist(), strict=True):
        if ranks_with:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            (experts if name in sharded else dense).append(local(parameter.grad))
    _all_reduce(dense, ranks.same_dense)
    _all_reduce(experts, ranks.same_experts)


def _all_reduce(tensors: list[Tensor], group: Group) -> None:
    """Sum in place, many small tensors in one call; each dtype and order is the same on every rank."""
    if dist.get_world_size(group) == 1:
        return
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if sum(map(torch.numel, bucket)) >= BUCKET or index == len(tensors) - 1:
            flat = torch.cat([x.reshape(-1) for x in bucket])
            dist.all_reduce(flat, group=group)
            for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(total.view_as(x))
            bucket = []


@torch.no_grad()
def gradient_norm(model: nn.Module, ranks: Ranks) -> Tensor:
    """The norm of all gradients together, a scalar."""
    if ranks.parallel.expert == ranks.parallel.shard == 1:  # every rank has all gradients
        return nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    sharded = expert_parameters(model)
    squares = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:  # added up over all ranks, each square counts once
            copies = ranks.count // (ranks.parallel.shard * (ranks.expert_ranks if name in sharded else 1))
            squares += local(parameter.grad).double().square().sum() / copies
    return ranks.sum(squares).sqrt()


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale all gradients, whose norm is given, down together to a norm of at most `limit`."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            local(parameter.grad).mul_(scale.to(parameter.grad.dtype))


@torch.no_grad()
def whole_model(model: Transformer, ranks: Ranks) -> Transformer:
    """The model with all its weights, on the first rank; what the others get is of no use. All ranks must call it."""
    if ranks.parallel.expert == ranks.parallel.shard == 1:
        return model
    full = meta_model(model.config, {depth for depth, block in enumerate(model.mtp) if block.embed is not None})
    sharded = expert_parameters(model)
    for name, parameter in model.named_parameters():
        tensor = whole(parameter)
        if name in sharded:
            tensor = _all_experts(tensor, ranks)
        _put(full, name, nn.Parameter(tensor.cpu(), requires_grad=False))
    for name, buffer in model.named_buffers():
        _put(full, name, buffer.cpu())
    return full


@torch.no_grad()
def take_weights(model: Transformer, source: Transformer, ranks: Ranks) -> None:
    """Set the model's weights and buffers to this rank's part of a whole model's, such as a checkpoint's."""
    given, sharded = source.state_dict(), expert_parameters(model)
    for name, tensor in model.state_dict().items():
        new = given[name].to(tensor.device)
        if name in sharded:
            new = new[ranks.expert_index * len(tensor):][:len(tensor)]
        if isinstance(tensor, DTensor):
            new = distribute_tensor(new, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(new)


def _all_experts(part_EOI: Tensor, ranks: Ranks) -> Tensor:
    """All experts [all E, O, I] on the first rank, from one holder of each part."""
    if not ranks.first:
        if ranks.rank in [holders[0] for holders in ranks.holders]:
            dist.send(part_EOI.contiguous(), 0)
        return part_EOI
    parts = [part_EOI]
    for holders in ranks.holders[1:]:
        parts.append(torch.empty_like(part_EOI))
        dist.recv(parts[-1], holders[0])
    return torch.cat(parts)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    (module._parameters if isinstance(tensor, nn.Parameter) else module._buffers)[leaf] = tensor
