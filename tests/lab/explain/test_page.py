"""The page of `fathom explain` in a real browser: what it shows is what it was told, by mouse, keys, phone, light and dark."""

import json
import re

import pytest

from fathom.lab.explain.page import Subject, page, tell
from fathom.lab.explain.record import record
from fathom.text.tokenizer import Tokenizer
from tests.browser import chromium, new_page
from tests.models import random_model, small_config

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. " * 2
STEPS = 2 + 6 + 3 * 7  # in and out; a window-only layer; three layers with entries


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The file's address, and the story in it."""
    tokenizer = Tokenizer.train([TEXT], 300)
    model = random_model(small_config([0, 4, 32, 4], sliding_window=16, vocab_size=tokenizer.vocab_size))
    seen, subject = record(model, [tokenizer.bos_id, *tokenizer.encode(TEXT)]), Subject("a model", False)
    path = tmp_path_factory.mktemp("explain") / "page.html"
    path.write_text(page(model, tokenizer, seen, subject), encoding="utf-8")
    return path.as_uri(), json.loads(json.dumps(tell(model, tokenizer, seen, subject)))


@pytest.fixture
def visit(browser, told):
    """Opens the page at an address; closed after the test."""
    opened = []

    def visit(address: str = "", **options):
        context = new_page(browser, **options)
        shown = context.__enter__()
        opened.append(context)
        shown.goto(told[0] + address)
        return shown

    yield visit
    for context in opened:
        context.__exit__(None, None, None)


def step_of(shown) -> tuple[int, int]:
    """Token and step that the address remembers."""
    return tuple(map(int, re.search(r"token=(\d+)&step=(\d+)$", shown.url).groups()))


def wide(shown) -> bool:
    """Whether the page is wider than the window."""
    return shown.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_every_step_says_what_it_is_where_the_report_says_it_and_draws_something(visit, told):
    shown, titles = visit("#token=100&step=0"), []
    for step in range(STEPS):
        assert step_of(shown) == (100, step)
        titles.append(shown.inner_text("#panel > h2"))
        assert len(shown.inner_text(".about")) > 40 and shown.inner_text(".formula") and shown.inner_text(".source")
        assert shown.locator("figure :is(table, dl)").count() >= 1
        assert "undefined" not in shown.inner_text("body") and "NaN" not in shown.inner_text("body")
        if step < STEPS - 1:
            shown.click("#on")
    assert shown.is_disabled("#on") and titles[-1] == "The next token"
    assert len(set(titles)) == 10


def test_the_entries_on_the_page_are_those_that_the_indexer_picked(visit, told):
    story, layer = told[1], told[1]["layers"][1]
    for at in (100, 30, len(story["tokens"]) - 1):
        shown = visit(f"#token={at}&step=9")
        assert shown.inner_text("#panel > h2") == "Compressed entries, and which the indexer picks"
        rows = shown.eval_on_selector_all(".entries tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
        assert sorted(int(row[0]) for row in rows) == list(range((at + 1) // 4)) and len(rows) == len(layer["scores"][at])
        assert sorted(int(row[0]) for row in rows if row[3] == "yes") == layer["picked"][at]
        assert shown.locator(".column.picked").count() == len(layer["picked"][at])
        scores = [layer["scores"][at][int(row[0])] for row in rows]
        assert scores == sorted(scores, reverse=True)
        for row in rows:
            if row[3] == "yes":
                assert abs(float(row[4].strip("< %")) / 100 - layer["entries"][at][int(row[0])]) < 0.0006


def test_the_last_step_shows_the_models_distribution(visit, told):
    story = told[1]
    shown = visit(f"#token=60&step={STEPS - 1}")
    rows = shown.eval_on_selector_all("figure table:first-child tbody tr", "rows => rows.map(row => [row.cells[0].textContent, row.cells[2].textContent])")
    assert [float(digits.strip("< %")) for _, digits in rows] == pytest.approx([100 * p for _, p in story["top"][60]], abs=0.06)
    probability, rank = story["next"][60]
    assert f"rank {rank} of {story['config']['vocab_size']}" in shown.inner_text("figure")


def test_the_window_shades_the_tokens_it_reaches(visit, told):
    shown = visit("#token=100&step=2")
    heat = shown.eval_on_selector_all(".token", "all => all.map(each => Number(each.style.getPropertyValue('--heat')))")
    shaded = [place for place, value in enumerate(heat) if value > 0]
    assert shaded == list(range(85, 101))
    values = told[1]["layers"][0]["window"][100]
    assert heat[85:101] == pytest.approx([value / max(values) for value in values], abs=1e-6)


def test_an_entry_shows_its_tokens(visit, told):
    shown = visit("#token=100&step=9")
    slot = told[1]["layers"][1]["picked"][100][-1]
    shown.click(f"[data-entry='{slot}']")
    heat = shown.eval_on_selector_all(".token", "all => all.map(each => Number(each.style.getPropertyValue('--heat')))")
    assert [place for place, value in enumerate(heat) if value == 1] == list(range(4 * slot - 4, 4 * slot + 4))
    assert f"entry {slot}" in shown.inner_text("#legend") and shown.evaluate(f"document.activeElement.dataset.entry === '{slot}'")
    shown.keyboard.press("Enter")
    assert "attention" in shown.inner_text("#legend")


def test_keys_walk_through_steps_layers_and_tokens(visit):
    shown = visit("#token=50&step=0")
    press = shown.keyboard.press
    press("ArrowDown")
    press("ArrowDown")
    assert step_of(shown) == (50, 2)
    press("Shift+ArrowDown")
    assert step_of(shown) == (50, 7)
    press("ArrowRight")
    press("ArrowRight")
    press("ArrowLeft")
    assert step_of(shown) == (51, 7)
    press("End")
    assert step_of(shown) == (51, STEPS - 1)
    press("Shift+ArrowUp")
    press("Home")
    press("ArrowUp")
    assert step_of(shown) == (51, 0)
    assert shown.get_attribute("#token-51", "aria-selected") == "true"


def test_tokens_and_steps_can_be_chosen(visit):
    shown = visit()
    shown.click("#token-40")
    shown.click("#rail button[data-step='12']")
    assert step_of(shown) == (40, 12) and shown.locator("#rail [aria-current]").count() == 1
    shown.select_option("#step", "3")
    shown.reload()
    assert step_of(shown) == (40, 3)


def test_an_early_token_says_why_there_is_nothing_to_read(visit):
    assert "No block of 4 tokens is finished yet" in visit("#token=2&step=9").inner_text("figure")


def test_the_page_says_that_the_model_is_untrained_and_asks_for_nothing(visit):
    asked = []
    shown = visit()
    shown.on("request", lambda request: asked.append(request.url))
    shown.reload()
    assert "untrained" in shown.inner_text("#untrained") and len(asked) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_every_step_without_scrolling_sideways(visit, scheme):
    shown = visit("#token=100&step=0", viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    for step in range(STEPS):
        assert not wide(shown), step
        shown.evaluate(f"location.hash = '#token=100&step={step + 1}'")
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    shown.click("#theme")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != background
