"""A share of the tokens split into their parts while training: is text in unusual tokens read better (report 4.1)?"""

import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from fathom.data.augment import TokenSplitter
from fathom.data.store import TokenStore
from fathom.evals.perplexity import bits_per_byte, held_out_batches
from fathom.lab.experiment import Experiment, Numbers, Trained, Variant, Verdict, harmless, lower, worst
from fathom.lab.experiments.training_text import trained_on
from fathom.text.tokenizer import Tokenizer

RATE = 0.1


def _split() -> AbstractContextManager:
    """Inside, that share of the merged tokens of the training documents is split."""
    splitters: dict[str, TokenSplitter] = {}

    def ids(text: str, tokenizer: Tokenizer) -> list[int]:
        splitter = splitters.setdefault(tokenizer.fingerprint, TokenSplitter(tokenizer, RATE))
        return splitter.split(np.array(tokenizer.encode(text), dtype=np.int64), np.random.default_rng(zlib.crc32(text.encode()))).tolist()
    return trained_on(ids, f"split {RATE}")


@dataclass(frozen=True)
class _SplitStore:
    """Held-out documents, split: `tokens` int64 [total], `lengths` int64 [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray


def _measure(trained: Trained) -> dict[str, float]:
    """Bits per byte of held-out text in which the same share of tokens is split."""
    store, splitter = TokenStore.open(trained.run / "data" / "held_out"), TokenSplitter(trained.tokenizer, RATE)
    borders = np.cumsum(store.lengths)[:-1]
    rng = np.random.default_rng(0)
    documents = [splitter.split(np.asarray(document, dtype=np.int64), rng) for document in np.split(np.asarray(store.tokens), borders)]
    split = _SplitStore(np.concatenate(documents), np.array([len(document) for document in documents]))
    batches = held_out_batches(split, trained.recipe.schedule.lengths[-1], trained.tokenizer.pad_id, trained.recipe.data.validation_tokens)
    return {"split_bits": bits_per_byte(trained.model, batches, trained.byte_lengths_V)}


def _judge(numbers: Numbers) -> Verdict:
    return worst(lower(numbers, "split", "whole", "split_bits"), harmless(numbers, "split", "whole"))


EXPERIMENT = Experiment(
    "token-splitting", "Splitting a random share of tokens into their parts makes the model read unusual token borders, at no cost.",
    "report 4.1; DeepSeek-V3 4.1",
    "Bits per byte of held-out text with a tenth of its tokens split are lower with it than without by more than the noise, and those of text as it is "
    "are at most half a percent (and the noise) higher. Reproduced where both hold, partly where one does.",
    (Variant("split", swap=_split), Variant("whole")), _judge, _measure, metric="split_bits")
