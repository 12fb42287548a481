"""Which replica gets a request: same beginnings together, busy and dead replicas passed over, nothing grows without bound."""

import importlib.util
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.server.routing import BLOCK_CHARACTERS, MOST_BLOCKS, PrefixRouter, prefix_keys
from tests.runs import fathom

LONG = "x" * 3000


def body(*texts: str, **more) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text} for text in texts]} | more).encode()


def test_keys_agree_as_far_as_the_texts_do():
    first, second = prefix_keys(body(LONG, "one")), prefix_keys(body(LONG, "two" * 400))
    assert len(first) == 5 and first == second[:5] and len(second) > 5
    changed = prefix_keys(body("y" + LONG[1:], "one"))
    assert not set(first) & set(changed)
    assert prefix_keys(body(LONG)[:-1]) == [] and prefix_keys(b"\xff") == prefix_keys(b"[1]") == prefix_keys(b"") == []
    assert prefix_keys(b"[" * 100_000) == []


def test_tenants_tools_and_prompts_count():
    assert not set(prefix_keys(body(LONG), "a")) & set(prefix_keys(body(LONG), "b"))
    assert prefix_keys(body(LONG, tools=[{"name": "f"}])) != prefix_keys(body(LONG))
    assert len(prefix_keys(json.dumps({"prompt": LONG}).encode())) == len(LONG) // BLOCK_CHARACTERS
    assert prefix_keys(body(LONG, temperature=1, seed=2)) == prefix_keys(body(LONG))
    assert len(prefix_keys(body("z" * BLOCK_CHARACTERS * (MOST_BLOCKS + 9)))) == MOST_BLOCKS


def test_a_growing_conversation_stays_with_its_replica():
    router, texts = PrefixRouter(), [LONG]
    home = router.choose(prefix_keys(body(*texts)), [0, 0, 0])
    other = router.choose(prefix_keys(body("y" * 3000)), [1 if number == home else 0 for number in range(3)])
    assert other != home
    for turn in range(10):
        texts.append(f"turn {turn} " * 100)
        assert router.choose(prefix_keys(body(*texts)), [0 if number != home else 3 for number in range(3)]) == home


def test_a_busy_or_dead_replica_is_passed_over():
    router, keys = PrefixRouter(slack=4), prefix_keys(body(LONG))
    assert router.choose(keys, [0, 0]) == 0
    assert router.choose(keys, [4, 0]) == 0
    assert router.choose(keys, [5, 0]) == 1
    assert router.choose(keys, [0, 0]) == 1  # where it was read last
    assert router.choose(keys, [0, None]) == 0
    assert router.choose(keys, [None, None]) is None and router.choose([], []) is None


def test_requests_without_a_whole_block_go_to_the_idlest():
    router, counts = PrefixRouter(), [0, 0, 0]
    for _ in range(9):
        counts[router.choose([], counts)] += 1
    assert counts == [3, 3, 3]


def test_what_is_remembered_is_bounded():
    router = PrefixRouter(most_known=10)
    for number in range(100):
        router.choose(prefix_keys(body(str(number) + LONG)), [0, 0])
    assert len(router._known) == 10


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.none() | st.integers(0, 9), min_size=4, max_size=4)), max_size=40))
def test_the_choice_is_always_up_and_never_far_busier_than_the_idlest(steps):
    router = PrefixRouter(slack=2)
    for prompt, counts in steps:
        chosen = router.choose(prefix_keys(body(str(prompt) * 2000)), counts)
        up = [count for count in counts if count is not None]
        assert (chosen is None) == (not up)
        if up:
            assert counts[chosen] is not None and counts[chosen] <= min(up) + 2


def test_different_prompts_spread_over_replicas():
    router, counts = PrefixRouter(), [0] * 4
    for number in range(40):
        counts[router.choose(prefix_keys(body(f"{number}" * 2000)), counts)] += 1
    assert Counter(counts) == {10: 4}


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_replicas_say_what_to_install():
    result = fathom("serve", "--replicas", "2", timeout=300)
    assert result.returncode == 2 and result.stderr == "fathom: --replicas needs Ray; run: pip install 'fathom[ray]'\n"
