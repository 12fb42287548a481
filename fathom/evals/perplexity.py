"""Bits per byte of held-out text: comparable across tokenizers and with compressors."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fathom import ops
from fathom.data.packing import Batch, PackedData
from fathom.data.store import TokenStore
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

ROWS = 8  # of a batch


def token_byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """UTF-8 bytes that each token id stands for [V], int64; special tokens stand for none."""
    special = set(tokenizer.special_ids.values())
    return torch.tensor([0 if token in special or token >= tokenizer.vocab_size else len(tokenizer.token_bytes(token))
                         for token in range(vocab_size)])


def held_out_batches(store: TokenStore, sequence_length: int, pad_id: int, limit_tokens: int | None = None) -> list[Batch]:
    """The held-out documents as batches in a fixed order: the first `limit_tokens` tokens, or all."""
    packed = PackedData(store, sequence_length, 0, pad_id)
    rows = packed.rows_in_epoch(0)
    if limit_tokens is not None:
        rows = min(rows, -(-limit_tokens // sequence_length))
    return [packed.rows(first, min(ROWS, rows - first)) for first in range(0, rows, ROWS)]


@torch.no_grad()
def bits_per_byte(model: Transformer, batches: Iterable[Batch], byte_lengths_V: Tensor,
                  add: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """Total negative log2-likelihood of all targets over the bytes they stand for; `add` sums a tensor over those who share the batches."""
    nats, size, device = 0.0, 0, model.head.weight.device
    for batch in (batch.to(device) for batch in batches):
        features = model.features(batch.tokens_BS, batch.positions_BS, [], None)
        target_N = batch.targets_BS.flatten()
        nats += float(ops.cross_entropy(features.hidden_BSW.flatten(0, 1), model.head.weight, target_N))
        size += int(byte_lengths_V[target_N[target_N != ops.IGNORE].cpu()].sum())
    nats, size = add(torch.tensor([nats, size], dtype=torch.float64)).tolist()
    return nats / math.log(2) / max(size, 1)
