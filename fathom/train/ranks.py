"""The processes of a run: how they begin, add up, leave work to the first one, fail and part. Knows no model.

torchrun starts them and says through the environment who is who; alone, one process is all ranks. A rank has a place in four
directions: `data` and `shard` (of the weights) and `expert` take rows of a batch each, `context` a part of every row.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fathom.devices import use_device
from fathom.errors import FathomError, RecipeError

Group = dist.ProcessGroup
AXES = ("data", "shard", "expert", "context")
PARTING_SECONDS = 30
DAY = timedelta(days=1)
# How gloo and NCCL say that another process is gone or silent; their errors have no type of their own.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|TCPStore", re.IGNORECASE)


@dataclass(frozen=True)
class Parallel:
    """How a step is spread; it changes no result beyond rounding, so a run may be resumed with other numbers.

    `data` ranks (times `shard` times `expert`) take rows of the batch; `shard` ranks share weights, gradients and optimiser state
    (FSDP2); `expert` ranks share the routed experts; `context` ranks take a part of every row each. Their product is the number of
    processes. Each rank cuts its rows into `accumulate` micro-batches. `timeout`: seconds without an answer after which another process
    counts as lost.
    """

    data: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    accumulate: int = 1
    timeout: float = 600.0

    def __post_init__(self):
        for name in (*AXES, "accumulate"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if self.timeout <= 0:
            raise RecipeError(f"timeout is {self.timeout}; allowed: above 0 seconds")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks along each of AXES."""
        return tuple(getattr(self, name) for name in AXES)


LOST_ANOTHER = "lost another process of the run"  # in the last words of a rank that is not to blame


class RankLost(FathomError):
    """Another process of the run has ended or does not answer."""


class Nobody:
    """Answers every call with nothing: what the first rank's tracker is on the others."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None

    def __enter__(self) -> "Nobody":
        return self

    def __exit__(self, *error: object) -> None:
        return None


class Ranks:
    """One process alone. `Processes` is many of them; whoever uses this need not ask which."""

    rank, count, first = 0, 1, True
    batch_index, batch_ranks, context_index, context_ranks, expert_index, expert_ranks = 0, 1, 0, 1, 0, 1

    def __init__(self, parallel: Parallel, device: torch.device = torch.device("cpu")):
        self.parallel, self.device = parallel, device

    @property
    def one_pass(self) -> bool:
        """Whether one process computes a whole step in one forward pass."""
        return self.count == 1 and self.parallel.accumulate == 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`."""
        return x

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return flag

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        return value

    def lead(self, work: Callable[[], object], patient: bool = False) -> None:
        """Let the first rank do this while the others wait; where it fails with a FathomError, all do. `patient`: for up to a day."""
        work()

    def together(self, error: FathomError) -> FathomError:
        """Mark an error that every rank meets at the same point, so that only the first one says it."""
        return error

    def orphaned(self) -> bool:
        """Whether the launcher has gone without a signal."""
        return False


ALONE = Ranks(Parallel())


