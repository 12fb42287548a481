"""Hashes of n-grams against sets of n-grams; near copies against exact shares of shingles."""

import random
import re
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import duplicates
from fathom.data.duplicates import (
    OVERLAP,
    SHINGLE,
    Contained,
    digest,
    first_of_each,
    near_duplicates,
    ngram_hashes,
    signature,
    word_hashes,
)
from fathom.errors import DataError

VOCABULARY = [f"word{number}" for number in range(400)]
WORDS = st.lists(st.sampled_from("abcde"), max_size=40)


def grams(text, n):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at:at + n]) for at in range(len(words) - n + 1)}


def shared(one, other):
    return len(grams(one, SHINGLE) & grams(other, SHINGLE)) / len(grams(one, SHINGLE) | grams(other, SHINGLE))


def test_a_words_hash_is_its_checksum_whatever_its_case_and_the_chunk_it_falls_into(monkeypatch):
    text = "The  sea,\nthe SEA; zwölf\t中文 42 " * 5
    whole = word_hashes(text)
    assert whole.dtype == np.uint64 and whole.tolist() == [zlib.crc32(w.encode()) for w in re.findall(r"\w+", text.lower())]
    for chunk in (1, 3, 10):
        monkeypatch.setattr(duplicates, "_CHUNK", chunk)
        assert np.array_equal(word_hashes(text), whole)


@settings(deadline=None)
@given(WORDS, st.integers(1, 6))
def test_hashes_are_equal_exactly_where_the_ngrams_are(words, n):
    hashes = ngram_hashes(word_hashes(" ".join(words)), n)
    expected = [tuple(words[at:at + n]) for at in range(len(words) - n + 1)] or ([tuple(words)] if words else [])
    assert len(hashes) == len(expected)
    assert len(set(hashes.tolist())) == len(set(expected)) == len(set(zip(hashes.tolist(), expected, strict=True)))


@settings(deadline=None)
@given(st.lists(WORDS, max_size=4), WORDS)
def test_what_is_contained_agrees_with_sets_of_ngrams(texts, words):
    text, texts = " ".join(words), [" ".join(text) for text in texts]
    looked_for = [grams(text, OVERLAP) for text in texts if grams(text, OVERLAP)]
    known = Contained.of(texts)
    assert known.too_short == len(texts) - len(looked_for)
    own = grams(text, OVERLAP)
    assert known.found_in(word_hashes(text)) == max((len(own & given) / len(given) for given in looked_for), default=0)
    union = set().union(*looked_for)
    assert known.covers(word_hashes(text)) == (len(own & union) / len(own) if own else 0)


def variant(rng, text, share):
    words = text.split()
    for at in rng.sample(range(len(words)), round(share * len(words))):
        words[at] = rng.choice(VOCABULARY)
    return " ".join(words)


def test_near_copies_are_found_and_others_are_not():
    rng = random.Random(0)
    texts, family = [], []
    for number in range(60):
        original = " ".join(rng.choice(VOCABULARY) for _ in range(300))
        for share in (0, 0.005, 0.3):
            texts.append(variant(rng, original, share))
            family.append(number)
    order = list(range(len(texts)))
    rng.shuffle(order)
    texts, family = [texts[at] for at in order], [family[at] for at in order]
    twin = near_duplicates(np.array([signature(word_hashes(text)) for text in texts]), 0.8)
    for index in range(len(texts)):
        likeness = [shared(texts[index], texts[other]) if family[index] == family[other] else 0 for other in range(index)]
        best = max(likeness, default=0)
        assert (twin[index] >= 0) == (best > 0.8), best  # none of these lies near the threshold
        if twin[index] >= 0:
            assert twin[index] < index and family[twin[index]] == family[index]
    assert sum(twin >= 0) == 60


def test_a_family_of_a_thousand_copies_keeps_its_first():
    signatures = np.tile(signature(word_hashes(" ".join(VOCABULARY))), (1000, 1))
    signatures[::2] = signature(word_hashes(" ".join(reversed(VOCABULARY))))
    assert np.flatnonzero(near_duplicates(signatures, 0.8) < 0).tolist() == [0, 1]


def test_exact_copies_differ_in_white_space_only_and_the_first_stays():
    assert digest("a b\n\nc ") == digest("a b c") != digest("a b C")
    assert first_of_each([5, 3, 5, 2**63, 3]).tolist() == [True, True, False, True, False]


def test_no_texts_are_no_copies():
    assert len(near_duplicates(np.zeros((0, duplicates.PERMUTATIONS), np.uint32), 0.8)) == 0
    assert Contained.of([]).found_in(word_hashes("a " * 50)) == 0 == Contained.of([]).covers(word_hashes("a " * 50))


def test_missing_library_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(duplicates, "rensa", None)
    with pytest.raises(DataError, match=r"pip install 'fathom\[data\]'"):
        signature(word_hashes("a b c"))
