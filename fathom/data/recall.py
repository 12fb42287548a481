"""Documents that state facts in filler text and ask for them later: what a model learns retrieval over long contexts from.

Synthetic, made from a seed alone. The format, in one line: `The code of the amber lantern is 48213.` somewhere between
filler sentences, and later, at any distance, `Question: What is the code of the amber lantern? Answer: 48213.`
"""

import random
from collections.abc import Iterator, Sequence

ADJECTIVES = ("amber ancient bitter bright broken calm copper crimson distant empty faithful frozen gentle golden hidden "
              "hollow humble iron ivory lonely marble narrow nimble northern pale patient polished quiet restless rusty "
              "sacred scarlet secret silent silver slender southern stubborn sunken tender velvet violet weary wooden").split()
NOUNS = ("anchor arrow basket beacon bell bridge candle canyon castle chapel compass cottage cradle crystal dagger engine "
         "falcon feather ferry forest fountain garden gate glacier hammer harbour harp island kettle ladder lantern library "
         "market meadow mirror orchard palace parrot pillar prairie river saddle ship sparrow statue temple tower valley "
         "village violin wagon willow").split()
KEYS = len(ADJECTIVES) * len(NOUNS)
NAMES = NOUNS + ADJECTIVES + "Tom Ann Ben Eva Max Mia Sam Zoe".split()
PAIR_STYLES = ((". ", " is "), (", ", " "), ("\n", ": "))  # what stands between pairs, and within one
RUNS = 0.4  # share of repeating documents that are runs
_PEOPLE = "the baker|the captain|an old farmer|the gardener|her cousin|the miller|a young painter|the postman|his neighbour|the teacher".split("|")
_DEEDS = ("walked slowly along the road|waited for the evening train|bought bread and cheese|spoke about the weather|read "
          "the morning paper|repaired a wooden fence|looked at the clouds|carried water from the well|wrote a long letter|"
          "sang an old song|closed the window|counted the boats").split("|")
_WHEN = ("before breakfast|in the afternoon|after the rain|at the end of the week|during the winter|while the bells rang|as "
         "on every other day|near the edge of the town|without any hurry|under a grey sky|when the market was over").split("|")


def fact_key(number: int) -> str:
    """The key of that number: every adjective with every noun."""
    return f"{ADJECTIVES[number % len(ADJECTIVES)]} {NOUNS[number // len(ADJECTIVES)]}"


def statement(key: str, value: str) -> str:
    """How a fact is stated; `key` is such as "amber lantern"."""
    return f"The code of the {key} is {value}."


def question(key: str) -> str:
    """How a fact is asked for; what follows is a blank, the value and a full stop."""
    return f"Question: What is the code of the {key}? Answer:"


