"""Fill in the middle loses nothing; pieces have the tokens of the whole; split tokens have the bytes of the merged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.augment import TokenSplitter, fill_in_the_middle, tokenizer_pieces
from fathom.text.tokenizer import Tokenizer
from tests.runs import WORDS

TEXT = st.text(st.sampled_from("ab .,\n\r\t\x0b\x0c\u2028\u00a0(1)é中"), max_size=60)


@pytest.fixture(scope="module")
def small():
    """A small vocabulary with merges."""
    return Tokenizer.train([" ".join(WORDS) + "\n\n  (a, b).\n"] * 20, 380)


@pytest.fixture(scope="module", params=["small", "official"])
def tokenizer(request, small):
    """The small vocabulary, and the released one."""
    return small if request.param == "small" else Tokenizer.official()


@settings(deadline=None)
@given(TEXT, st.integers(0, 2**32))
def test_prefix_middle_and_suffix_are_the_text(text, seed):
    prefix, suffix, middle = fill_in_the_middle(text, np.random.default_rng(seed))
    assert prefix + middle + suffix == text


@settings(deadline=None, max_examples=60)
@given(text=TEXT, piece=st.integers(1, 12))
def test_a_text_has_the_same_tokens_in_pieces(tokenizer, text, piece):
    pieces = tokenizer_pieces(text, piece)
    assert "".join(pieces) == text
    assert [id for ids in tokenizer.encode_many(pieces) for id in ids] == tokenizer.encode(text)


def test_pieces_are_about_as_long_as_asked_for_where_lines_end():
    pieces = tokenizer_pieces("a line of text\n" * 1000, 100)
    assert 100 < len(pieces) < 150 and max(map(len, pieces)) < 250
    assert tokenizer_pieces("no line ends here " * 100, 100) == ["no line ends here " * 100]


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_split_tokens_spell_the_same_text(small, rate):
    text = " ".join(WORDS) * 50
    ids = np.array(small.encode(text))
    split = TokenSplitter(small, rate).split(ids, np.random.default_rng(0))
    assert small.decode(split) == text
    merges = small.merges()
    can = sum(int(id) in merges for id in ids)
    assert abs(len(split) - len(ids) - rate * can) < 4 * np.sqrt(rate * (1 - rate) * can) + 1


def test_merges_join_the_bytes_of_both_parts(tokenizer):
    merges = tokenizer.merges()
    assert len(merges) > 50
    for merged, (left, right) in list(merges.items())[::max(1, len(merges) // 500)]:
        assert tokenizer.token_bytes(merged) == tokenizer.token_bytes(left) + tokenizer.token_bytes(right)
