"""A stand-in for a CUDA graph: it keeps every operator of a step with its tensors and plain numbers, and a replay runs the same operators on the same
memory, with no line of Python between them.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS_THE_DEVICE = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique_dim", "_unique2", "unique_consecutive",
                   "repeat_interleave", "lift_fresh"}


class Tape(TorchDispatchMode):
    """Records what a step does, as a CUDA graph would, and fails where it asks for a number, as recording would."""

    def __init__(self, kept=True):
        super().__init__()
        self.calls, self.kept = [], kept

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ASKS_THE_DEVICE or function._overloadname == "self_int", f"{function} asks the device"  # as many times each: it does not
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            assert not any(x is not None and x.dtype is torch.bool for x in args[1]), "an index by a mask asks the device for its size"
        out = function(*args, **(kwargs or {}))
        if self.kept:
            self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.inference_mode():
            for function, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
