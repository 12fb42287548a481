"""Conversations: only flagged segments are learned, examples stay whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.data.transforms import masked_example, pack_examples
from fathom.errors import DataError
from fathom.ops import IGNORE


def test_segments_join_in_order_with_their_flags():
    assert masked_example([([1, 2], False), ([], True), ([3], True), ([4], False)]) == ([1, 2, 3, 4],
                                                                                        [False, False, True, False])


def test_targets_are_the_learned_tokens_seen_from_the_token_before():
    example = masked_example([([1, 2, 3], False), ([4, 5], True), ([6], False), ([7], True)])
    batch = pack_examples([example], 8, 0, pad_id=9).batch(0, 1)
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 4, 5, 6, 9, 9]]
    assert batch.targets_BS.tolist() == [[IGNORE, IGNORE, 4, 5, IGNORE, 7, IGNORE, IGNORE]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12), st.integers(0, 3))
def test_every_learned_token_is_a_target_once_and_examples_stay_whole(sizes, seed):
    examples, token = [], 1
    for asked, answered in sizes:
        ids = list(range(token, token + asked + answered))
        examples.append(masked_example([(ids[:asked], False), (ids[asked:], True)]))
        token += len(ids)
    data = pack_examples(examples, 12, seed, pad_id=0)
    batch = data.batch(0, data.rows_in_epoch(0))
    learned = [token for tokens, flags in examples for token, flag in zip(tokens, flags, strict=True) if flag]
    assert sorted(batch.targets_BS[batch.targets_BS != IGNORE].tolist()) == learned
    starts = batch.tokens_BS[(batch.positions_BS == 0) & (batch.tokens_BS != 0)].tolist()
    assert sorted(starts) == [tokens[0] for tokens, _ in examples]


@pytest.mark.parametrize("examples, complaint", [
    ([], "no examples"),
    ([([1, 2], [False, True]), ([1] * 6, [True] * 6)], "example 1 has 6 tokens, more than the 5"),
    ([([1, 2], [False, False])], "example 0 has no assistant token"),
    ([([1, 2], [True, False])], "example 0 has no assistant token"),
    ([([1, 2], [True])], "example 0 has 2 tokens but 1 mask"),
])
def test_examples_that_cannot_be_used_are_named(examples, complaint):
    with pytest.raises(DataError, match=complaint):
        pack_examples(examples, 4, 0, 0)
