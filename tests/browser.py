"""A real headless Chromium, where this machine has one."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60_000  # ms for anything on a page; a loaded machine is slow


@contextmanager
def chromium() -> Iterator["Browser"]:  # noqa: F821 (playwright's, imported only where it is used)
    """The browser; the test is skipped where Chromium or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on PATH")
    playwright.expect.set_options(timeout=WAIT)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=3 * WAIT)
        yield browser
        browser.close()


@contextmanager
def new_page(browser: "Browser", expected: str = "Failed to load resource", **options: object) -> Iterator["Page"]:  # noqa: F821
    """A page with storage of its own. Scripts that fail and errors in the console fail the test, but for those that match `expected`."""
    context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
    context.set_default_timeout(WAIT)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and not re.search(expected, message.text) and problems.append(message.text))
    yield page
    context.close()
    assert not problems, problems
