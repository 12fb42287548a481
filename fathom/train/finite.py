"""Where the first number that is none came from: the layer whose output, or the parameter whose gradient, is not finite.

Looked for only after a step went wrong: the same step is computed once more, with every module watched.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fathom.model.transformer import Transformer


def find_not_finite(model: Transformer, again: Callable[[], object]) -> str:
    """Name the first layer that makes a number that is none. `again` computes the step's forward pass; the gradients of its
    backward pass still lie in the parameters. Gradients come from the end to the front: the last layer that has a bad one began.
    """
    bad = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if bad:
        return f"the parameter {bad[0]} (and {len(bad) - 1} more)" if len(bad) > 1 else f"the parameter {bad[0]}"
    found = _first_output(model, again)
    if found:
        return f"the output of {found}"
    gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None and not _finite(parameter.grad)]
    if gradients:
        return f"the gradient of {max(gradients, key=lambda name: _depth(model, name))}"
    return "the loss, or the sum of all gradients"


def _first_output(model: Transformer, again: Callable[[], object]) -> str | None:
    """The first module, innermost first, whose output is not finite while the step is computed again."""
    found: list[str] = []

    def watch(name: str) -> Callable:
        def look(module: torch.nn.Module, inputs: object, output: object) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                found.append(name)
        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _depth(model: Transformer, name: str) -> tuple[int, int]:
    """How late in the forward pass a parameter is read: MTP blocks and ends after the trunk, and blocks in order."""
    order = list(dict(model.named_parameters()))
    if name.startswith("embed."):
        return -1, 0
    part, number = name.split(".")[:2]
    return (int(number) if part == "blocks" else len(model.blocks)), order.index(name)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, tuple | list) else []


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
