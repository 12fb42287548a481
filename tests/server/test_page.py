"""The chat page in a real browser against an API that answers by script."""

import json
import re

import pytest

from fathom.server.settings import ServerSettings
from tests.browser import WAIT as LONGEST
from tests.browser import chromium, new_page
from tests.server.conftest import KEY, running
from tests.server.fake_api import BREAK, WAIT, FakeApi, called, done, hello, pieces
from tests.server.scripted import ScriptedEngine

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def visit(browser, api):
    """Opens the page; everything is closed after the test."""
    with running(None, app=api.app) as server:
        opened = []

        def visit(**options):
            context = new_page(browser, **options)
            shown = context.__enter__()
            opened.append(context)
            shown.goto(server.url)
            shown.locator("#model option").first.wait_for(state="attached")
            return shown

        yield visit
        api.gate.set()
        for context in opened:
            context.__exit__(None, None, None)


@pytest.fixture
def expect():
    return pytest.importorskip("playwright.sync_api").expect


def ask(shown, text="Say hello", wait=True):
    """Sends a message and waits for the end of the answer."""
    answers = shown.locator(".message.assistant").count()
    shown.fill("#prompt", text)
    shown.press("#prompt", "Control+Enter")
    if wait:
        shown.locator(".message.assistant[aria-busy=false] footer .actions").nth(answers).wait_for()


def say(text, **more):
    """A script that answers so."""
    return lambda _: [*pieces("content", text, 50), done(**more)]


def test_the_server_gives_the_page_to_everyone(browser, expect):
    refused = []
    with running(ScriptedEngine(), ServerSettings(api_keys=(KEY,))) as server, new_page(browser) as shown:
        shown.on("response", lambda response: response.status >= 400 and "/v1/" not in response.url and refused.append(response.url))
        shown.goto(server.url)
        expect(shown.locator("#welcome")).to_be_visible()
        expect(shown.locator("#meter-context")).to_contain_text("context")
    assert refused == []


# ---- answers


def test_an_answer_is_shown_while_it_comes(visit, api, expect):
    api.script = lambda _: [*pieces("content", "# Title\n\nSome **bold** and `code`"), WAIT,
                            *pieces("content", " to the end.\n\n```python\nx = 1\n```\n"), done()]
    shown = visit()
    ask(shown, wait=False)
    expect(shown.locator(".message.assistant .prose strong")).to_have_text("bold")
    expect(shown.locator("#send")).to_have_attribute("aria-label", "Stop")
    assert shown.get_attribute(".message.assistant", "aria-busy") == "true" and "to the end" not in shown.inner_text("#thread")
    api.gate.set()
    expect(shown.locator(".message.assistant .code pre")).to_have_text("x = 1")
    expect(shown.locator("#send")).to_have_attribute("aria-label", "Send")
    expect(shown.locator("#status")).to_have_text("The answer is complete")
    assert shown.inner_text(".message.user .bubble") == "Say hello"
    assert api.bodies[0]["stream"] is True and api.bodies[0]["messages"] == [{"role": "user", "content": "Say hello"}]


def test_reasoning_is_open_while_it_comes_then_folds_and_can_be_opened(visit, api, expect):
    api.script = lambda _: [*pieces("reasoning_content", "First a *thought*."), WAIT, *pieces("content", "Then the answer."), done()]
    shown = visit()
    ask(shown, wait=False)
    thoughts = shown.locator(".reasoning .thoughts")
    expect(thoughts).to_be_visible()
    expect(shown.locator(".reasoning summary")).to_contain_text("Thinking for")
    api.gate.set()
    expect(shown.locator(".reasoning summary")).to_contain_text("Thought for")
    expect(thoughts).to_be_hidden()
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Then the answer.")
    shown.focus(".reasoning summary")
    shown.keyboard.press("Enter")
    expect(thoughts).to_have_text("First a thought.")


