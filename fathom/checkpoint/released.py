"""Models <-> folders in the released layout: config.json beside safetensors files with DeepSeek's tensor names.

Tensors are read one at a time into a model allocated once, and written shard by shard into a folder that appears only when it is
complete. FP8 and FP4 weights are dequantised on the way, or kept as they are.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fathom import ops
from fathom.checkpoint.layouts import (
    FLOAT32,
    Layout,
    Stored,
    config_for,
    encode,
    meta_model,
    packed_shapes,
    stored_parts,
    use_rounding,
)
from fathom.checkpoint.names import Place, places, released_name, scale_of
from fathom.checkpoint.shards import plan_shards, shard_names, write_index, write_shard
from fathom.checkpoint.weights import Weights
from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.files import new_folder
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from fathom.ops.rounding import ReleasedRounding
from fathom.quant.formats import E4M3, E8M0, Packed

SHARD_BYTES = 2 << 30
_PACKED_DTYPES = (E4M3, E8M0, torch.int8)


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *,
               packed: bool = False, simulate_quantization: bool = False,
               progress: Callable[[int, int], None] | None = None) -> Transformer:
    """Read a folder in the released layout (config.json + *.safetensors) into a model in eval mode.

    Weights are cast to `dtype`; hyper-connections, sinks, position biases and router biases stay float32. FP8 and FP4 weights are
    dequantised, exactly in float32 and bfloat16; with `packed` they stay as stored and are dequantised where they are used, and
    `dtype` is that of everything else. `simulate_quantization` rounds as the released inference code does: keys, entries, the
    indexer's vectors, and the inputs of products whose weights are stored in FP8 or FP4. `progress` gets tensors read and their
    number. Raises ConfigError or CheckpointError; the latter names every missing, unexpected and misshapen tensor.
    """
    weights = Weights(path)
    model = meta_model(weights.config, weights.own_mtp_ends)
    weights.check(places(model))
    weights.shards.verify()
    if packed:
        _keep_packed(model, weights)
    _allocate(model, dtype, device)
    found = places(model)
    for done, name in enumerate(weights.names, 1):
        _fill(found, name, weights)
        if progress:
            progress(done, len(weights.names))
    if simulate_quantization:
        use_rounding(model, ReleasedRounding(weights.config.qk_rope_head_dim), weights.quantised)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype not in _PACKED_DTYPES)
    return model.eval()


def save_model(model: Transformer, path: str | Path, shard_bytes: int = SHARD_BYTES, layout: Layout | None = None) -> None:
    """Write config.json and the weights in the released layout; all or nothing.

    Weights keep their own dtypes, packed ones their codes, unless a `layout` is given. One file `model.safetensors`, or shards
    with an index where the weights exceed `shard_bytes`.
    """
    with new_folder(path) as folder:
        write_model(model, folder, shard_bytes, layout)


def write_model(model: Transformer, folder: Path, shard_bytes: int = SHARD_BYTES, layout: Layout | None = None) -> None:
    """As save_model, into an existing folder that the caller makes appear atomically."""
    found = places(model)
    if layout is None:
        units = [{name: Stored(place.tensor.dtype, place.shape)} for name, place in found.items()]
        config = model.config if any(is_packed(place) for place in found.values()) else dataclasses.replace(
            model.config, expert_dtype=None, quantization_config=None)
    else:
        units = [stored_parts(name, shape, layout, integer) for name, shape, integer in _logical(found)]
        config = config_for(model.config, layout)
    write_configs(config, folder)

    def produce(name: str) -> dict[str, torch.Tensor]:
        return {name: found[name].view} if layout is None else encode(name, model_weight(found, name), layout)

    plan = plan_shards(units, shard_bytes)
    files = ["model.safetensors"] if len(plan) == 1 else shard_names(len(plan))
    for file, part in zip(files, plan, strict=True):
        write_shard(folder, file, part, produce)
    if len(plan) > 1:
        write_index(folder, plan, files)


def write_configs(config: ModelConfig, folder: Path) -> None:
    """config.json and generation_config.json, as released."""
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    generation = {"_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
                  "do_sample": True, "temperature": 1.0, "top_p": 1.0, "transformers_version": "4.46.3"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def is_packed(place: Place) -> bool:
    """Whether FP8 or FP4 codes lie here."""
    return place.tensor.dtype in (E4M3, torch.int8)


def model_weight(found: dict[str, Place], name: str) -> torch.Tensor | Packed:
    """A model's weight by its released name, plain or packed."""
    view = found[name].view.detach()
    return Packed(view, found[scale_of(name)].view) if is_packed(found[name]) else view


