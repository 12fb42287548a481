"""Released tensor names <-> ours, and where each released tensor lies in a model. The only place that knows those names."""

import re
from typing import NamedTuple

from torch import Tensor, nn

# Ours -> released, applied in order; an expert stack [E, ...] becomes one tensor an expert.
_RENAMES = [(re.compile(ours), released) for ours, released in [
    (r"^blocks\.", "layers."), (r"^mtp\.(\d+)\.embed\.", r"mtp.\1.emb.tok_emb."),
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
    *((rf"\bexperts\.{ours}{ending}$", f"experts.*.{released}.{kind}")
      for ours, released in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
      for ending, kind in (("", "weight"), ("_scale", "scale"))),
    (r"\bembed_proj\b", "e_proj"), (r"\bhidden_proj\b", "h_proj"),
    (r"\bembed_norm\b", "enorm"), (r"\bhidden_norm\b", "hnorm"),
]]
OWN_MTP_EMBEDDING = re.compile(r"^mtp\.(\d+)\.emb\.tok_emb\.weight$")  # base models have one, and a head


class Place(NamedTuple):
    """Where a released tensor lies in the model: a parameter or buffer, whole or one expert's slice."""

    tensor: Tensor
    expert: int | None

    @property
    def view(self) -> Tensor:
        """The tensor itself."""
        return self.tensor if self.expert is None else self.tensor[self.expert]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return tuple(self.tensor.shape if self.expert is None else self.tensor.shape[1:])


def released_name(name: str) -> str:
    """The released name of one of our parameters or buffers; `*` stands for the expert's number."""
    for ours, released in _RENAMES:
        name = ours.sub(released, name)
    return name


def scale_of(weight: str) -> str:
    """The name of the scale that lies beside a quantised weight."""
    return weight.removesuffix("weight") + "scale"


def places(model: nn.Module) -> dict[str, Place]:
    """All tensors of a model by their released names."""
    found = {}
    for name, tensor in model.state_dict().items():
        released = released_name(name)
        if "*" in released:
            found |= {released.replace("*", str(e)): Place(tensor, e) for e in range(tensor.shape[0])}
        else:
            found[released] = Place(tensor, None)
    return found