@pytest.mark.parametrize("mode, fields", [
    ("Non-think", {"thinking": {"type": "disabled"}}), ("High", {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}),
    ("Max", {"thinking": {"type": "enabled"}, "reasoning_effort": "max"}),
])
def test_a_mode_sends_its_fields_and_stays_chosen(visit, api, mode, fields):
    shown = visit()
    shown.get_by_label(mode, exact=True).check(force=True)
    ask(shown)
    body = api.bodies[0]
    assert {name: body[name] for name in ("thinking", "reasoning_effort") if name in body} == fields
    shown.reload()
    assert shown.get_by_label(mode, exact=True).is_checked()


def test_settings_go_into_the_request(visit, api):
    shown = visit()
    shown.click("#open-settings")
    for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("top_p", "0.9"), ("max_tokens", "77"), ("seed", "3")):
        shown.fill(f"#set-{name}", value)
    shown.keyboard.press("Escape")
    ask(shown)
    body = api.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["model"] == "small"
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.5, 0.9, 77, 3)
    assert body["stream_options"] == {"include_usage": True}


def test_tool_calls_are_shown_and_take_a_result(visit, api, expect):
    first = [*pieces("reasoning_content", "I need the weather."), *called(("get_weather", '{"place": "Paris", "unit": "celsius"}')), done("tool_calls")]
    api.script = lambda body: say("It is sunny.")(body) if body["messages"][-1]["role"] == "tool" else first
    shown = visit()
    shown.click("#open-settings")
    shown.fill("#set-tools", json.dumps([TOOL]))
    shown.check("#set-offer-tools")
    shown.click("#settings .close")
    ask(shown, "Weather?")
    expect(shown.locator(".call .call-name")).to_have_text("get_weather")
    assert json.loads(shown.inner_text(".call pre")) == {"place": "Paris", "unit": "celsius"}
    shown.fill(".call textarea", "21 degrees")
    shown.press(".call textarea", "Control+Enter")
    expect(shown.locator(".message.assistant > .prose").last).to_have_text("It is sunny.")
    expect(shown.locator(".call-result")).to_contain_text("21 degrees")
    user, turn, result = api.bodies[1]["messages"]
    assert api.bodies[0]["tools"] == [TOOL] and user["content"] == "Weather?"
    assert turn["tool_calls"][0]["function"]["arguments"] == '{"place": "Paris", "unit": "celsius"}' and turn["reasoning_content"] == "I need the weather."
    assert result == {"role": "tool", "tool_call_id": "call_0", "content": "21 degrees"}


def test_tools_that_are_no_json_are_refused_before_they_are_sent(visit, api, expect):
    shown = visit()
    shown.click("#open-settings")
    shown.fill("#set-tools", "{not json")
    shown.check("#set-offer-tools")
    expect(shown.locator("#tools-problem")).to_contain_text("Not usable yet")
    shown.click("#settings .close")
    ask(shown, wait=False)
    expect(shown.locator("#settings")).to_be_visible()
    assert api.bodies == []


def test_the_meter_counts_hit_miss_and_written_tokens_cost_and_cache_bytes(visit, expect):
    shown = visit()
    ask(shown)
    ask(shown, "Again")
    expect(shown.locator("#meter-tokens")).to_have_text("1,280 cached · 20 new · 42 written")
    expect(shown.locator("#meter-context")).to_have_text("33% of context")
    shown.click("#meter summary")
    cells = "row => [...row.cells].map(cell => cell.textContent)"
    assert shown.eval_on_selector("[data-row='last answer']", cells) == ["Last answer", "1,280", "20", "42", "$0.0000504"]
    assert shown.eval_on_selector("[data-row='conversation']", cells) == ["Conversation", "2,560", "40", "84", "$0.000101"]
    facts = shown.locator("#meter-cache")
    expect(facts).to_contain_text("1.5 MiB")
    expect(facts).to_contain_text("4.7 GiB")
    expect(facts).to_contain_text("25%")
    shown.select_option("#prices", "pro-launch")
    expect(shown.locator("[data-row='last answer'] td").last).to_have_text("$0.000367")


# ---- stop, retry, trouble


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_request_and_keeps_what_came(visit, api, expect, how):
    api.script = lambda _: [*pieces("content", "Half of"), WAIT, done()]
    shown = visit()
    ask(shown, wait=False)
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Half of")
    if how == "button":
        shown.click("#send")
    else:
        shown.keyboard.press("Escape")
    expect(shown.locator(".cut")).to_contain_text("Stopped.")
    assert api.left.wait(LONGEST / 1000)
    api.script = say(" an answer.")
    shown.click(".cut .link")
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Half of an answer.")
    assert api.bodies[1]["messages"][-1] == {"role": "assistant", "content": "Half of", "prefix": True}


