"""The inference cache: what a sequence leaves behind for its later tokens (report 2.3.4, 3.5.1).

Per layer a ring of the last window keys and, where the layer compresses, a stream of entries with the raw tail of
its compressor; the indexer keeps a stream of its own. Only the entries grow with the sequence.
"""

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.errors import InputError


class Ring:
    """The last R items of each row: position p lies in slot p mod R of `items_BRC`."""

    def __init__(self, batch: int, size: int, channels: int, dtype: torch.dtype, device: torch.device):
        self.items_BRC = torch.zeros(batch, size, channels, dtype=dtype, device=device)

    def extend(self, new_BSC: Tensor, start_B: Tensor, count_B: Tensor) -> Tensor:
        """The old items followed by the new ones [B, R + S, C]; afterwards the ring holds the newest R.

        Row b's new items are new_BSC[b, :count_B[b]], at positions from start_B[b] on.
        """
        joined = torch.cat([self.items_BRC, new_BSC.to(self.items_BRC.dtype)], 1)
        R = self.items_BRC.shape[1]
        written = min(R, new_BSC.shape[1])
        index_BW = count_B[:, None] - written + torch.arange(written, device=count_B.device)
        slot_BW1 = ((start_B[:, None] + index_BW) % R)[..., None].expand(-1, -1, joined.shape[2])
        newest = joined.gather(1, (R + index_BW.clamp(min=0))[..., None].expand_as(slot_BW1))
        kept = self.items_BRC.gather(1, slot_BW1)
        self.items_BRC.scatter_(1, slot_BW1, newest.where(index_BW[..., None] >= 0, kept))
        return joined


class Stream:
    """What one compressor has produced, `entries_BMD`, and the raw tokens its next blocks still need, `tail`."""

    def __init__(self, batch: int, entries: int, tail: int, channels: int, overlap: bool, dtype: torch.dtype,
                 device: torch.device):
        self.entries_BMD = torch.zeros(batch, entries, channels, dtype=dtype, device=device)
        halves = 2 if overlap else 1
        wide = torch.promote_types(dtype, torch.float32)
        self.tail = Ring(batch, halves * tail, 2 * halves * channels, wide, device)  # value and score


class LayerCache:
    """One layer's window ring, entries and indexer keys."""

    def __init__(self, config: ModelConfig, layer: int, batch: int, max_tokens: int, dtype: torch.dtype,
                 device: torch.device):
        self.window = Ring(batch, config.sliding_window, config.head_dim, dtype, device)
        self.entries: Stream | None = None
        self.keys: Stream | None = None
        ratio, kind = config.ratio(layer), config.kind(layer)
        if kind != "window":
            size = (batch, max_tokens // ratio, ratio)
            self.entries = Stream(*size, config.head_dim, kind == "csa", dtype, device)
            if kind == "csa":
                self.keys = Stream(*size, config.index_head_dim, True, dtype, device)


class Cache:
    """The state of `batch` sequences of up to `max_tokens` tokens each; `length_B` says how many each row has seen.

    Raises InputError where max_tokens exceeds max_position_embeddings.
    """

    def __init__(self, config: ModelConfig, batch: int, max_tokens: int, dtype: torch.dtype, device: torch.device):
        if batch < 1 or max_tokens < 1:
            raise InputError(f"a cache needs a batch and a length of at least 1, not {batch} and {max_tokens}")
        if max_tokens > config.max_position_embeddings:
            raise InputError(f"a cache of {max_tokens} tokens exceeds the model's max_position_embeddings of "
                             f"{config.max_position_embeddings}")
        self.max_tokens = max_tokens
        self.length_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.layers = [LayerCache(config, layer, batch, max_tokens, dtype, device)
                       for layer in range(config.num_hidden_layers)]

    def advance(self, count_B: Tensor) -> None:
        """Record that each row has seen count_B more tokens."""
        self.length_B += count_B

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the cache."""
        rings = [layer.window.items_BRC for layer in self.layers]
        streams = [stream for layer in self.layers for stream in (layer.entries, layer.keys) if stream is not None]
        return sum(tensor.nbytes for tensor in
                   rings + [stream.entries_BMD for stream in streams] + [stream.tail.items_BRC for stream in streams])
