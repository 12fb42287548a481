"""Prices: workloads in tokens, lists in force, hardware of one's own, tables that cannot be used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fathom import recipe
from fathom.errors import FathomError
from fathom.lab.price import PRICES, PriceList, PriceTable, Tokens, Workload, cost, per_million, run_price
from tests.runs import fathom


def test_a_conversations_tokens_by_hand():
    # Turn 1: 1,000 in, of which 256 whole blocks of 300 shared. Turn 2: 1,000 + 500 + 100 in, 1,500 known: 11 blocks.
    # Turn 3: 2,200 in, 2,100 known: 16 blocks.
    found = Workload(conversations=3, turns=3, prompt=1000, message=100, answer=500, shared=300).tokens()
    hit = 256 + 11 * 128 + 16 * 128
    assert found == Tokens(3 * hit, 3 * (1000 + 1600 + 2200 - hit), 3 * 1500)


@given(turns=st.integers(1, 9), prompt=st.integers(1, 5000), message=st.integers(0, 900), answer=st.integers(0, 900),
       share=st.floats(0, 1), block=st.integers(1, 300))
def test_every_token_is_paid_once_and_more_cache_never_costs_more(turns, prompt, message, answer, share, block):
    work = Workload(1, turns, prompt, message, answer, int(share * prompt), block)
    tokens = work.tokens()
    assert tokens.hit + tokens.miss == sum(prompt + turn * (answer + message) for turn in range(turns))
    assert tokens.hit >= 0 and tokens.miss >= 0
    prices = PriceList("m", "2026-04-24", 0.1, 1.0, 2.0)
    assert cost(tokens, prices) <= cost(Workload(1, turns, prompt, message, answer, 0, block).tokens(), prices) + 1e-12


def test_the_shipped_lists_are_the_published_ones():
    lists = {(each.model, each.since): each for each in recipe.load(PriceTable, PRICES).lists}
    flash, pro = lists["deepseek-v4-flash", "2026-04-24"], lists["deepseek-v4-pro", "2026-04-24"]
    assert (flash.hit, flash.miss, flash.output) == (0.028, 0.14, 0.28)
    assert (pro.hit, pro.miss, pro.output) == (0.145, 1.74, 3.48)
    assert lists["deepseek-v4-pro", "2026-05-31"].output == pytest.approx(pro.output / 4)
    for model in ("flash", "pro"):
        before, after = (lists[f"deepseek-v4-{model}", day] for day in ("2026-04-24", "2026-04-26"))
        assert after.hit == pytest.approx(before.hit / 10) and after.miss == before.miss
    million = Tokens(10**6, 10**6, 10**6)
    assert cost(million, flash) == pytest.approx(0.448)
    latest = lists["deepseek-v4-flash", "2026-09-10"]
    assert cost(million, latest, peak=True) == pytest.approx(2 * 0.753)


def test_hardware_costs_by_its_throughput():
    assert per_million(3.6, 1000) == pytest.approx(1.0)
    lists = run_price(Workload(), None, 3.6, 10_000, 1000, Console(quiet=True))
    own, dollars = lists[-1]
    assert (own.hit, own.miss, own.output) == (0, pytest.approx(0.1), pytest.approx(1.0))
    assert dollars == pytest.approx((1000 * 0.1 + 500 * 1.0) / 1e6)


@pytest.mark.parametrize(("text", "words"), [
    ('[[lists]]\nmodel = "x"\nsince = "May"\nhit = 1\nmiss = 1\noutput = 1', "since is 'May'"),
    ('[[lists]]\nmodel = "x"\nsince = "2026-05-01"\nhit = -1\nmiss = 1\noutput = 1', "hit is -1"),
    ('[[lists]]\nmodel = "x"\nsince = "2026-05-01"\nmiss = 1\noutput = 1', "hit is missing"),
    ('[[list]]\nmodel = "x"', "did you mean lists?"), ("lists = []", "holds no price list"), ("lists = [", "not valid TOML")])
def test_a_wrong_table_is_one_clear_line(tmp_path, text, words):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(FathomError) as error:
        run_price(Workload(), tmp_path / "mine.toml", None, None, None, Console(quiet=True))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_prices_a_table_of_ones_own_and_refuses_nonsense(tmp_path):
    (tmp_path / "mine.toml").write_text('[[lists]]\nmodel = "my-model"\nsince = "2026-05-01"\nhit = 0\nmiss = 1\noutput = 2')
    answer = fathom("lab", "price", "--prices", tmp_path / "mine.toml", "--conversations", 1000, "--turns", 1, "--prompt", 1000,
                    "--answer", 500, timeout=300)
    assert answer.returncode == 0 and "my-model" in answer.stdout and "2.0000" in answer.stdout
    for options in (("--turns", 0), ("--hour", 2), ("--hour", 2, "--read", 0, "--write", 5), ("--shared", 99999)):
        wrong = fathom("lab", "price", *options, timeout=300)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr, options
