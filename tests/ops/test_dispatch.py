"""Dispatch: the last registered implementation that supports the arguments, else the definition; `using` decides."""

import os
import shutil
import threading

from fathom.ops.dispatch import composed, op, using
from fathom.ops.native.library import library


def make():
    @op
    def double(x):
        """Twice x."""
        return ("definition", 2 * x)

    double.register("small", lambda x: x < 10)(lambda x: ("small", 2 * x))
    double.register("even", lambda x: x % 2 == 0)(lambda x: ("even", 2 * x))
    return double


def test_the_last_supporting_implementation_is_chosen_and_the_definition_takes_the_rest():
    double = make()
    assert [double(x) for x in (3, 4, 12, 13)] == [("small", 6), ("even", 8), ("even", 24), ("definition", 26)]
    assert double.choose(4)[0] == "even" and double.choose(13)[0] == "definition"
    assert double.__name__ == "double" and double.__doc__ == "Twice x."


def test_using_prefers_a_name_where_it_is_supported_and_ends_with_its_block():
    double = make()
    with using("small"):
        assert [double(x)[0] for x in (4, 12)] == ["small", "definition"]
        with using("definition"):
            assert double(4)[0] == "definition"
        assert double(4)[0] == "small"
    assert double(4)[0] == "even"


def test_a_composed_operator_leaves_a_preference_that_it_lacks_to_its_steps():
    double = make()

    @composed
    def four_times(x):
        return double(double(x)[1])

    four_times.register("at once", lambda x: True)(lambda x: ("at once", 4 * x))
    assert four_times(2) == ("at once", 8)
    with using("small"):
        assert four_times(2) == ("small", 8)
    with using("at once"):
        assert four_times(2) == ("at once", 8)


def test_a_preference_stays_in_its_own_thread():
    double, seen = make(), []
    with using("definition"):
        thread = threading.Thread(target=lambda: seen.append(double(4)[0]))
        thread.start()
        thread.join()
    assert seen == ["even"]


def test_kernels_compile_where_there_is_a_compiler():
    """Else whatever needs them would be skipped in silence."""
    assert os.environ.get("FATHOM_NATIVE") == "0" or shutil.which("cc") is None or library() is not None