def test_answer_again_asks_the_same_and_can_be_undone(visit, api, expect):
    shown = visit()
    ask(shown)
    api.script = say("Another answer.")
    shown.get_by_label("Answer again").click()
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Another answer.")
    assert api.bodies[0] == api.bodies[1]
    shown.click("#notice .link")
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Hello, world.")


@pytest.mark.parametrize("status, title", [(400, "The server refused this request"), (429, "The server is busy"), (500, "The server failed"),
                                           (503, "The server is not taking requests now")])
def test_a_refusal_is_explained_and_retried(visit, api, expect, status, title):
    api.script = lambda _: (status, "These are the reasons.")
    shown = visit()
    ask(shown, wait=False)
    expect(shown.locator(".problem")).to_have_text(re.compile(f"{title}.*These are the reasons."))
    api.script = hello
    shown.get_by_role("button", name="Retry").click()
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Hello, world.")
    assert shown.locator(".problem").count() == 0 and api.bodies[0]["messages"] == api.bodies[1]["messages"]


@pytest.mark.parametrize("steps, words", [([BREAK], "broke off"), ([{"error": {"message": "The engine has failed."}}], "The engine has failed.")])
def test_an_answer_that_breaks_off_keeps_what_came(visit, api, expect, steps, words):
    api.script = lambda _: [*pieces("content", "Half of"), *steps]
    shown = visit()
    ask(shown, wait=False)
    expect(shown.locator(".problem")).to_contain_text(words)
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Half of")


def test_a_key_is_asked_for_and_sent(visit, api, expect):
    api.script = lambda _: hello(_) if api.keys[-1] == "Bearer secret-key" else (401, "No API key was given.")
    shown = visit()
    ask(shown, wait=False)
    shown.get_by_role("button", name="Enter API key").click()
    shown.fill("#ask-field", "secret-key")
    shown.keyboard.press("Enter")
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Hello, world.")
    assert "secret-key" not in shown.evaluate("JSON.stringify(localStorage)")


# ---- conversations


def test_conversations_stay_in_the_browser(visit, api, expect):
    shown = visit()
    ask(shown, "The first question")
    address = shown.url
    shown.keyboard.press("Control+k")
    expect(shown.locator("#thread > *")).to_have_count(0)
    ask(shown, "The second question")
    assert shown.url != address
    shown.reload()
    expect(shown.locator(".bubble")).to_have_text("The second question")
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Hello, world.")
    shown.locator("#conversations .open", has_text="The first question").click()
    expect(shown.locator(".bubble")).to_have_text("The first question")
    assert shown.url == address and len(api.bodies) == 2
    ask(shown, "And then?")
    assert [message["content"] for message in api.bodies[2]["messages"]] == ["The first question", "Hello, **world**.", "And then?"]


def test_conversations_are_renamed_deleted_and_brought_back(visit, expect):
    shown = visit()
    ask(shown, "A question")
    entry = shown.locator("#conversations li")
    entry.hover()
    entry.get_by_label("Rename").click()
    shown.locator("#conversations input").fill("A better name")
    shown.keyboard.press("Enter")
    expect(shown.locator("#title")).to_have_text("A better name")
    entry.hover()
    entry.get_by_label("Delete").click()
    expect(entry).to_have_count(0)
    shown.click("#notice .link")
    expect(entry.locator(".open")).to_have_text("A better name")


def test_a_reload_in_the_middle_keeps_what_came(visit, api, expect):
    api.script = lambda _: [*pieces("content", "Half of"), WAIT, done()]
    shown = visit()
    ask(shown, wait=False)
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Half of")
    shown.reload()
    expect(shown.locator(".message.assistant > .prose")).to_have_text("Half of")
    expect(shown.locator(".cut")).to_contain_text("Interrupted.")
    assert api.left.wait(LONGEST / 1000)


# ---- keyboard, light and dark, phone


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


# ---- hostile answers

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
