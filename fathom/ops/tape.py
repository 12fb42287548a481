"""A step of fixed shapes, recorded once and run again with none of the Python between its operators: what a CUDA graph is on a GPU.

Of a decoded token's time on a CPU, most is Python that finds out what to call (docs/performance.md).
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fathom.ops.native.library import listening

# Operators whose result, or its shape, the step looks at, or that bring numbers in: the next time they may be others. (`Tensor.tolist` is none of them.)
_ASKING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique_dim", "_unique2", "unique_consecutive",
           "repeat_interleave", "lift_fresh"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPYING = {"to", "_to_copy", "clone", "contiguous"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Unrecordable(RuntimeError):
    """What a step does depends on numbers that it looks at."""


class Tape(TorchDispatchMode):
    """Inside a block it records the operators and kernels of this thread; `replay` runs them again on the same memory.

    What the step makes is kept as long as the tape. Raises Unrecordable where the step asks for a number, or makes more than `most` bytes.
    """

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self._left = most
        self._calls: list[tuple[Callable, tuple, dict[str, Any]]] = []
        self._kept: list[Any] = []  # kernels know tensors by their places alone
        self._inside = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would load its compiler (a second, 150 MB) to keep it away from what no compiler comes near."""
        return False

    def __enter__(self) -> "Tape":
        self._inside.enter_context(listening(self._kernel))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._inside.close()

    def __torch_dispatch__(self, function: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in _ASKING and function._overloadname != "self_int" or name in _INDEXING and any(x is not None and x.dtype is torch.bool for x in args[1]):
            raise Unrecordable(f"{function} asks for a number")
        out = function(*args, **kwargs)
        self._kept.append((args, kwargs, out))
        self._operator(function, args, kwargs, out)
        if self._left < 0:
            raise Unrecordable("what a step makes is too large to be kept")
        return out

    def replay(self) -> None:
        """Run the step on what its inputs hold now; its results lie where they lay."""
        with torch.inference_mode():
            for function, args, kwargs in self._calls:
                function(*args, **kwargs)

    def _operator(self, function: OpOverload, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if function._schema.is_mutable:
            self._calls.append((function, args, kwargs))
            return
        made_here = [x for x in made if x.numel() and x.untyped_storage().data_ptr() not in read]  # others are views, which see what changes
        self._left -= sum(x.nbytes for x in made_here)
        if not made_here or function.overloadpacket.__name__ in _EMPTY:
            return
        if function.overloadpacket.__name__ in _COPYING:
            self._calls.append((Tensor.copy_, (made[0], args[0]), {}))
        elif len(made) == 1 and (writing := _writing(function)) is not None:
            self._calls.append((writing, args, {**kwargs, "out": made[0]}))
        else:
            self._calls.append((_again, (function, args, kwargs, made), {}))

    def _kernel(self, kernel: Callable, arguments: tuple, answer: int | None) -> None:
        self._calls.append((kernel, arguments, {}) if answer is None else (_answered, (kernel, arguments, answer), {}))


def _writing(function: OpOverload) -> OpOverload | None:
    """The form of an operator that writes its result into a given tensor, if there is one."""
    wanted = [(x.name, str(x.type)) for x in function._schema.arguments]
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        arguments = other._schema.arguments
        if [x.name for x in arguments if x.is_out] == ["out"] and [(x.name, str(x.type)) for x in arguments if not x.is_out] == wanted:
            return other
    return None


def _again(function: OpOverload, args: tuple, kwargs: dict[str, Any], made: list[Tensor]) -> None:
    found = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
    for old, new in zip(made, found, strict=True):
        old.copy_(new)


def _answered(kernel: Callable, arguments: tuple, answer: int) -> None:
    if kernel(*arguments) != answer:
        raise Unrecordable(f"{kernel.__name__} answers otherwise than when it was recorded")
