"""Which tensor is stored in which format, in each of the four layouts, and the way from any of them to any other.

official-fp4 is the chat models' (experts FP4, other products FP8), official-fp8 the base models' (all products FP8, float32 scales),
bf16 and fp32 are plain. Hyper-connections, sinks, position and router biases are float32 in all of them.
"""

import dataclasses
import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.checkpoint.names import places, released_name, scale_of
from fathom.config import ModelConfig, QuantizationConfig
from fathom.errors import CheckpointError
from fathom.model.attention import Attention
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from fathom.ops.rounding import Rounding
from fathom.quant.formats import (
    E4M3,
    E8M0,
    FP4_BLOCK,
    TILE,
    Packed,
    fp4_to_fp8,
    quantise_fp4,
    quantise_fp8,
)

Layout = Literal["official-fp4", "official-fp8", "bf16", "fp32"]
LAYOUTS: tuple[Layout, ...] = ("official-fp4", "official-fp8", "bf16", "fp32")
Weight = Tensor | Packed

FLOAT32 = re.compile(r"(hc_\w+|ape|attn_sink|gate\.bias)$")
_EXPERT = re.compile(r"\.experts\.\d+\.w[123]\.weight$")
_PRODUCT = re.compile(
    r"\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|shared_experts\.w[123]|[eh]_proj)\.weight$")
_EXACT_INPUTS = re.compile(r"\.wo_a\.weight$")  # the released code dequantises it and does not round what it multiplies


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def packed_shapes(shape: tuple[int, ...], fp4: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scale of a quantised matrix [O, I]."""
    rows, columns = shape
    if fp4:
        return (rows, columns // 2), (rows, -(-columns // FP4_BLOCK))
    return (rows, columns), (-(-rows // TILE), -(-columns // TILE))


def is_quantised(name: str, layout: Layout) -> bool:
    """Whether the layout stores this tensor in FP8 or FP4."""
    return layout.startswith("official") and bool(_EXPERT.search(name) or _PRODUCT.search(name))


def stored_parts(name: str, shape: tuple[int, ...], layout: Layout, integer: bool = False) -> dict[str, Stored]:
    """What the layout writes for the tensor `name` of this shape: itself, or codes and a scale."""
    if is_quantised(name, layout):
        fp4 = layout == "official-fp4" and bool(_EXPERT.search(name))
        codes, scale = packed_shapes(shape, fp4)
        return {name: Stored(torch.int8 if fp4 else E4M3, codes),
                scale_of(name): Stored(E8M0 if layout == "official-fp4" else torch.float32, scale)}
    wide = layout == "fp32" or FLOAT32.search(name)
    return {name: Stored(torch.int64 if integer else torch.float32 if wide else torch.bfloat16, shape)}


def stored_tensors(config: ModelConfig, layout: Layout, own_mtp_ends: bool = False) -> dict[str, Stored]:
    """Every tensor that a model of this shape has on disk, nothing of it allocated."""
    model = meta_model(config, set(range(config.num_nextn_predict_layers)) if own_mtp_ends else set())
    return {part: stored for name, place in places(model).items()
            for part, stored in stored_parts(name, place.shape, layout, not place.tensor.is_floating_point()).items()}


def meta_model(config: ModelConfig, own_mtp_ends: set[int]) -> Transformer:
    """A model of this shape, nothing of it allocated; `own_mtp_ends`: the MTP blocks with an embedding and a head of their own."""
    with torch.device("meta"):
        model = Transformer(config)
        for depth in own_mtp_ends & set(range(len(model.mtp))):
            model.mtp[depth].own_ends(config)
    return model


def config_for(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The config with the fields that tell a reader how the weights are stored."""
    official = layout.startswith("official")
    return dataclasses.replace(
        config, expert_dtype=layout.removeprefix("official-") if official else None,
        quantization_config=QuantizationConfig() if official else None,
        torch_dtype="float32" if layout == "fp32" else "bfloat16")


def encode(name: str, weight: Weight, layout: Layout) -> dict[str, Tensor]:
    """The tensors that the layout writes for `weight` [O, I], or a tensor that is never quantised.

    Codes are kept wherever the format allows, and FP4 becomes FP8 exactly or not at all: CheckpointError where it cannot.
    """
    if not is_quantised(name, layout):
        (stored,) = stored_parts(name, tuple(weight.shape), layout, _is_integer(weight)).values()
        return {name: ops.dense(weight, stored.dtype) if isinstance(weight, Packed) else weight.to(stored.dtype)}
    packed = quantised(name, weight, layout)
    return {name: packed.codes, scale_of(name): packed.scale}


def quantised(name: str, weight: Weight, layout: Layout) -> Packed:
    """`weight` [..., O, I] in the format that an official layout stores `name` in."""
    if layout == "official-fp4" and _EXPERT.search(name):
        if weight.shape[-1] % 2:
            raise CheckpointError(f"{name} has {weight.shape[-1]} inputs; FP4 is stored in pairs and needs an even number: "
                                  "use official-fp8, bf16 or fp32")
        if isinstance(weight, Packed) and weight.is_fp4:
            return weight
        return quantise_fp4(_plain(weight))
    scale_dtype = E8M0 if layout == "official-fp4" else torch.float32
    if isinstance(weight, Packed) and weight.is_fp4:
        packed, inexact = fp4_to_fp8(weight, scale_dtype)
        if inexact.any():
            raise CheckpointError(
                f"{name}: {int(inexact.sum())} of {inexact.numel()} tiles of 128 x 128 span scales too far apart for FP8 (the first "
                f"at {inexact.nonzero()[0].tolist()}); convert to bf16, and that to FP8 if rounding will do")
        return packed
    if isinstance(weight, Packed):
        scale = weight.scale.to(scale_dtype)
        if torch.equal(scale.float(), weight.scale.float()):
            return Packed(weight.codes, scale)
    return quantise_fp8(_plain(weight), scale_dtype)


@torch.no_grad()
def rounded_weights(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Each of our parameters by name, as it would come back from a file of this layout, in its own dtype."""
    rounded = {}
    for name, parameter in model.named_parameters():
        released = released_name(name).replace("*", "0")
        if is_quantised(released, layout):
            rounded[name] = ops.dense(quantised(released, parameter, layout), parameter.dtype)
        else:
            (stored,) = stored_parts(released, tuple(parameter.shape), layout).values()
            rounded[name] = parameter.to(stored.dtype).to(parameter.dtype)
    return rounded


def use_rounding(model: Transformer, rounding: Rounding, quantised_names: set[str]) -> None:
    """Hand one rounding object to every part that rounds: attention, and the products whose weights are named."""
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.rounding = rounding
        elif isinstance(module, Experts):
            if released_name(f"{name}.gate").replace("*", "0") in quantised_names:
                module.rounding = rounding
        elif isinstance(module, Linear):
            weight = released_name(f"{name}.weight")
            if weight in quantised_names and not _EXACT_INPUTS.search(weight):
                module.rounding = rounding


def quantised_in(model: nn.Module, layout: Layout) -> set[str]:
    """The released names of all weights that the layout stores in FP8 or FP4."""
    return {name for name in places(model) if is_quantised(name, layout)}


def _plain(weight: Weight) -> Tensor:
    return ops.dense(weight, torch.float32) if isinstance(weight, Packed) else weight


def _is_integer(weight: Weight) -> bool:
    return not isinstance(weight, Packed) and not weight.is_floating_point()
