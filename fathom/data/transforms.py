"""Conversations as tokens and loss masks: only what the assistant says is learned.

Report section 5.1 (supervised fine-tuning). Is handed token ids; knows no chat format and no tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fathom.data.packing import PackedData
from fathom.errors import DataError

Example = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class ExampleTokens:
    """Examples end to end: `tokens` int64 [total], `lengths` int64 [examples]."""

    tokens: np.ndarray
    lengths: np.ndarray


def masked_example(segments: list[tuple[list[int], bool]]) -> Example:
    """Token ids of all segments in order, and for each whether it is a target (the segment's own flag)."""
    tokens = [token for ids, _ in segments for token in ids]
    is_target = [learned for ids, learned in segments for _ in ids]
    return tokens, is_target


def pack_examples(examples: Sequence[Example], sequence_length: int, seed: int, pad_id: int) -> PackedData:
    """Whole examples packed into rows, with targets only where `is_target` says so.

    Raises DataError for an example longer than a row, with nothing to learn, or with a mask of another length.
    """
    for number, (tokens, is_target) in enumerate(examples):
        if len(tokens) != len(is_target):
            raise DataError(f"example {number} has {len(tokens)} tokens but {len(is_target)} mask entries")
        if len(tokens) > sequence_length + 1:
            raise DataError(f"example {number} has {len(tokens)} tokens, more than the {sequence_length + 1} that fit; "
                            "raise the sequence length or leave it out")
        if not any(is_target[1:]):
            raise DataError(f"example {number} has no assistant token to learn; leave it out")
    if not examples:
        raise DataError("there are no examples to pack; check the conversations")
    stream = ExampleTokens(np.concatenate([tokens for tokens, _ in examples]).astype(np.int64),
                           np.array([len(tokens) for tokens, _ in examples], dtype=np.int64))
    learned = np.concatenate([is_target for _, is_target in examples]).astype(bool)
    return PackedData(stream, sequence_length, seed, pad_id, learned)
