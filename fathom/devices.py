"""The device that computes, by torch's name for it: the CPU, or an accelerator that this torch drives (CUDA, ROCm, XPU, Ascend, ...)."""

import torch

from fathom.errors import InputError


def use_device(name: str) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1"; "auto": the accelerator where there is one, else the CPU), from now on the
    current one of its kind; InputError where there is none.

    Triton launches on the current device, wherever the tensors are.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if kind else 0
    numbered = {f"{kind.type}:{index}": index for index in range(count)} if kind else {}
    if name == "cpu" or name == "auto" and kind is None:
        return torch.device("cpu")
    if kind and name in (kind.type, "auto"):
        return torch.device(kind.type, torch.accelerator.current_device_index())
    if name not in numbered:
        raise InputError(f"device is {name!r}; here are: {', '.join(['cpu', *numbered])}")
    torch.accelerator.set_device_index(numbered[name])
    return torch.device(name)


def finish() -> None:
    """Wait until the current accelerator, where there is one, has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
