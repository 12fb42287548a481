"""Baselines: the n-gram against a slow dictionary version, true distributions, compressors within their bounds."""

import gzip
import lzma
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import DataError
from fathom.evals.baselines import (
    byte_probabilities,
    gzip_bits_per_byte,
    lzma_bits_per_byte,
    ngram_bits_per_byte,
    ngram_levels,
)

rng = random.Random(0)
WORDS = [b"the ", b"cat ", b"sat ", b"on ", b"a ", b"mat. ", b"and ", b"then ", b"\n"]
TRAIN = b"".join(rng.choices(WORDS, k=400))
HELD_OUT = b"".join(rng.choices(WORDS, k=60)) + b"\xff\0zebra"


def slow_probability(train, history, byte, order):
    """P(byte | history) by the textbook: dictionaries, recursion, nothing shared with the code under test."""
    counts = {order: Counter(train[at:at + order] for at in range(len(train) - order + 1))}
    for length in range(order - 1, 0, -1):
        left = defaultdict(set)
        for gram in counts[length + 1]:
            left[gram[1:]].add(gram[0])
        counts[length] = Counter({gram: len(bytes_before) for gram, bytes_before in left.items()})

    def probability(length):
        if length == 0:
            return 1 / 256
        if length - 1 > len(history):
            return probability(length - 1)
        context = history[len(history) - length + 1:]
        below = {gram: count for gram, count in counts[length].items() if gram[:-1] == context}
        if not below:
            return probability(length - 1)
        once, twice = (sum(count == n for count in counts[length].values()) for n in (1, 2))
        discount = (once + 1) / (once + 2 * twice + 2)
        kept = max(below.get(context + bytes([byte]), 0) - discount, 0)
        return (kept + discount * len(below) * probability(length - 1)) / sum(below.values())

    return probability(order)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_ngram_equals_the_slow_dictionary_version(order):
    train, held_out = TRAIN[:400], HELD_OUT[-40:]
    slow = [slow_probability(train, held_out[:at], byte, order) for at, byte in enumerate(held_out)]
    np.testing.assert_allclose(byte_probabilities(ngram_levels(train, order), held_out), slow, rtol=1e-12)
    assert ngram_bits_per_byte(train, held_out, order) == pytest.approx(-sum(map(math.log2, slow)) / len(slow))


@settings(max_examples=25)
@given(st.binary(min_size=8, max_size=80), st.binary(max_size=9), st.integers(1, 8))
def test_probabilities_of_all_256_bytes_sum_to_one(train, history, order):
    levels = ngram_levels(train, order)
    total = sum(byte_probabilities(levels, history + bytes([byte]))[-1] for byte in range(256))
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("history", [b"", b"t", b"the c", b" cat sat", b"\xff\xfe"])
def test_probabilities_sum_to_one_after_real_text(history):
    levels = ngram_levels(TRAIN, 6)
    total = sum(byte_probabilities(levels, history + bytes([byte]))[-1] for byte in range(256))
    assert total == pytest.approx(1, abs=1e-12)


def test_longer_contexts_help_and_text_unlike_the_training_text_costs_about_eight_bits():
    costs = [ngram_bits_per_byte(TRAIN, HELD_OUT[:-7], order) for order in (1, 3, 6)]
    assert costs[0] > costs[1] > costs[2] > 0.4
    noise = np.random.default_rng(0).integers(128, 256, 500, dtype=np.uint8).tobytes()
    assert 8 < ngram_bits_per_byte(TRAIN, noise, 6) < 30


def test_top_bit_bytes_keep_their_order_in_eight_byte_codes():
    train = bytes(range(256)) * 4
    assert ngram_bits_per_byte(train, train[:300], 8) < 0.5


def test_gzip_is_the_size_of_the_archive_of_the_held_out_text():
    assert gzip_bits_per_byte(HELD_OUT) == 8 * len(gzip.compress(HELD_OUT, 9)) / len(HELD_OUT)


def test_lzma_counts_what_the_held_out_text_adds_to_the_training_text():
    noise = np.random.default_rng(1).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    assert lzma_bits_per_byte(noise[50_000:60_000], noise) < 0.3
    alone = lzma.compress(HELD_OUT * 3, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    assert 0 < lzma_bits_per_byte(HELD_OUT * 3, TRAIN) < 8 * len(alone) / len(HELD_OUT * 3)


@pytest.mark.parametrize("train, held_out, order", [(b"abc", b"", 2), (b"abc", b"a", 0), (b"a" * 9, b"a", 9),
                                                    (b"a", b"a", 2)])
def test_what_cannot_be_measured_is_an_error(train, held_out, order):
    with pytest.raises(DataError):
        ngram_bits_per_byte(train, held_out, order)
