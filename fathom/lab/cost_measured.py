"""What small models really allocate and really multiply, beside what fathom.accounting says of them.

FLOPs are those that torch's counter sees in one decoded token. It sees matrix products that PyTorch does itself, so the operators'
definitions run; and since those compute what is not selected and mask it, a selection is gathered first, which gives the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fathom import ops
from fathom.accounting import cache_bytes, flops_per_token, released_cache_bytes
from fathom.config import ModelConfig
from fathom.model.cache import Cache
from fathom.model.transformer import Transformer

# A window of 191 and index keys of 128 channels keep what accounting leaves out, the query's own weights and sums, below a percent.
SMALL = dict(
    vocab_size=1024, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, head_dim=64, qk_rope_head_dim=16, q_lora_rank=128,
    o_groups=2, o_lora_rank=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, index_n_heads=4,
    index_head_dim=128, index_topk=64, num_hash_layers=1, sliding_window=191, compress_ratios=[0, 4, 128],
    num_nextn_predict_layers=0, max_position_embeddings=1 << 17, torch_dtype="float32")
RIVALS = {"v4": {}, "gqa": {"attention": "gqa", "num_key_value_heads": 2}, "mla": {"attention": "mla"},
          "dsa": {"attention": "dsa", "index_topk": 512}}
CONTEXTS = (1024, 8192)


class Measured(NamedTuple):
    """A quantity of one small model at a context: by arithmetic, and as it is."""

    attention: str
    quantity: str
    context: int
    arithmetic: float
    measured: float

    @property
    def error(self) -> float:
        """Relative difference of what was measured."""
        return self.measured / self.arithmetic - 1


def measure(contexts: tuple[int, ...] = CONTEXTS) -> list[Measured]:
    """FLOPs of a decoded token and bytes of the cache, of each attention at each context."""
    found = []
    for name, changes in RIVALS.items():
        config = ModelConfig.from_dict(SMALL | changes)
        model = Transformer(config).initialise(0).eval()
        for context in contexts:
            flops = sum(flops_per_token(config, context).values()) + stream_flops(config)
            found.append(Measured(name, "FLOPs of a token", context, flops, counted_flops(model, context)))
            found.append(Measured(name, "cache bytes, float32", context, cache_bytes(config).at(context),
                                  model.new_cache(1, context).nbytes))
        if name == "v4":
            found += [_released(config, context) for context in contexts]
    return found


def stream_flops(config: ModelConfig) -> float:
    """FLOPs of mixing the residual streams, which neither the report's count nor accounting's holds: into and out of two sublayers."""
    streams = config.hc_mult
    return 2.0 * config.hidden_size * (config.num_hidden_layers * 2 * (streams + streams * streams) + streams)


def counted_flops(model: Transformer, context: int) -> int:
    """FLOPs that torch counts in the token number `context` of a sequence."""
    cache = model.new_cache(1, context)
    cache.length_B.fill_(context - 1)
    with ops.using("definition"), gathering(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    return counter.get_total_flops()


@contextmanager
def gathering() -> Iterator[None]:
    """Inside, the attentions' definitions compute a single query's selected keys only."""
    window_attention, grouped_attention = ops.attention.definition, ops.grouped_attention.definition

    def windowed(q_BSHD: Tensor, window: ops.Window, entries: ops.Entries | None, sink_H: Tensor) -> Tensor:
        if entries is not None and entries.selected_BSK is not None:
            slot_K = _selected(entries.selected_BSK)
            read_BS = torch.full_like(entries.count_BS, len(slot_K))
            entries = ops.Entries(entries.kv_BMD[:, slot_K], torch.zeros_like(read_BS), read_BS, None)
        return window_attention(q_BSHD, window, entries, sink_H)

    def grouped(q_BSHD: Tensor, key_BMGD: Tensor, value_BMGC: Tensor, first_BS: Tensor, count_BS: Tensor,
                selected_BSK: Tensor | None, scale: float) -> Tensor:
        if selected_BSK is not None:
            slot_K = _selected(selected_BSK)
            key_BMGD, value_BMGC = key_BMGD[:, slot_K], value_BMGC[:, slot_K]
            first_BS, count_BS = torch.zeros_like(first_BS), torch.full_like(count_BS, len(slot_K))
        return grouped_attention(q_BSHD, key_BMGD, value_BMGC, first_BS, count_BS, None, scale)

    ops.attention.definition, ops.grouped_attention.definition = windowed, grouped
    try:
        yield
    finally:
        ops.attention.definition, ops.grouped_attention.definition = window_attention, grouped_attention


def _selected(slot_BSK: Tensor) -> Tensor:
    """The slots of the only query."""
    slot_K = slot_BSK.view(-1)
    return slot_K[slot_K >= 0]


def _released(config: ModelConfig, context: int) -> Measured:
    """The cache in the released bytes; the compressors' tails, which the report leaves out, are taken off what was allocated."""
    allocated = Cache(config, 1, context, torch.float32, torch.device("cpu"), quantized=True)
    tails = sum(stream.tail.items_BRC.nbytes for layer in allocated.layers for stream in (layer.entries, layer.keys) if stream)
    return Measured("v4", "cache bytes, FP8 and FP4", context, released_cache_bytes(config).at(context), allocated.nbytes - tails)


def as_json(found: list[Measured]) -> list[dict[str, Any]]:
    """For a result file."""
    return [measured._asdict() | {"error": measured.error} for measured in found]