class Processes(Ranks):
    """This process as one of many, that `connect` has brought together."""

    def __init__(self, parallel: Parallel, device: torch.device = torch.device("cpu")):
        super().__init__(parallel, device)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.first, self.parent = self.rank == 0, os.getppid()
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, parallel.sizes, mesh_dim_names=AXES)
        place = dict(zip(AXES, self.mesh.get_coordinate(), strict=True))
        self.context_index, self.context_ranks = place["context"], parallel.context
        self.expert_index, self.expert_ranks = place["expert"], parallel.expert
        self.batch_ranks = parallel.data * parallel.shard * parallel.expert
        self.batch_index = (place["data"] * parallel.shard + place["shard"]) * parallel.expert + place["expert"]
        self.world: Group = dist.group.WORLD
        self.expert_group: Group = self.mesh.get_group("expert")
        self.context_group: Group = self.mesh.get_group("context")
        # Ranks that hold the same weights: of what all share, and of one part of the experts.
        grid = torch.arange(self.count).view(parallel.sizes)
        self.holders = grid.movedim(2, 0).flatten(1).tolist()  # by part of the experts
        self.expert_holders: Group = self._group(self.holders)
        if parallel.shard == 1:
            self.same_dense, self.same_experts = self.world, self.expert_holders
        else:  # FSDP itself adds up over data and shard
            self.same_dense, self.same_experts = self._group(grid.flatten(0, 1).flatten(1).tolist()), self.context_group
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=parallel.timeout))
        self.waiting = dist.new_group(backend="gloo", timeout=DAY)

    def _group(self, lists: list[list[int]]) -> Group:
        """The group that this rank is in, of these that together are all ranks."""
        groups = [dist.new_group(ranks) for ranks in lists]
        return groups[next(index for index, ranks in enumerate(lists) if self.rank in ranks)]

    def sum(self, x: Tensor) -> Tensor:
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(int(flag))))

    def largest(self, value: float) -> float:
        top = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.control)
        return float(top)

    def lead(self, work: Callable[[], object], patient: bool = False) -> None:
        failure = None
        if self.first:
            try:
                work()
            except FathomError as error:
                failure = error
        told = [None if failure is None else str(failure)]
        dist.broadcast_object_list(told, src=0, group=self.waiting if patient else self.control)
        if told[0] is not None:
            raise self.together(failure or FathomError(told[0])) from failure

    def together(self, error: FathomError) -> FathomError:
        error.shared, error.told = True, not self.first
        return error

    def orphaned(self) -> bool:
        return os.getppid() != self.parent

    def part(self) -> None:
        """Wait until every rank is done, so that none pulls the connections from under another."""
        with suppress(RuntimeError):
            dist.monitored_barrier(self.control, timeout=timedelta(seconds=PARTING_SECONDS))
        dist.destroy_process_group()


def connect(timeout: float, device: torch.device = torch.device("cpu")) -> None:
    """Find the other processes, over what this kind of device speaks (NCCL for CUDA, gloo for the CPU). `timeout` in seconds."""
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=timedelta(seconds=timeout))


def _own_device(name: str) -> torch.device:
    """Of a kind of device, the one that is this rank's on its machine."""
    device = use_device(name)
    return device if device.type == "cpu" or ":" in name else use_device(f"{device.type}:{os.environ.get('LOCAL_RANK', '0')}")


@contextmanager
def join(parallel: Parallel, device: str = "cpu") -> Iterator[Ranks]:
    """Inside, this process is one of the run's ranks, on a device: of many that are named by their kind, on its own.

    InputError where there is no such device, RecipeError where `parallel` does not multiply to the number of processes; RankLost, within `timeout`, where another one is lost.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    _check(parallel, count)
    if count == 1:
        yield Ranks(parallel, use_device(device))
        return
    ranks = None
    try:
        own = _own_device(device)
        connect(parallel.timeout, own)
        ranks = Processes(parallel, own)
        yield ranks
        ranks.part()
    except (KeyboardInterrupt, FathomError) as end:
        if ranks is not None and getattr(end, "shared", False):
            ranks.part()
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise RankLost(f"rank {os.environ.get('RANK', '?')} of {count} {LOST_ANOTHER}: it ended, or did not answer for "
                       f"{parallel.timeout:g} s; checkpoints are whole, start all ranks again with --resume ({_reason(error)})") from error


def _check(parallel: Parallel, count: int) -> None:
    product = torch.Size(parallel.sizes).numel()
    if product != count:
        sizes = " x ".join(f"{name} {size}" for name, size in zip(AXES, parallel.sizes, strict=True))
        raise RecipeError(f"parallel: {sizes} = {product}, but this run has {count} process{'es' if count > 1 else ''}; start it with "
                          f"torchrun --nproc-per-node {product} -m fathom.cli train RECIPE, or change [parallel]")


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:160]