def _logical(found: dict[str, Place]) -> list[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is a table, of every weight; scales belong to theirs."""
    scales = {scale_of(name) for name, place in found.items() if is_packed(place)}
    return [(name, tuple(model_weight(found, name).shape), not is_packed(place) and not place.tensor.is_floating_point())
            for name, place in found.items() if name not in scales]


def _fill(found: dict[str, Place], name: str, weights: Weights) -> None:
    """Copy one weight from its file to its place."""
    weight, place = weights.read(name), found[name]
    if isinstance(weight, Packed) and is_packed(place):
        place.view.copy_(weight.codes)
        found[scale_of(name)].view.copy_(weight.scale)
    elif isinstance(weight, Packed):
        place.view.copy_(ops.dense(weight, place.tensor.dtype))
    else:
        if not place.tensor.is_floating_point() and not 0 <= int(weight.min()) <= int(weight.max()) < _experts(found):
            raise CheckpointError(f"{weights.folder / weights.shards.file_of[name]} is damaged: {name} names an expert that "
                                  "does not exist")
        place.view.copy_(weight)


def _experts(found: dict[str, Place]) -> int:
    return next(place.shape[0] for name, place in found.items() if name.endswith("ffn.gate.weight"))


def _keep_packed(model: nn.Module, weights: Weights) -> None:
    """Give the meta model codes and scales in place of every weight that the folder stores in FP8 or FP4."""

    def swap(module: nn.Module, name: str, scale_name: str, released: str) -> None:
        stack = getattr(module, name).shape[:-2] if "*" in released else ()
        names = [released.replace("*", str(expert)) for expert in range(stack[0] if stack else 1)]
        formats = {(weights.stored[each].dtype, weights.stored[scale_of(each)].dtype) if each in weights.quantised else None
                   for each in names}
        if len(formats) > 1:
            raise CheckpointError(f"{weights.folder}: {released} is stored in several formats; load it without packed")
        if formats != {None}:
            ((dtype, scale_dtype),) = formats
            codes, scale = packed_shapes(weights.shape(names[0]), dtype == torch.int8)
            setattr(module, name, nn.Parameter(torch.empty(*stack, *codes, dtype=dtype, device="meta"), False))
            setattr(module, scale_name, torch.empty(*stack, *scale, dtype=scale_dtype, device="meta"))

    for prefix, module in model.named_modules():
        if isinstance(module, Linear):
            swap(module, "weight", "scale", released_name(f"{prefix}.weight"))
        elif isinstance(module, Experts):
            for name in ("gate", "up", "down"):
                swap(module, name, f"{name}_scale", released_name(f"{prefix}.{name}"))


def _allocate(model: nn.Module, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give every meta tensor of the model memory, in the dtype it is kept in."""
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                kept = tensor.dtype
                if tensor.is_floating_point() and kept not in _PACKED_DTYPES and not released_name(
                        f"{prefix}.{name}").endswith(".scale"):
                    kept = torch.promote_types(dtype, torch.float32) if FLOAT32.search(
                        released_name(f"{prefix}.{name}")) else dtype
                real = torch.empty(tensor.shape, dtype=kept, device=device)
                store[name] = nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real
