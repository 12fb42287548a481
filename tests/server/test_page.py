"""The chat page in a real browser against an API that answers by script."""

import json
import re

import pytest

from fathom.server.settings import ServerSettings
from tests.browser import WAIT as LONGEST
from tests.browser import new_page
from tests.server.conftest import KEY, running
from tests.server.fake_api import BREAK, WAIT, called, done, hello, pieces
from tests.server.pages import api, ask, browser, expect, say, visit  # noqa: F401  (fixtures)
from tests.server.scripted import ScriptedEngine

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}}


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
