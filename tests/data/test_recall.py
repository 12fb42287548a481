"""Recall documents: every fact stated once, asked for once, later, at near and far distances; a function of the seed."""

import itertools
import random
import re
from collections import Counter

import pytest

from fathom.data.recall import PAIR_STYLES, dense_recall_texts, question, recall_document, recall_texts, repeating_texts, statement

STATED = re.compile(r"The code of the (\w+ \w+) is (\d{5})\.")
ASKED = re.compile(r"Question: What is the code of the (\w+ \w+)\? Answer: (\d{5})\.")


@pytest.mark.parametrize("length, facts", [(0, 1), (300, 1), (2000, 4), (2000, 30), (40000, 8)])
def test_every_fact_is_asked_for_once_after_it_was_stated(length, facts):
    for seed in range(20):
        text = recall_document(random.Random(seed), length, facts)
        stated = {found[1]: (found[2], found.end()) for found in STATED.finditer(text)}
        asked = {found[1]: (found[2], found.start()) for found in ASKED.finditer(text)}
        assert len(STATED.findall(text)) == len(ASKED.findall(text)) == facts == len(stated)
        for key, (value, end) in stated.items():
            assert statement(key, value) in text and f"{question(key)} {value}." in text
            assert asked[key][0] == value and asked[key][1] > end + 10
            between = re.sub(ASKED, "", re.sub(STATED, "", text[end:asked[key][1]]))
            assert between.strip(), "no filler between fact and question"


def test_lengths_come_near_what_was_asked_for():
    for length in (1000, 5000, 30000):
        assert abs(len(recall_document(random.Random(1), length, 4)) - length) < 0.15 * length


def test_distances_reach_from_near_to_far():
    shares = []
    for text in itertools.islice(recall_texts(0, 10000, 20000), 60):
        ends = {found[1]: found.end() for found in STATED.finditer(text)}
        shares += [(found.start() - ends[found[1]]) / len(text) for found in ASKED.finditer(text)]
    assert min(shares) < 0.02 and max(shares) > 0.8
    assert 0.25 < sum(share > 0.2 for share in shares) / len(shares) < 0.75


def test_given_filler_is_used_in_order():
    filler = [f"Sentence {number} of the book." for number in range(50)]
    numbers = [int(n) for n in re.findall(r"Sentence (\d+) of", recall_document(random.Random(3), 3000, 3, filler))]
    assert len(numbers) > 60 and all(b == (a + 1) % 50 for a, b in itertools.pairwise(numbers))


def test_same_seed_same_documents_and_another_seed_others():
    first, again, other = (list(itertools.islice(recall_texts(seed, 400, 4000), 20)) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 20


def test_every_doubling_of_the_length_holds_about_as_much_text():
    texts = list(itertools.islice(recall_texts(0, 400, 6400), 2000))
    octaves = [sum(len(text) for text in texts if low <= len(text) < 2 * low) for low in (800, 1600, 3200)]
    assert max(octaves) < 1.5 * min(octaves)


def test_dense_texts_say_every_fact_again_and_only_the_key_tells_which():
    """No fixed order of answers to go by: a question asks for the fact stated last, first, or any other."""
    places = []
    for text in itertools.islice(dense_recall_texts(0), 500):
        values = {found[1]: found[2] for found in reversed([*STATED.finditer(text)])}
        first = {key: text.index(statement(key, value)) for key, value in values.items()}
        asked = [*ASKED.finditer(text)]
        assert 2 <= len(values) <= 6 and len(text) < 2500
        assert all(values[found[1]] == found[2] and found.start() > first[found[1]] for found in [*asked, *STATED.finditer(text)][:len(asked)])
        assert all(text.count(key) > 1 for key in values) and all(values[found[1]] == found[2] for found in STATED.finditer(text))
        for found in asked:
            before = sorted((at for at in first.values() if at < found.start()), reverse=True)
            if len(before) >= 4:
                places.append(before.index(first[found[1]]) / (len(before) - 1))
    assert len(places) > 500 and 0.25 < sum(places) / len(places) < 0.75
    assert max(places.count(0.0), places.count(1.0)) < 0.6 * len(places)
    assert [*itertools.islice(dense_recall_texts(3), 5)] == [*itertools.islice(dense_recall_texts(3), 5)]


def test_repeating_texts_say_everything_again():
    """Of a run the whole, of pairs each, as often as the text has parts."""
    runs = pairs = 0
    for text in itertools.islice(repeating_texts(0), 500):
        for between, link in PAIR_STYLES:
            said = Counter(text.strip("\n").split(between))
            if link in text and len(said) > 1 and all(link in part for part in said):
                assert 2 <= len(said) <= 8 and len(set(said.values())) == 1 and 2 <= max(said.values()) <= 4
                assert len({part.split(link)[0] for part in said}) == len(said)  # a name has one partner
                pairs += 1
                break
        else:
            words = text.split()
            assert any(words[:len(words) // n] * n == words for n in (2, 3, 4))
            runs += 1
    assert 150 < runs < 250 and pairs == 500 - runs
    assert [*itertools.islice(repeating_texts(3), 5)] == [*itertools.islice(repeating_texts(3), 5)]