def recall_document(rng: random.Random, length: int, facts: int = 4, filler: Sequence[str] | None = None) -> str:
    """A text of about `length` characters with `facts` facts (at least one), each asked for once.

    Facts have different keys and five-digit values and lie anywhere in the first nine tenths; half of the distances to
    the question are log-uniform, half uniform up to the end. `filler`, if given, is the sentences between, taken in
    order from a random place on; otherwise they are made up. At least one filler sentence lies between a fact and its
    question. The same state of `rng` and arguments give the same text.
    """
    sentences = _sentences(rng, filler)
    body = [next(sentences)]
    room = length - len(body[0]) - facts * 115
    while room > 0:
        body.append(next(sentences))
        room -= len(body[-1]) + 1
    # What stands after filler sentence n: questions before facts.
    after: dict[int, list[str]] = {}
    keys = rng.sample(range(KEYS), facts)
    for number in keys:
        key, value = fact_key(number), str(rng.randrange(10000, 100000))
        stated = rng.randrange(max(1, len(body) * 9 // 10))
        reach = len(body) - stated  # filler sentences that may lie between
        between = int((reach + 1) ** rng.random()) if rng.random() < 0.5 else rng.randint(1, reach)
        after.setdefault(stated + between, []).insert(0, f"{question(key)} {value}.")
        after.setdefault(stated, []).append(statement(key, value))
    body.append(next(sentences))
    return " ".join(part for n, sentence in enumerate(body) for part in (sentence, *after.get(n, ()))) + "\n"


def recall_texts(seed: int, shortest: int = 400, longest: int = 60000) -> Iterator[str]:
    """Endless documents between both lengths (characters), with a fact in every 400 characters at most, and 40 in all.

    Their lengths are drawn so that every doubling of the length holds as much text: many short ones, few long ones.
    """
    rng = random.Random(seed)
    while True:
        share = rng.random()
        length = round(1 / (share / shortest + (1 - share) / longest))
        yield recall_document(rng, length, facts=min(40, rng.randint(1, 1 + length // 400)))


def dense_recall_document(rng: random.Random, facts: int) -> str:
    """A short text of little else than `facts` facts, each said again or asked for once to three times, anywhere behind its statement.

    Nothing but the key tells which value comes: a model learns to copy by key from these long before it does from sparse texts. The same
    state of `rng` gives the same text.
    """
    sentences = _sentences(rng, None)
    parts = [next(sentences) for _ in range(rng.randint(0, 2))]
    for key, value in _facts(rng, facts):
        at = rng.randint(0, len(parts))
        parts.insert(at, statement(key, value))
        for _ in range(rng.randint(1, 3)):
            again = statement(key, value) if rng.random() < 0.4 else f"{question(key)} {value}."
            parts.insert(rng.randint(at + 1, len(parts)), again)
    return " ".join(parts) + "\n"


def dense_recall_texts(seed: int, most_facts: int = 6) -> Iterator[str]:
    """Endless short documents of two to `most_facts` facts."""
    rng = random.Random(seed)
    while True:
        yield dense_recall_document(rng, rng.randint(2, most_facts))


def repeating_document(rng: random.Random) -> str:
    """A text of little but repetition: a run of words and numbers said two to four times over, or pairs of a name and what belongs to it,
    said again in new orders. From its second part on nearly all of it can be copied, so that copying is learned from few of them.

    The same state of `rng` gives the same text.
    """
    if rng.random() < RUNS:
        run = " ".join(rng.choice((rng.choice(NAMES), _two_digits(rng))) for _ in range(rng.randint(4, 20)))
        return " ".join([run] * rng.randint(2, 4)) + "\n"
    between, link = rng.choice(PAIR_STYLES)
    pairs = [f"{name}{link}{rng.choice((rng.choice(NOUNS), _two_digits(rng)))}" for name in rng.sample(NAMES, rng.randint(2, 8))]
    return between.join(pair for _ in range(rng.randint(2, 4)) for pair in rng.sample(pairs, len(pairs))) + "\n"


def repeating_texts(seed: int) -> Iterator[str]:
    """Endless short documents that repeat themselves."""
    rng = random.Random(seed)
    while True:
        yield repeating_document(rng)


def _two_digits(rng: random.Random) -> str:
    return str(rng.randrange(10, 100))


def _facts(rng: random.Random, facts: int) -> list[tuple[str, str]]:
    numbers = rng.sample(range(KEYS), facts)
    return [(fact_key(number), str(rng.randrange(10000, 100000))) for number in numbers]


def _sentences(rng: random.Random, filler: Sequence[str] | None) -> Iterator[str]:
    at = rng.randrange(len(filler)) if filler else 0
    while filler:
        yield filler[at % len(filler)]
        at += 1
    while True:
        first, second = rng.sample(_PEOPLE, 2)
        text = f"{first} {rng.choice(_DEEDS)} {rng.choice(_WHEN)}"
        if rng.random() < 0.5:
            text += f", and {second} {rng.choice(_DEEDS)}"
        yield text[0].upper() + text[1:] + "."
