"""What tests of the chat page share: a browser, an API that answers by script, an open page."""

import pytest

from tests.browser import chromium, new_page
from tests.server.conftest import running
from tests.server.fake_api import FakeApi, done, hello, pieces


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
