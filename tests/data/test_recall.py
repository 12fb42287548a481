"""Recall documents: every fact stated once, asked for once, later, at near and far distances; a function of the seed."""

import itertools
import random
import re

import pytest

from fathom.data.recall import question, recall_document, recall_texts, statement

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
