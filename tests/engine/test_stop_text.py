"""Stop strings: found wherever they lie, whatever the pieces, and nothing is let through that belongs to one."""

import random
import time

from fathom.engine.stop_text import StopText


def read(stops, pieces):
    text = StopText(stops)
    out = [text.push(piece) for piece in pieces]
    return "".join([*out, text.flush()]), text.stop


def first_stop(stops, text):
    """Where the first stop string to be complete begins, and which; the first listed of those that end together."""
    ends = [(text.find(stop) + len(stop), index, stop) for index, stop in enumerate(stops) if stop in text]
    end, _, stop = min(ends, default=(len(text), 0, None))
    return (text[:end - len(stop)] if stop else text), stop


def test_any_split_gives_the_text_before_the_first_stop_string():
    generator = random.Random(0)
    for _ in range(3000):
        text = "".join(generator.choice("aab\n<") for _ in range(generator.randint(0, 30)))
        stops = tuple("".join(generator.choice("aab\n<") for _ in range(generator.randint(1, 5))) for _ in range(generator.randint(1, 3)))
        cuts = sorted(generator.randint(0, len(text)) for _ in range(4))
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(stops, pieces) == read(stops, list(text)) == first_stop(stops, text), (text, stops)


def test_text_that_cannot_become_a_stop_string_is_not_held_back():
    text = StopText(("\n\nUser:",))
    assert [text.push(piece) for piece in ("one\n", "\ntwo", "\n\nUs", "e", "\n")] == ["one", "\n\ntwo", "", "", "\n\nUse"]
    assert text.flush() == "\n"


def test_after_a_stop_string_nothing_more_comes():
    text = StopText(("END",))
    assert [text.push("a EN"), text.push("D b"), text.push("c"), text.flush()] == ["a ", "", "", ""]
    assert text.stop == "END"


def test_time_grows_with_the_text_alone_even_where_every_character_may_begin_a_stop_string():
    def seconds(length):
        text, begin = StopText(("a" * 1000 + "b",) * 16), time.thread_time()  # of this thread alone: others may be busy
        for _ in range(length // 4):
            text.push("aaaa")
        return time.thread_time() - begin

    short, long = (min(seconds(length) for _ in range(3)) for length in (4_000, 16_000))
    assert long < 12 * short  # quadratic would be 16 times, and far more with the stop string's length
