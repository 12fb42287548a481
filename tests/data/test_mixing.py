"""What is held out, left out and repeated: shares in bytes, no copy on both sides, independent of the other documents."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.duplicates import PERMUTATIONS, digest, signature, word_hashes
from fathom.data.mixing import choose
from fathom.data.reading import Part
from fathom.data.sources import Source
from fathom.errors import DataError


def part(texts):
    return Part(Path(), np.array([digest(text) for text in texts], dtype=np.uint64), np.array([len(text) for text in texts], dtype=np.int64),
                np.array([signature(word_hashes(text)) for text in texts], dtype=np.uint32).reshape(-1, PERMUTATIONS), {})


def texts_of(name, count, size=1):
    return [f"{name} {number} " * size for number in range(count)]


def chosen(parts, weights=None, near=0.0, held_out=0.1, repeat=1.0, train_bytes=None, paths=None):
    weights = weights or [None] * len(parts)
    sources = [Source((paths or {}).get(n, f"s{n}"), weight, max_bytes=1) for n, weight in enumerate(weights)]
    return choose(sources, parts, near=near, held_out=held_out, repeat=repeat, train_bytes=train_bytes)


def test_without_weights_every_document_goes_to_one_side_once():
    choices = chosen([part(texts_of("a", 200)), part(texts_of("b", 40))])
    for choice in choices:
        assert ((choice.copies == 1) ^ choice.held_out).all() and choice.held_out.any() and not choice.lost.documents
    assert 8 <= choices[0].held_out.sum() <= 35


def test_equal_documents_stay_once_wherever_they_stand():
    texts = texts_of("a", 30)
    one, two = chosen([part(texts + texts[:5]), part(texts[10:20] + ["other text"])])
    assert (one.copies + one.held_out)[:30].all() and not (one.copies + one.held_out)[30:].any()
    assert (two.copies + two.held_out).tolist() == [0] * 10 + [1]
    assert one.lost.documents == {"exact duplicate": 5} and two.lost.documents == {"exact duplicate": 10}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_a_near_copy_of_a_held_out_document_is_never_trained_on(seed):
    rng = np.random.default_rng(seed)
    originals = [" ".join(map(str, rng.integers(0, 500, 120))) for _ in range(20)]
    copies = [text + " more words" for text in originals]
    choices = chosen([part(originals), part(copies)], near=0.8, held_out=0.5)
    assert not choices[1].copies.any() and not choices[1].held_out.any()
    assert choices[1].lost.documents == {"near duplicate": 20}
    assert choices[0].held_out.any()


def test_made_up_documents_are_not_compared():
    texts = [text + " and the same words again and again" for text in texts_of("a", 20, 50)]
    alike = chosen([part(texts_of("b", 20)), part(texts)], near=0.3, paths={1: "synthetic:recall"})
    assert (alike[1].copies + alike[1].held_out).all()


def test_held_out_documents_do_not_depend_on_the_rest_of_the_corpus():
    texts = texts_of("a", 300)
    alone, among = chosen([part(texts)])[0], chosen([part(texts_of("z", 50)), part(texts[100:])])[1]
    assert np.array_equal(alone.held_out[100:], among.held_out)


def test_every_source_of_ten_documents_has_one_held_out_and_a_corpus_at_least_one():
    choices = chosen([part(texts_of("a", 400)), part(texts_of("b", 10)), part(texts_of("c", 9))], held_out=1e-9)
    assert [int(choice.held_out.sum()) for choice in choices] == [1, 1, 0]
    small = chosen([part(["one"]), part(["two", "three"])], held_out=1e-9)
    assert sum(int(choice.held_out.sum()) for choice in small) == 1 and sum(int(choice.copies.sum()) for choice in small) == 2


@pytest.mark.parametrize("weights, repeat, train_bytes", [((3, 1), 1, None), ((1, 1), 4, None), ((70, 30), 2.5, None), ((1, 3), 1, 6000)])
def test_sources_have_their_shares_of_the_bytes(weights, repeat, train_bytes):
    parts = [part(texts_of("a", 900, 3)), part(texts_of("b", 500, 2))]
    choices = chosen(parts, weights, repeat=repeat, train_bytes=train_bytes)
    trained = [int((p.sizes * choice.copies).sum()) for p, choice in zip(parts, choices, strict=True)]
    aside = [choice.lost.bytes["held out beyond its share"] for choice in choices]
    have = [int((p.sizes * ~choice.held_out).sum()) - out for p, choice, out in zip(parts, choices, aside, strict=True)]
    held = [int(p.sizes[choice.held_out].sum()) for p, choice in zip(parts, choices, strict=True)]
    assert held[0] / sum(held) == pytest.approx(weights[0] / sum(weights), abs=0.05) and 0 in aside
    expected = train_bytes or min(repeat * size * sum(weights) / weight for size, weight in zip(have, weights, strict=True))
    assert sum(trained) == pytest.approx(expected, abs=50)
    assert trained[0] / sum(trained) == pytest.approx(weights[0] / sum(weights), abs=0.003)
    for choice in choices:
        assert choice.copies.max() <= np.ceil(repeat) and not choice.copies[choice.held_out].any()
        left = ((choice.copies == 0) & ~choice.held_out).sum()
        assert choice.lost.documents["beyond its share of the mix"] + choice.lost.documents["held out beyond its share"] == left


def test_a_share_that_cannot_be_filled_names_the_scarce_source():
    with pytest.raises(DataError, match=r"s1 has [\d,]+ bytes to train on; its share of 100,000 would repeat it more than 1 times"):
        chosen([part(texts_of("a", 2000, 9)), part(texts_of("b", 20))], [1, 1], train_bytes=100_000)


def test_one_document_is_too_little():
    with pytest.raises(DataError, match="too little text"):
        chosen([part(["only one"])])
