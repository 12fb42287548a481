"""The chat page with keys alone, in light and dark, and on a phone."""

import json

import pytest

from tests.server.fake_api import called, done, pieces
from tests.server.pages import api, ask, browser, expect, visit  # noqa: F401  (fixtures)

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def test_everything_in_a_conversation_can_be_done_with_keys(visit, api, expect):
    shown = visit()
    press = shown.keyboard.press
    expect(shown.locator("#prompt")).to_be_focused()
    shown.keyboard.type("one")
    press("Shift+Enter")
    shown.keyboard.type("two")
    press("Enter")
    shown.locator(".message.assistant[aria-busy=false] footer .actions").wait_for()
    assert api.bodies[0]["messages"][0]["content"] == "one\ntwo"
    expect(shown.locator("#prompt")).to_be_focused()
    press("ArrowUp")
    expect(shown.locator(".message.user textarea")).to_be_focused()
    shown.keyboard.type(" three")
    press("Enter")
    expect(shown.locator(".bubble")).to_have_text("one\ntwo three")
    shown.locator(".message.assistant[aria-busy=false] footer .actions").wait_for()
    press("Control+k")
    expect(shown.locator("#welcome")).to_be_visible()
    names, seen = [], set()
    for _ in range(40):
        press("Tab")
        if shown.evaluate("document.activeElement === document.body"):
            continue  # behind the last one; the next is the first
        name = shown.evaluate("(e => e.id || e.getAttribute('aria-label') || e.textContent.trim())(document.activeElement)")
        outline = shown.evaluate("(e => getComputedStyle(e).outlineStyle !== 'none' || e.matches('#prompt, .modes input'))(document.activeElement)")
        if name in seen:
            break
        assert outline, f"{name} does not show its focus"
        seen.add(name)
        names.append(name)
    assert {"new", "menu", "theme-toggle", "open-settings", "prompt"} <= seen, names


CONTRAST = """() => {
  const luminance = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => { for (let each = element; each; each = each.parentElement) { const colour = getComputedStyle(each).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour; } return getComputedStyle(document.body).backgroundColor; };
  return [...document.querySelectorAll("#title, .bubble, .prose, .thoughts, .facts span, .reasoning summary, #meter-context, .modes label span, .call-name")]
    .filter((element) => element.checkVisibility()).map((element) => {
      const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
      return [element.className || element.id || element.textContent, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_can_be_chosen_and_are_readable(visit, scheme):
    shown = visit(color_scheme=scheme)
    ask(shown)
    dark = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)) < 100"
    assert shown.evaluate(dark) == (scheme == "dark")
    contrasts = shown.evaluate(CONTRAST)
    assert len(contrasts) > 6 and [name for name, ratio in contrasts if ratio < 4.5] == []
    shown.click("#theme-toggle")
    assert shown.evaluate(dark) == (scheme == "light")
    shown.reload()
    assert shown.evaluate(dark) == (scheme == "light")
    assert [name for name, ratio in shown.evaluate(CONTRAST) if ratio < 4.5] == []


LONG = ("A long line: " + "word" * 60 + "\n\nhttps://example.org/" + "path/" * 40 + "\n\n| " + " | ".join(f"column {n}" for n in range(12)) + " |\n|"
        + "---|" * 12 + "\n| " + " | ".join(str(n) * 9 for n in range(12)) + " |\n\n```\n" + "code " * 60 + "\n```\n\n$$" + "x + " * 80 + "$$\n")


def test_a_phone_never_scrolls_sideways(visit, api, expect):
    sideways = "document.documentElement.scrollWidth > innerWidth || " \
        "document.querySelector('#scroll').scrollWidth > document.querySelector('#scroll').clientWidth"
    api.script = lambda _: [*pieces("reasoning_content", LONG, 200), *pieces("content", LONG, 200),
                            *called(("f" * 80, json.dumps({"a": "b" * 200}))), done("tool_calls")]
    shown = visit(**PHONE)
    assert not shown.evaluate(sideways)
    shown.fill("#prompt", "long" * 80)
    shown.tap("#send")
    shown.locator(".message.assistant[aria-busy=false] footer .actions").wait_for()
    assert not shown.evaluate(sideways)
    shown.tap(".reasoning summary")
    assert not shown.evaluate(sideways)
    shown.tap("#meter summary")
    expect(shown.locator("#meter .panel")).to_be_visible()
    assert not shown.evaluate(sideways)
    shown.tap("#meter summary")
    shown.tap("#menu")
    expect(shown.locator("#conversations .open")).to_be_visible()
    assert not shown.evaluate(sideways)
    shown.keyboard.press("Escape")
    shown.tap("#open-settings")
    expect(shown.locator("#settings")).to_be_visible()
    assert not shown.evaluate(sideways)
