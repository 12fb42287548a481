"""Question and answer pairs: right answers, two sides without a common question, the same pairs every time."""

import re
from collections import Counter

import pytest

from fathom.data.questions import DAYS, KINDS, MONTHS, check, make_pairs, to_messages

ALL = make_pairs(40000, 0, False) + make_pairs(20000, 0, True)


def pairs_of(kind):
    return {pair.question: pair for pair in ALL if pair.kind == kind}.values()


def test_training_and_held_out_questions_are_disjoint_and_each_has_one_answer():
    train, held_out = ({pair.question: pair.answer for pair in make_pairs(20000, seed, side)}
                       for seed, side in ((1, False), (2, True)))
    assert not train.keys() & held_out.keys()
    assert len({(pair.question, pair.answer) for pair in ALL}) == len({pair.question for pair in ALL})


@pytest.mark.parametrize("held_out", [False, True])
def test_every_kind_appears_equally_often_on_both_sides(held_out):
    counts = Counter(pair.kind for pair in make_pairs(80, 3, held_out))
    assert counts == dict.fromkeys(KINDS, 10)


def test_same_seed_gives_the_same_pairs_and_another_seed_others():
    assert make_pairs(50, 4, False) == make_pairs(50, 4, False) != make_pairs(50, 5, False)


def test_questions_repeat_only_when_a_kind_has_asked_all():
    assert len({pair.question for pair in make_pairs(800, 6, False)}) == 800


def test_additions_add_up():
    for pair in pairs_of("addition"):
        assert sum(map(int, re.findall(r"\d+", pair.question))) == int(pair.answer), pair


def test_comparisons_name_the_right_number():
    for pair in pairs_of("comparison"):
        numbers = list(map(int, re.findall(r"\d+", pair.question)))
        assert int(pair.answer) == (max(numbers) if "larger" in pair.question else min(numbers)), pair


def test_letters_are_those_of_the_word():
    for pair in pairs_of("letters"):
        word = re.search(r"(?:of|in) (\w+)[.?]$", pair.question)[1]
        assert pair.answer == word[0 if "first" in pair.question else -1], pair


def test_order_follows_alphabet_week_and_year():
    known = [list("abcdefghijklmnopqrstuvwxyz"), DAYS, MONTHS]
    for pair in pairs_of("order"):
        asked = re.search(r"(\w+)[.?]$", pair.question)[1]
        items = next(items for items in known if asked in items)
        assert items.index(pair.answer) - items.index(asked) == (-1 if "before" in pair.question else 1), pair


def test_counting_runs_from_start_to_end():
    for pair in pairs_of("counting"):
        numbers = list(map(int, re.findall(r"\d+", pair.question)))
        counted = list(map(int, pair.answer.split(", ")))
        assert counted == list(range(counted[0], counted[-1] + 1))
        assert numbers in ([], counted[-1:], [counted[0], counted[-1]]), pair


def test_upper_case_is_the_word_in_capitals():
    for pair in pairs_of("uppercase"):
        assert pair.answer.lower() in pair.question and pair.answer.isupper()


def test_check_accepts_the_answer_only():
    for pair in ALL[:200]:
        assert check(pair, f" {pair.answer}\n") and check(pair, pair.answer.removesuffix(".") + ".")
        assert not check(pair, "") and not check(pair, pair.answer + "1") and not check(pair, "I say " + pair.answer)
    word = next(pair for pair in ALL if pair.kind == "uppercase")
    assert not check(word, word.answer.lower())


def test_messages_carry_reasoning_only_when_thinking():
    pair = ALL[0]
    assert to_messages(pair, False) == [{"role": "user", "content": pair.question},
                                        {"role": "assistant", "content": pair.answer}]
    assert to_messages(pair, True)[1] == {"role": "assistant", "content": pair.answer,
                                          "reasoning_content": pair.reasoning}
    assert all("\n" not in pair.question + pair.reasoning + pair.answer and pair.reasoning for pair in ALL)
