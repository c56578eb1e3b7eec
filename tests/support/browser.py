"""A real browser without a window, and how long a page takes in it; used by tests and by ``benchmarks/page.py``."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REPEATS = 5

# Until the frame after the change is painted.
_CLICK = """(selector) => new Promise((done) => {
  const start = performance.now();
  document.querySelector(selector).click();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
_SEARCH = """(words) => new Promise((done) => {
  const start = performance.now();
  const watch = new MutationObserver(() => {
    watch.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
  });
  const info = document.querySelector("#table_wrapper .dt-info");
  watch.observe(info, { childList: true, characterData: true, subtree: true });
  const input = document.getElementById("search");
  input.value = words;
  input.dispatchEvent(new Event("input"));
})"""


class Browser:
    """Opens pages, and keeps what they ask for and complain about."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, path: Path, query: str = "?theme=light") -> Any:
        page = self.browser.new_page(viewport={"width": 1280, "height": 900})
        self.requests, self.complaints = [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(f"file://{path}{query}")
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page


def executable() -> str | None:
    """The installed Chromium."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def running() -> Iterator[Browser]:
    """A browser for as long as the block lasts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=ARGUMENTS)
        yield Browser(browser)
        browser.close()


def measure(browser: Browser, path: Path) -> dict[str, Any]:
    """Milliseconds to the first paint and until rows are shown, and `REPEATS` times for every kind of interaction."""
    page = browser.open(path)
    found: dict[str, Any] = {
        "first paint": page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"),
        "rows shown": page.evaluate("performance.now()"),
    }
    # Of one who does not wait until the page has looked ahead.
    found["sort at once"] = [page.evaluate(_CLICK, "#table thead th:nth-child(5)")]
    page.wait_for_timeout(3000)
    clicks = {
        "filter": "[data-reason=low_quality]",
        "sort by score": "#table thead th:nth-child(2)",
        "sort by prompt": "#table thead th:nth-child(5)",
        "next page": "#table_wrapper .dt-paging-button.next",
        "theme": "#theme",
    }
    for name, selector in clicks.items():
        found[name] = [page.evaluate(_CLICK, selector) for _ in range(REPEATS)]
    # Every text differs from the one before in what it finds, so that the line of counts changes.
    found["search"] = [page.evaluate(_SEARCH, words) for words in ("word 99", "9999", "word 8", "123", "77")[:REPEATS]]
    page.close()
    return found
