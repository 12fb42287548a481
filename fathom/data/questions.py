"""Small questions with answers that a program can check: the chat fine-tune of a tiny model, and its test.

Eight kinds, several phrasings each. Every question that can be asked is listed once and belongs to training or to the
held-out side by the hash of its wording; a held-out question may thus ask in other words what training also asks.
Knows no tokens and no chat format beyond the keys of a message.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

HELD_OUT_SHARE = 0.1
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "one two three four five six seven eight nine ten".split()
OPPOSITES = dict(pair.split("-") for pair in (
    "hot-cold big-small up-down day-night happy-sad open-closed fast-slow light-dark high-low old-new full-empty "
    "early-late good-bad hard-soft long-short loud-quiet near-far rich-poor strong-weak wet-dry true-false "
    "left-right first-last young-old thick-thin in-out on-off yes-no deep-shallow clean-dirty").split())
PLURALS = dict(pair.split("-") for pair in (
    "cat-cats dog-dogs book-books tree-trees house-houses car-cars bird-birds hand-hands door-doors apple-apples "
    "river-rivers star-stars letter-letters friend-friends garden-gardens box-boxes glass-glasses bus-buses "
    "dish-dishes church-churches city-cities baby-babies lady-ladies story-stories leaf-leaves wolf-wolves "
    "man-men woman-women child-children foot-feet tooth-teeth mouse-mice").split())
WORDS = sorted(set(PLURALS) | set(
    "bread chair cloud dance earth fire green horse island jump king lamp music north ocean paper queen rain sand "
    "table under valley water yellow zebra winter summer morning window kitchen silver orange village".split()))
SELF = "I am a tiny language model trained by Fathom. I make mistakes."
GREETING = "Hello! How can I help you?"


@dataclass(frozen=True)
class Pair:
    """A question of one kind, one line of reasoning towards its answer, and the answer."""

    kind: str
    question: str
    reasoning: str
    answer: str


Ask = Callable[[], Iterator[tuple[str, str, str]]]  # yields question, reasoning, answer


def make_pairs(count: int, seed: int, held_out: bool) -> list[Pair]:
    """`count` pairs, all kinds equally often, from the training questions or from the held-out ones.

    The same arguments give the same pairs. A kind repeats a question only after it has asked all it has.
    """
    rng = random.Random(seed)
    decks = [list(deck) for deck in _questions(held_out)]
    for deck in decks:
        rng.shuffle(deck)
    pairs = [decks[n % len(decks)][n // len(decks) % len(decks[n % len(decks)])] for n in range(count)]
    rng.shuffle(pairs)
    return pairs


def check(pair: Pair, answer_text: str) -> bool:
    """Whether the text is the pair's answer; case counts, blanks around it and one full stop at the end do not."""
    return answer_text.strip().removesuffix(".") == pair.answer.removesuffix(".")


def to_messages(pair: Pair, thinking: bool) -> list[dict]:
    """The pair as a user and an assistant message; with `thinking` the assistant reasons first."""
    reply = {"role": "assistant", "content": pair.answer}
    if thinking:
        reply["reasoning_content"] = pair.reasoning
    return [{"role": "user", "content": pair.question}, reply]


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out side: about one in ten, by the hash of its wording."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


@cache
def _questions(held_out: bool) -> tuple[tuple[Pair, ...], ...]:
    """All questions of one side, a tuple for each kind."""
    decks = ([Pair(kind, *parts) for parts in ask()] for kind, ask in KINDS.items())
    return tuple(tuple(pair for pair in deck if is_held_out(pair.question) == held_out) for deck in decks)


def _addition() -> Iterator[tuple[str, str, str]]:
    for a in range(21):
        for b in range(10):
            for phrase in ("What is {} plus {}?", "What is {} + {}?", "Add {} and {}.", "{} + {} ="):
                yield phrase.format(a, b), f"{a} + {b} = {a + b}.", str(a + b)


def _comparison() -> Iterator[tuple[str, str, str]]:
    for a in range(100):
        for b in range(100):
            if a != b:
                reasoning = f"{max(a, b)} > {min(a, b)}."
                yield f"Which is larger, {a} or {b}?", reasoning, str(max(a, b))
                yield f"Which is smaller, {a} or {b}?", reasoning, str(min(a, b))


def _letters() -> Iterator[tuple[str, str, str]]:
    for word in WORDS:
        spelled = f"{word} is spelled {' '.join(word)}."
        for place, letter in (("first", word[0]), ("last", word[-1])):
            for phrase in ("What is the {0} letter of {1}?", "Which letter comes {0} in {1}?",
                           "Tell me the {0} letter of {1}."):
                yield phrase.format(place, word), spelled, letter


def _order() -> Iterator[tuple[str, str, str]]:
    for items, what in ((LETTERS, "letter"), (DAYS, "day"), (MONTHS, "month")):
        for before, after in zip(items, items[1:], strict=False):
            reasoning = f"The order is {before}, {after}."
            for phrase in ("What comes after {}?", "Which {what} follows {}?", "Name the {what} after {}."):
                yield phrase.format(before, what=what), reasoning, after
            for phrase in ("What comes before {}?", "Name the {what} before {}."):
                yield phrase.format(after, what=what), reasoning, before


def _counting() -> Iterator[tuple[str, str, str]]:
    for start in range(1, 11):
        for end in range(start + 1, min(start + 10, 21)):
            counted = ", ".join(map(str, range(start, end + 1)))
            reasoning = f"Start at {start} and stop at {end}."
            for phrase in ("Count from {} to {}.", "Please count from {} to {}."):
                yield phrase.format(start, end), reasoning, counted
            if start == 1:
                yield f"Count to {end}.", reasoning, counted
                if end <= len(NUMBERS):
                    yield f"Count to {NUMBERS[end - 1]}.", reasoning, counted


def _uppercase() -> Iterator[tuple[str, str, str]]:
    for word in WORDS:
        for phrase in ("Write {} in capital letters.", "Put {} in upper case.", "Make {} upper case."):
            yield phrase.format(word), f"{' '.join(word)} becomes {' '.join(word.upper())}.", word.upper()


def _words() -> Iterator[tuple[str, str, str]]:
    for word, opposite in OPPOSITES.items():
        for phrase in ("What is the opposite of {}?", "Give the opposite of {}.", "What is not {}, but the contrary?"):
            yield phrase.format(word), f"The opposite of {word} is {opposite}.", opposite
    for word, plural in PLURALS.items():
        for phrase in ("What is the plural of {}?", "Give the plural of {}.", "One {}, two what?"):
            yield phrase.format(word), f"One {word}, two {plural}.", plural


def _about() -> Iterator[tuple[str, str, str]]:
    for name in ("", " there", " friend", " model", " Fathom"):
        for greeting in ("Hello", "Hi", "Hey", "Good day", "Good morning", "Good evening"):
            for end in ("", ".", "!"):
                yield f"{greeting}{name}{end}", "This is a greeting.", GREETING
    for opening in ("", "Hello, ", "Hi, ", "Please tell me: ", "So, "):
        for question in ("who are you?", "what are you?", "what is your name?", "who made you?", "who trained you?",
                         "are you a human?", "are you a person?", "what model are you?"):
            wording = opening + question
            yield wording[0].upper() + wording[1:], "This asks who I am.", SELF


KINDS: dict[str, Ask] = {
    "addition": _addition, "comparison": _comparison, "letters": _letters, "order": _order, "counting": _counting,
    "uppercase": _uppercase, "words": _words, "about": _about,
}
