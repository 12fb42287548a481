"""The released checkpoint layout: config.json beside safetensors files with DeepSeek's tensor names.

The only place that knows those names. Tensors are read one at a time into a model allocated once, and written shard
by shard into a folder that appears only when it is complete.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.files import new_folder
from fathom.model.transformer import Transformer

# Ours -> released, applied in order; an expert stack [E, ...] becomes one tensor an expert.
_RENAMES = [(re.compile(ours), released) for ours, released in [
    (r"^blocks\.", "layers."),
    (r"\battention_norm\b", "attn_norm"), (r"\bmoe_norm\b", "ffn_norm"),
    (r"\battention_streams\.", "hc_attn_"), (r"\bmoe_streams\.", "hc_ffn_"), (r"\bcollapse\.", "hc_head_"),
    (r"\battention\.", "attn."), (r"\bmoe\.", "ffn."),
    (r"\bquery_down\b", "wq_a"), (r"\bquery_norm\b", "q_norm"), (r"\bquery_up\b", "wq_b"),
    (r"\bkey_value\b", "wkv"), (r"\bkey_value_norm\b", "kv_norm"),
    (r"\boutput_down\b", "wo_a"), (r"\boutput_up\b", "wo_b"), (r"\bsink$", "attn_sink"),
    (r"\bcompressor\.value\b", "compressor.wkv"), (r"\bcompressor\.gate\b", "compressor.wgate"),
    (r"\bposition_bias$", "ape"), (r"\bhead_weights\b", "weights_proj"),
    (r"\brouter\.weight$", "gate.weight"), (r"\brouter\.bias$", "gate.bias"), (r"\brouter\.table$", "gate.tid2eid"),
    (r"\bshared\.gate\b", "shared_experts.w1"), (r"\bshared\.up\b", "shared_experts.w3"),
    (r"\bshared\.down\b", "shared_experts.w2"),
    (r"\bexperts\.gate$", "experts.*.w1.weight"), (r"\bexperts\.up$", "experts.*.w3.weight"),
    (r"\bexperts\.down$", "experts.*.w2.weight"),
    (r"\bembed_proj\b", "e_proj"), (r"\bhidden_proj\b", "h_proj"),
    (r"\bembed_norm\b", "enorm"), (r"\bhidden_norm\b", "hnorm"),
]]
# Kept in float32 or wider whatever the model's dtype, as released.
_FLOAT32 = re.compile(r"(hc_\w+|ape|attn_sink|gate\.bias)$")
_SHARD_BYTES = 4 << 30


class _Place(NamedTuple):
    """Where a released tensor lies in the model: a parameter or buffer, whole or one expert's slice."""

    tensor: Tensor
    expert: int | None

    @property
    def view(self) -> Tensor:
        return self.tensor if self.expert is None else self.tensor[self.expert]


def released_name(name: str) -> str:
    """The released name of one of our parameters or buffers; `*` stands for the expert's number."""
    for ours, released in _RENAMES:
        name = ours.sub(released, name)
    return name


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Transformer:
    """Read a folder in the released layout (config.json + *.safetensors) into a model in eval mode.

    Weights are cast to `dtype`; hyper-connections, sinks, position biases and router biases stay float32. Raises ConfigError
    or CheckpointError; the latter names every missing, unexpected and misshapen tensor.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder with config.json and *.safetensors")
    config = ModelConfig.load(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no *.safetensors file")
    with torch.device("meta"):
        model = Transformer(config)
    _allocate(model, dtype, device)
    places = _places(model)
    _check_names(path, files, places)
    for file in files:
        for name, tensor in _tensors(file):
            places[name].view.copy_(tensor)
    return model.eval().requires_grad_(True)


def save_model(model: Transformer, path: str | Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write config.json and the weights, in their own dtypes, in the released layout; all or nothing.

    One file `model.safetensors`, or shards with an index where the weights exceed `shard_bytes`.
    """
    with new_folder(path) as folder:
        write_model(model, folder, shard_bytes)


def write_model(model: Transformer, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """As save_model, into an existing folder that the caller makes appear atomically."""
    (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")
    shards: list[list[str]] = [[]]
    places, size = _places(model), 0
    for name, place in places.items():
        if shards[-1] and size + place.view.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += place.view.nbytes
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_tensors({name: places[name].view for name in names}, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(place.view.nbytes for place in places.values())},
                 "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file from tensors on any device; an I/O failure (a full disk) is an OSError."""
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file,
                  metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; CheckpointError names a file that is damaged."""
    return dict(_tensors(file))


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _check_names(path: Path, files: list[Path], places: dict[str, _Place]) -> None:
    found = {name: shape for file in files for name, shape in _shapes(file).items()}
    problems = [f"missing {name}" for name in places if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in places]
    problems += [f"{name} has shape {list(shape)}, the config asks for {list(places[name].view.shape)}"
                 for name, shape in found.items() if name in places and shape != tuple(places[name].view.shape)]
    if problems:
        raise CheckpointError(f"{path} does not fit its config.json: " + "; ".join(problems))


def _places(model: nn.Module) -> dict[str, _Place]:
    places = {}
    for name, tensor in model.state_dict().items():
        released = released_name(name)
        if "*" in released:
            places |= {released.replace("*", str(e)): _Place(tensor, e) for e in range(tensor.shape[0])}
        else:
            places[released] = _Place(tensor, None)
    return places


def _allocate(model: nn.Module, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give every meta tensor of the model memory, in the dtype it is kept in."""
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                kept = dtype if tensor.is_floating_point() else tensor.dtype
                if _FLOAT32.search(released_name(f"{prefix}.{name}")):
                    kept = torch.promote_types(dtype, torch.float32)
                real = torch.empty(tensor.shape, dtype=kept, device=device)
                store[name] = nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real
