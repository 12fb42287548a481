"""Bits per byte of held-out text: comparable across tokenizers and with compressors."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fathom import ops
from fathom.data.packing import Batch
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer


def token_byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """UTF-8 bytes that each token id stands for [V], int64; special tokens stand for none."""
    special = set(tokenizer.special_ids.values())
    return torch.tensor([0 if token in special or token >= tokenizer.vocab_size else len(tokenizer.token_bytes(token))
                         for token in range(vocab_size)])


@torch.no_grad()
def bits_per_byte(model: Transformer, batches: Iterable[Batch], byte_lengths_V: Tensor,
                  progress: Callable[[int], None] | None = None) -> float:
    """Total negative log2-likelihood of all targets over the bytes they stand for.

    `progress` is called with the number of batches done.
    """
    nats, size = 0.0, 0
    for done, batch in enumerate(batches, 1):
        features = model.features(batch.tokens_BS, batch.positions_BS, [], None)
        target_N = batch.targets_BS.flatten()
        nats += float(ops.cross_entropy(features.hidden_BSW.flatten(0, 1), model.head.weight, target_N))
        size += int(byte_lengths_V[target_N[target_N != ops.IGNORE]].sum())
        if progress:
            progress(done)
    return nats / math.log(2) / max(size, 1)
