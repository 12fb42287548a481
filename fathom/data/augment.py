"""What is done to a document's text before and after it becomes tokens: fill in the middle, token splitting.

Report section 4.1, as in DeepSeek-V3 (section 4.1): documents are rearranged whole, before packing. Both are decided
by the seed and the document, never by its place in the corpus.
"""

import numpy as np

from fathom.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

MIDDLES = (FIM_BEGIN, FIM_HOLE, FIM_END)  # each stands before prefix, suffix and middle
PIECE = 1 << 19  # characters of a text that the tokenizer gets at once


def fill_in_the_middle(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Prefix, suffix and middle of a text cut at two random places (parts may be empty)."""
    first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    return text[:first], text[second:], text[first:second]


def tokenizer_pieces(text: str, piece: int = PIECE) -> list[str]:
    """The text in pieces of at least `piece` characters that have the same tokens apart as together.

    They end after a line feed that no white space follows, where every pre-tokeniser of `text/tokenizer.py` cuts.
    """
    pieces, start = [], 0
    while len(text) - start > 2 * piece:
        end = text.find("\n", start + piece) + 1
        while end and end < len(text) and text[end].isspace():
            end = text.find("\n", end) + 1
        if not end:
            break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


class TokenSplitter:
    """Splits a random share of the merged tokens into the two tokens that each was merged from.

    A model then also reads a word in other pieces than the most common ones, and is not biased at token borders.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float):
        self.rate = rate
        self._left_V = np.full(tokenizer.vocab_size, -1, dtype=np.int64)
        self._right_V = self._left_V.copy()
        for merged, (left, right) in tokenizer.merges().items():
            self._left_V[merged], self._right_V[merged] = left, right

    def split(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64 ids [tokens] -> ids [tokens or more] of the same bytes."""
        chosen = (rng.random(len(ids)) < self.rate) & (self._left_V[ids] >= 0)
        at = np.arange(len(ids)) + np.cumsum(chosen) - chosen
        out = np.repeat(ids, 1 + chosen)
        out[at[chosen]], out[at[chosen] + 1] = self._left_V[ids[chosen]], self._right_V[ids[chosen]]
        return out
