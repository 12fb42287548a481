"""Hostile answers to the chat page: they stay text, and what got in would not run."""

import json

import pytest

from tests.server.fake_api import called, done, pieces
from tests.server.pages import api, ask, browser, expect, visit  # noqa: F401  (fixtures)

MARKUP = "<script>hacked = 1</script><img src=x onerror='hacked = 1'><svg onload='hacked = 1'><iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>"
HOSTILE = [
    MARKUP, f"# {MARKUP}\n\n- {MARKUP}\n> {MARKUP}\n\n| a | b |\n|---|---|\n| {MARKUP} | `{MARKUP}` |\n", f"```html\n{MARKUP}\n```\n", f"```{MARKUP}\nx\n```",
    "[a](javascript:hacked=1) [b](JaVaScRiPt:hacked=1) [c](data:text/html,<script>hacked=1</script>) [d](vbscript:x) <javascript:hacked=1>",
    "[a]( java\nscript:hacked=1) [b](\x01javascript:hacked=1) [c](//evil.example/x) ![i](https://evil.example/beacon.png) ![j](javascript:hacked=1)",
    "[a](https://ok.example/\"onmouseover=\"hacked=1) https://ok.example/'onclick='hacked=1 <a href='javascript:hacked=1'>x</a>",
    "<style>body { display: none }</style><link rel=stylesheet href=https://evil.example/x.css>"
    "<base href=https://evil.example/><form action=https://evil.example>",
    "&lt;script&gt;hacked = 1&lt;/script&gt; <!-- --> <![CDATA[ ]]> \u202e\u0000 $<script>hacked=1</script>$ $$<img src=x onerror=hacked=1>$$",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_answer_stays_text(visit, api, number):
    text = HOSTILE[number]
    api.script = lambda _: [*pieces("reasoning_content", text, 40), *pieces("content", text, 7),
                            *called((MARKUP, json.dumps({MARKUP: text}))), done("tool_calls")]
    api.models.append({"id": MARKUP, "object": "model"})
    asked = []
    shown = visit()
    shown.on("request", lambda request: asked.append(request.url))
    ask(shown, MARKUP)
    shown.locator(".reasoning summary").click()
    for _ in range(2):  # as it came, and as it is read back from storage
        assert shown.evaluate("globalThis.hacked") is None
        assert shown.locator("#thread").locator("script, img, iframe, style, link, base, form, object, embed").count() == 0
        assert shown.evaluate("[...document.querySelectorAll('#thread *, #conversations *')].flatMap(e => [...e.attributes])"
                              ".filter(a => a.name.startsWith('on')).length") == 0
        links = shown.eval_on_selector_all("#thread a", "all => all.map(a => [new URL(a.href).protocol, a.rel, a.target])")
        assert all(protocol in ("http:", "https:") and "noopener" in rel and target == "_blank" for protocol, rel, target in links)
        assert not [url for url in asked if "127.0.0.1" not in url]
        shown.reload()
        shown.locator(".message.assistant").wait_for()
    assert "hacked" in shown.inner_text("#thread") or number in (7,)


def test_a_refusal_with_markup_stays_text(visit, api, expect):
    api.script = lambda _: (400, MARKUP)
    shown = visit()
    ask(shown, wait=False)
    expect(shown.locator(".problem p")).to_have_text(MARKUP)
    assert shown.evaluate("globalThis.hacked") is None and shown.locator("#thread img").count() == 0


def test_a_script_that_got_in_would_not_run(visit):
    shown = visit(expected="Content Security Policy|Failed to load resource")
    shown.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    shown.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='hacked = 1'>`)")
    shown.evaluate("new Promise(done => setTimeout(done, 50))")
    assert shown.evaluate("globalThis.hacked") is None


@pytest.mark.parametrize("unit", ["*[", "`", "<", "> - ", "![](", "$\\(", "| a |\n|---|\n", "_a_ "])
def test_a_monstrous_answer_is_shown(visit, api, unit):
    api.script = lambda _: [*pieces("content", unit * (60_000 // len(unit)), 4000), done()]
    shown = visit()
    ask(shown)
    assert len(shown.text_content(".message.assistant > .prose")) > 100 or unit == "> - "
