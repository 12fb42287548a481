"""The weights of a folder in the released layout: plain tensors, or FP8 and FP4 codes with their scales, checked as they are read.

FP8 and FP4 are recognised by the tensors' own dtypes, because older configs say nothing about them.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.layouts import Weight, packed_shapes
from fathom.checkpoint.names import OWN_MTP_EMBEDDING, Place, scale_of
from fathom.checkpoint.shards import DTYPE_NAMES, Shards
from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.quant.formats import E4M3, E8M0, Packed

_SCALE_DTYPES = (E8M0, torch.float32)
_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAMED_PROBLEMS = 20  # in one line; a folder of another model has thousands


class Weights:
    """A folder's config, and its weights by released name. Raises ConfigError or CheckpointError where it cannot be read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder with config.json and *.safetensors")
        self.config = ModelConfig.load(self.folder)
        self.shards = Shards(self.folder)
        self.stored = self.shards.stored
        self.quantised = {name for name, stored in self.stored.items() if name.endswith(".weight")
                          and stored.dtype in (E4M3, torch.int8) and len(stored.shape) == 2}
        scales = {scale_of(name) for name in self.quantised}
        self.names = [name for name in self.stored if name not in scales]
        self.own_mtp_ends = {int(match[1]) for name in self.names if (match := OWN_MTP_EMBEDDING.match(name))}

    def is_fp4(self, name: str) -> bool:
        """Whether a quantised weight is FP4."""
        return self.stored[name].dtype == torch.int8

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight; two FP4 values lie in one byte."""
        shape = self.stored[name].shape
        return (shape[0], shape[1] * 2) if name in self.quantised and self.is_fp4(name) else shape

    def check(self, expected: dict[str, Place]) -> None:
        """CheckpointError, in one line, for everything that is missing, unexpected, misshapen or of a wrong dtype."""
        problems = [f"missing {name}" for name in expected if name not in self.stored]
        problems += [f"unexpected {name}" for name in self.names if name not in expected]
        for name in self.names:
            if name in expected:
                problems += self._problems(name, expected[name])
        if problems:
            more = f"; and {len(problems) - _NAMED_PROBLEMS} more" if len(problems) > _NAMED_PROBLEMS else ""
            raise CheckpointError(f"{self.folder} does not fit its config.json: "
                                  + "; ".join(problems[:_NAMED_PROBLEMS]) + more)

    def _problems(self, name: str, place: Place) -> Iterator[str]:
        stored, shape = self.stored[name], self.shape(name)
        if shape != place.shape:
            yield f"{name} has shape {list(shape)}, the config asks for {list(place.shape)}"
        elif name in self.quantised:
            scale = self.stored.get(scale_of(name))
            _, scale_shape = packed_shapes(shape, self.is_fp4(name))
            if scale is None:
                yield f"missing {scale_of(name)}"
            elif scale.shape != scale_shape:
                yield (f"{scale_of(name)} has shape {list(scale.shape)}, the weight's {list(shape)} in "
                       f"{'FP4' if self.is_fp4(name) else 'FP8'} asks for {list(scale_shape)}")
            elif scale.dtype not in _SCALE_DTYPES:
                yield f"{scale_of(name)} has dtype {DTYPE_NAMES[scale.dtype]}; allowed: F8_E8M0, F32"
        elif stored.dtype not in (_FLOATS if place.tensor.is_floating_point() else _INTEGERS):
            yield f"{name} has dtype {DTYPE_NAMES[stored.dtype]}"

    def read(self, name: str) -> Weight:
        """One weight. CheckpointError where it holds a number that is none, or a scale that is no scale."""
        tensor = self.shards.read(name)
        if name not in self.quantised:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise self._damaged(name, "a value that is no finite number")
            return tensor
        scale = self.shards.read(scale_of(name))
        if _has_bad_scale(scale):
            raise self._damaged(scale_of(name), "a scale that is no finite number above 0")
        if tensor.dtype == E4M3 and (tensor.view(torch.uint8) & 127 == 127).any():
            raise self._damaged(name, "an FP8 code that is no number")
        return Packed(tensor, scale)

    def _damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / self.shards.file_of[name]} is damaged: {name} holds {what}")


def _has_bad_scale(scale: Tensor) -> bool:
    if scale.dtype == E8M0:
        return bool((scale.view(torch.uint8) == 255).any())
    return not bool((torch.isfinite(scale) & (scale > 0)).all())
