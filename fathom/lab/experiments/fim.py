"""Documents with their middle moved to the end: can the model fill in, and does it still read on as well (report 4.1)?"""

import math
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch

from fathom.data.augment import MIDDLES, fill_in_the_middle
from fathom.data.store import TokenStore
from fathom.lab.experiment import Experiment, Numbers, Trained, Variant, Verdict, harmless, lower, mean, worst
from fathom.lab.experiments.training_text import trained_on
from fathom.text.tokenizer import Tokenizer

SHORT = ("data.piece_bytes=1024",)  # documents that fit into a row whole
DOCUMENTS, LEAST_TOKENS = 128, 60


def _moved(rate: float) -> AbstractContextManager:
    """Inside, that share of the training documents has its middle at the end."""
    def ids(text: str, tokenizer: Tokenizer) -> list[int]:
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        if rng.random() >= rate:
            return tokenizer.encode(text)
        return [id for mark, part in zip(MIDDLES, fill_in_the_middle(text, rng), strict=True) for id in (tokenizer.special_ids[mark], *tokenizer.encode(part))]
    return trained_on(ids, f"fim {rate}")


@torch.no_grad()
def _measure(trained: Trained) -> dict[str, float]:
    """Bits per byte of held-out middles: `middle` after prefix and suffix in the format of filling in, `middle_unprompted` after the prefix alone."""
    nats = {"middle": 0.0, "middle_unprompted": 0.0}
    size = 0
    for prefix, suffix, middle in _held_out_middles(trained):
        begin, hole, end = (trained.tokenizer.special_ids[mark] for mark in MIDDLES)
        bos = trained.tokenizer.bos_id
        nats["middle"] += _nats(trained, [bos, begin, *prefix, hole, *suffix, end], middle)
        nats["middle_unprompted"] += _nats(trained, [bos, *prefix], middle)
        size += int(trained.byte_lengths_V[middle].sum())
    return {name: value / math.log(2) / max(size, 1) for name, value in nats.items()}


def _held_out_middles(trained: Trained) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of prefix, suffix and middle of the first held-out documents that are long enough, each third of about a third."""
    store = TokenStore.open(trained.run / "data" / "held_out")
    ends, found = np.cumsum(store.lengths), 0
    for end, length in zip(ends.tolist(), store.lengths.tolist(), strict=True):
        ids = np.asarray(store.tokens[end - length + 1:end - 1], dtype=np.int64).tolist()  # without begin and end
        if len(ids) >= LEAST_TOKENS and found < DOCUMENTS:
            found, third = found + 1, len(ids) // 3
            yield ids[:third], ids[2 * third:], ids[third:2 * third]


def _nats(trained: Trained, prompt: list[int], answer: list[int]) -> float:
    logits_SV = trained.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    return float(torch.nn.functional.cross_entropy(logits_SV.float(), torch.tensor(answer), reduction="sum"))


def _judge(numbers: Numbers) -> Verdict:
    verdict = worst(lower(numbers, "FIM 0.1", "without", "middle"), harmless(numbers, "FIM 0.1", "without"))
    return verdict._replace(ours=f"{verdict.ours}; the middle after the prefix alone takes {mean(numbers, 'without', 'middle_unprompted'):.4f} without, "
                                 f"with half of the documents moved {mean(numbers, 'FIM 0.5', 'middle'):.4f} after both")


EXPERIMENT = Experiment(
    "fim", "A tenth of the documents with their middle at the end teaches filling in and costs nothing.", "report 4.1; DeepSeek-V3 4.1",
    "Bits per byte of held-out middles, asked for by prefix and suffix, are lower with it than without by more than the noise, and bits per byte of "
    "held-out text are at most half a percent (and the noise) higher. Reproduced where both hold, partly where one does.",
    (Variant("FIM 0.1", SHORT, swap=lambda: _moved(0.1)), Variant("FIM 0.5", SHORT, swap=lambda: _moved(0.5)), Variant("without", SHORT)),
    _judge, _measure, metric="middle")
