"""A page in a real browser: charts, search, filters, hidden texts, theme, and no request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pharmacist.report import render_demo, render_ranking
from pharmacist.worlds import World
from tests.report.pages import NASTY, REASON_OF, manifest, report, scores, texts, write_demo


pytestmark = pytest.mark.slow

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


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
        page.wait_for_selector("html[data-ready]")
        return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield Browser(running)
        running.close()


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    pool, labels = World(0).pool(120)
    reasons = [REASON_OF[label] for label in labels]
    critical = [i for i, reason in enumerate(reasons) if reason == "critical"]
    for i, text in zip(critical, NASTY, strict=False):
        pool[i] = {"prompt": text, "completion": text}
    pool[critical[5]]["completion"] = "many words " * 60
    table, about = scores(reasons, 36), manifest(120, report())
    render_ranking(path, scores=table, texts=texts(pool), manifest=about, labels=labels)
    return path


def shown(page: Any) -> str:
    return str(page.inner_text(".dt-info"))


def search(page: Any, words: str, expected: str) -> None:
    page.fill("#search", words)
    page.wait_for_selector(f".dt-info:text-is('{expected}')", timeout=5000)  # the search waits for a pause in typing


def test_nothing_is_asked_for_and_nothing_complains(browser: Browser, ranking: Path, tmp_path: Path) -> None:
    write_demo(tmp_path)
    render_demo(tmp_path, labels=World(0).pool(120)[1])
    for path, charts in ((ranking, 3), (tmp_path / "report.html", 8)):
        page = browser.open(path)
        assert page.locator(".js-plotly-plot .main-svg").count() >= charts
        assert [url for url in browser.requests if not url.startswith(("file:", "blob:", "data:"))] == []
        assert len([url for url in browser.requests if url.startswith("file:")]) == 1
        assert browser.complaints == []
        page.close()


def test_texts_are_shown_as_they_are(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    cells = page.locator("#table td.words:not(:has(.veil)) .text")
    found = [cells.nth(2 * i).text_content() for i in range(5)]
    expected = [
        "".join(f"U+{ord(character):04X}" if character in "\u2028\u2029\u202e\u202c\u200f\x00\x1b" else character
                for character in text)
        for text in NASTY
    ]  # fmt: skip
    assert found == expected
    for text, rows in (("window.hacked", 2), ("img src", 1)):  # searching must not run anything either
        search(page, text, f"1 to {rows} of {rows} rows (out of 120)")
    assert page.evaluate("window.hacked") is None
    assert browser.complaints == []
    page.close()


def test_search_filters_and_sorting(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    labels = World(0).pool(120)[1]
    assert shown(page) == "1 to 25 of 120 rows"
    search(page, "WORDS many", "1 to 1 of 1 rows (out of 120)")
    search(page, "", "1 to 25 of 120 rows")
    page.click("[data-reason=low_quality]")
    assert shown(page) == f"1 to {labels.count('noisy')} of {labels.count('noisy')} rows (out of 120)"
    page.click("[data-reason=teaches_compliance]")
    assert f"of {labels.count('noisy') + labels.count('mislabel')} rows" in shown(page)
    page.select_option("#label", label="Mislabelled")
    assert f"of {labels.count('mislabel')} rows" in shown(page)
    page.select_option("#chosen", "1")
    assert shown(page) == "no rows (out of 120)"
    page.click("[data-reason=low_quality]")
    page.click("[data-reason=teaches_compliance]")
    page.select_option("#label", label="all")
    assert "of 36 rows" in shown(page)
    page.select_option("#chosen", "")
    page.locator("th.row-number [tabindex='0']").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#table tbody tr:first-child td.row-number:text-is('0')", timeout=5000)  # not at once
    page.close()


def test_hidden_texts_show_on_click_and_on_enter(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    page.click("[data-reason=teaches_compliance]")
    veils = page.locator("#table .veil")
    count = veils.count()
    assert count == 2 * World(0).pool(120)[1].count("mislabel"), "prompts and completions"
    assert page.evaluate("getComputedStyle(document.querySelector('.veil .text')).filter") == "blur(5px)"
    assert veils.first.locator(".text").get_attribute("aria-hidden") == "true"
    veils.first.click()
    assert veils.count() == count - 1
    veils.first.focus()
    page.keyboard.press("Enter")
    assert veils.count() == count - 2
    veils.first.focus()
    page.keyboard.press("Space")
    assert veils.count() == count - 3
    assert page.locator("#table .text[aria-hidden]").count() == count - 3
    page.click("#reveal")
    assert veils.count() == 0
    page.click("[data-reason=teaches_compliance]")
    page.click("[data-reason=not_safety_critical]")
    assert veils.count() == 0
    page.click("[data-reason=low_quality]")
    page.close()


def test_long_texts_unfold(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    search(page, "many words", "1 to 1 of 1 rows (out of 120)")
    more, text = page.locator("#table .more"), page.locator("#table .clamp .text")
    before = text.bounding_box()["height"]
    more.click()
    assert page.locator("#table td.words .text").nth(1).bounding_box()["height"] > 1.5 * before
    assert more.inner_text() == "less"
    page.close()


def test_the_theme_reaches_the_charts(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)

    def colors() -> tuple[str, str, str]:
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("
            "'.js-plotly-plot .bars path')).fill, getComputedStyle(document.querySelector('.xtick text')).fill]"
        )

    light = colors()
    page.click("#theme")
    dark = colors()
    assert all(a != b for a, b in zip(light, dark, strict=True))
    page.click("#theme")
    assert colors() == light
    page.emulate_media(color_scheme="dark")
    assert colors() == light, "a choice holds against the system"
    page.close()
    page = browser.open(ranking, "?theme=dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark[0]
    page.close()
