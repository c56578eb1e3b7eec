"""A page in a real browser: charts, search, filters, hidden texts, theme, and no request."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pharmacist.cli.main import main
from pharmacist.report.html import render_demo, render_ranking
from pharmacist.selectors.labels import read_labels
from pharmacist.worlds import World
from tests.support.benches import results, write_bench
from tests.support.browser import Browser, executable, measure, running
from tests.support.pages import NASTY, REASON_OF, labelling, manifest, report, scores, texts, write_demo


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if executable() is None:
        pytest.skip("shows pages in Chromium, which is not here; on Debian: apt install chromium")
    with running() as found:
        yield found


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
    return str(page.inner_text("#table_wrapper .dt-info"))


def search(page: Any, words: str, expected: str) -> None:
    page.fill("#search", words)
    page.wait_for_selector(f"#table_wrapper .dt-info:text-is('{expected}')")  # the search waits for a pause in typing


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    table = results({"random": 0.0, NASTY[0]: -20.0}, fractions=(0.1, 0.3), attack=["mild", "hard"], noise=0.5)
    write_bench(folder, table)
    assert main(["report", str(folder), "--quiet"]) == 0
    return folder / "report.html"


def test_nothing_is_asked_for_and_nothing_complains(
    browser: Browser, ranking: Path, bench: Path, tmp_path: Path
) -> None:
    render_demo(tmp_path, *write_demo(tmp_path), categories=[["a"], ["a", "b"], []] * 40)
    for path, charts in ((ranking, 3), (tmp_path / "report.html", 9), (bench, 6)):
        page = browser.open(path)
        assert page.locator(".js-plotly-plot .main-svg").count() >= charts
        assert [url for url in browser.requests if not url.startswith(("file:", "blob:", "data:"))] == []
        assert len([url for url in browser.requests if url.startswith("file:")]) == 1
        assert browser.complaints == []
        page.close()


def test_texts_are_shown_as_they_are(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    cells = page.locator("#table td.words:not(:has(.concealed)) .text")
    found = [cells.nth(2 * i).text_content() for i in range(5)]
    expected = [
        "".join(
            f"U+{ord(character):04X}" if character in "\u2028\u2029\u202e\u202c\u200f\U000e0041\x00\x1b" else character
            for character in text
        )
        for text in NASTY
    ]
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
    page.wait_for_selector("#table tbody tr:first-child td.row-number:text-is('0')")  # not at once
    page.close()


def test_sorting_by_several_columns(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    own = {row["prompt"] for row in World(0).pool(120)[0]}
    heads = {
        name: page.locator("#table thead th").nth(at) for name, at in {"rank": 0, "reason": 2, "prompt": 5}.items()
    }

    def column(number: int) -> list[str]:
        return list(page.locator(f"#table tbody td:nth-child({number})").all_text_contents())

    def sort(head: str, **options: Any) -> None:
        page.evaluate(
            "window.drawn = false; new MutationObserver((_, own) => { own.disconnect(); window.drawn = true; })"
            ".observe(document.querySelector('#table tbody'), { childList: true })"
        )
        heads[head].click(**options)
        for _ in range(200):  # not at once, and the page's policy forbids `wait_for_function`
            if page.evaluate("window.drawn"):
                return
            page.wait_for_timeout(25)
        pytest.fail("the table was not drawn anew")

    page.select_option("#table_wrapper select.dt-input", "100")
    for reverse in (False, True):
        sort("prompt")
        prompts = [text.lower() for text in column(6) if text in own]
        assert len(prompts) > 80, "all but the nasty ones, which are not shown letter by letter"
        assert prompts == sorted(prompts, reverse=reverse)
    sort("reason")
    sort("rank", modifiers=["Shift"])
    sort("rank", modifiers=["Shift"])
    found = list(zip(column(3), (int(rank) for rank in column(1)), strict=True))
    groups = list(dict.fromkeys(reason for reason, _ in found))
    assert len(groups) > 1
    for group in groups:
        ranks = [rank for reason, rank in found if reason == group]
        assert ranks == sorted(ranks, reverse=True)
    assert found == sorted(found, key=lambda pair: (groups.index(pair[0]), -pair[1])), "groups are not mixed"
    sort("rank")
    assert [int(rank) for rank in column(1)] == list(range(1, 101))
    page.close()


def test_hidden_texts_show_on_click_and_on_enter(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    page.click("[data-reason=teaches_compliance]")
    boxes = page.locator("#table .concealed")
    count = boxes.count()
    assert count == 2 * World(0).pool(120)[1].count("mislabel"), "prompts and completions"
    assert page.evaluate("getComputedStyle(document.querySelector('.concealed .text')).filter") == "blur(5px)"
    assert boxes.first.locator(".text").get_attribute("aria-hidden") == "true"
    boxes.first.click()
    assert boxes.count() == count - 1
    boxes.first.focus()
    page.keyboard.press("Enter")
    assert boxes.count() == count - 2
    boxes.first.focus()
    page.keyboard.press("Space")
    assert boxes.count() == count - 3
    assert page.locator("#table .text[aria-hidden]").count() == count - 3
    page.locator("#table thead th").first.click()
    assert boxes.count() == count - 3, "sorted, they stay as they are"
    page.click("#reveal")
    assert boxes.count() == 0
    page.click("[data-reason=teaches_compliance]")
    page.click("[data-reason=not_safety_critical]")
    assert boxes.count() == 0
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


def test_a_narrow_screen(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") == 400, "wide tables scroll on their own"
    meanings = page.evaluate("[...document.querySelectorAll('.numbers tbody th small')].map(it => it.clientWidth)")
    assert len(meanings) > 10 and min(meanings) > 130
    figure = "document.querySelector('[data-figure=reasons]')"
    texts = page.evaluate(f"[...{figure}.querySelectorAll('.bartext')].map(it => it.getBoundingClientRect().height)")
    assert texts and all(height == 0 or height > 9 for height in texts), "legible or hidden"
    page.close()


def test_examples_and_pairs(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking)
    kept, left = page.locator("#kept .sample"), page.locator("#left .sample")
    assert kept.count() == 5 and left.count() > 5
    assert all("selected" in text for text in kept.locator("header").all_inner_texts())
    assert not any("selected" in text for text in left.locator("header").all_inner_texts())
    hidden = page.locator("#left .concealed").count()
    assert hidden
    page.click("[data-reveal='#examples']")
    assert page.locator("#examples .concealed").count() == 0
    duplicates = World(0).pool(120)[1].count("duplicate")
    assert page.inner_text("#pairs_wrapper .dt-info") == f"1 to 3 of {duplicates} pairs"
    pair = page.locator("#pairs tbody tr").first
    assert pair.locator(".sample").count() == 2
    assert pair.locator("td").nth(1).locator("mark").count() > 0
    page.click("#pairs_wrapper .dt-paging-button.next")
    assert page.inner_text("#pairs_wrapper .dt-info").startswith("4 to")
    page.close()


def test_a_benchmark(browser: Browser, bench: Path) -> None:
    page = browser.open(bench)
    assert shown(page) == "1 to 20 of 20 cells"
    assert page.evaluate("window.hacked") is None and page.locator(f"text={NASTY[0]}").count() > 3
    search(page, "random hard", "1 to 4 of 4 cells (out of 20)")
    search(page, "", "1 to 20 of 20 cells")
    page.check("#real")
    assert shown(page) == "1 to 8 of 8 cells (out of 20)", "the selector with an effect, in either fraction"
    assert page.locator("#table tbody tr").first.locator("strong").count() >= 1
    assert page.locator("#table .better").count() >= 8
    page.uncheck("#real")
    head = page.locator("#table th", has_text="Harmful score, %").first.locator("[tabindex='0']")
    values = page.locator("#table tbody tr td.figure:nth-child(4) .estimate span:first-child")
    head.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    numbers = [float(text) for text in values.all_inner_texts()]
    assert len(numbers) == 20 and numbers == sorted(numbers)
    points = "document.querySelector('[data-figure=trade_off]').data[0].y[0]"
    before = page.evaluate(points)
    page.select_option("#setting", "1")
    assert page.evaluate(points) != before, "charts follow the setting"
    page.goto("about:blank")
    page.go_back()
    page.wait_for_selector("html[data-ready]")
    assert (page.input_value("#setting"), page.evaluate(points)) == ("0", before), "and the setting the charts"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != light
    assert browser.complaints == []
    page.close()


def test_names_are_text_in_tables_and_charts(browser: Browser, tmp_path: Path) -> None:
    link, judge = "<a href='https://x.org/'>b</a><br>$x$ %{x} \u202e", "<i>strict</i>"
    table = results({f"s{link}": -20.0, NASTY[1]: 0.0}, defenses=("sft", link), judge=["lenient", judge])
    write_bench(tmp_path / "bench", table)
    assert main(["report", str(tmp_path / "bench"), "--quiet"]) == 0
    rows = [{"prompt": "a", "completion": "b"}] * 4
    render_ranking(
        tmp_path / "report.html",
        scores=scores([link, "critical", "critical", "duplicate"], 2),
        texts=texts(rows),
        manifest=manifest(4, report()),
        categories=[[link], ["b"], ["b"], []],
    )
    for path in (tmp_path / "bench" / "report.html", tmp_path / "report.html"):
        page = browser.open(path)
        assert page.locator("main :is(a, i, img, svg tspan.line)").count() == 0, "no name made an element"
        drawn = " ".join(page.locator(".js-plotly-plot text").evaluate_all("all => all.map(it => it.textContent)"))
        shown = f"{page.inner_text('main')} {drawn}"
        assert "<a href='https://x.org/'>b</a>" in drawn and "\u202e" not in shown
        assert "$x$ %{x}" in shown and browser.complaints == []
        page.close()


def test_small_scores_are_told_apart(browser: Browser, tmp_path: Path) -> None:
    table = scores(["critical"] * 4, 2)
    table["score"] = [12.3456789, 4.2e-4, 0.0, -1.5e-7]
    rows = [{"prompt": "a", "completion": "b"}] * 4
    render_ranking(tmp_path / "report.html", scores=table, texts=texts(rows), manifest=manifest(4, report()))
    page = browser.open(tmp_path / "report.html")
    found = page.locator("#table tbody tr td:nth-child(2)").all_text_contents()
    assert found == ["12.346", "0.000420", "0.000", "\u22121.50e\u22127"]
    page.close()


def test_only_real_differences_of_the_harmful_score(browser: Browser, tmp_path: Path) -> None:
    table = results({"core": -20.0}, judge=["lenient", "strict"], noise=0.5)
    table.loc[(table["judge"] == "lenient") & (table["selector"] == "core"), "harmful_score"] += 20.0
    without = results({"core": -20.0}).rename(columns={"harmful_score": "loss_margin"})
    for name, found in (("two", table), ("none", without)):
        write_bench(tmp_path / name, found)
        assert main(["report", str(tmp_path / name), "--quiet"]) == 0
    page = browser.open(tmp_path / "two" / "report.html")
    page.check("#real")
    assert shown(page) == "1 to 2 of 2 cells (out of 4)", "by the second judge alone"
    page.close()
    page = browser.open(tmp_path / "none" / "report.html")
    assert not page.is_visible("#real"), "a loss margin is no harmful score"
    assert browser.complaints == []
    page.close()


def test_no_number_is_minus_zero(browser: Browser, tmp_path: Path) -> None:
    write_bench(tmp_path, results({"core": -0.03}, noise=0.0))
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    page = browser.open(tmp_path / "report.html")
    text = page.inner_text("main")
    assert "0.0" in text and not re.search(r"\u22120\.0+(?!\d)", text)
    page.close()


def test_labelling(browser: Browser, tmp_path: Path) -> None:
    asked, rows = [{"prompt": text, "completion": text} for text in NASTY], [{"prompt": "a", "completion": "b"}] * 3
    given = labelling(asked, known={100: "low_quality"})
    about = manifest(3, report())
    render_ranking(
        tmp_path / "report.html",
        scores=scores(["critical"] * 3, 1),
        texts=texts(rows),
        manifest=about,
        labelling=given,
    )
    page = browser.open(tmp_path / "report.html")
    card, texts_shown = page.locator("#label-card"), page.locator("#label-prompt")

    def progress() -> str:
        return str(page.inner_text("#label-progress"))

    def stored() -> dict[int, str]:
        return dict(page.evaluate("JSON.parse(localStorage.getItem('pharmacist-labels:abc'))"))

    page.wait_for_selector("#label-reveal:enabled")
    blur = "getComputedStyle(document.getElementById('label-prompt')).filter"
    assert progress() == "0 of 5 labelled · row 0 of the pool" and page.evaluate(blur) == "blur(6px)"
    card.focus()
    page.keyboard.press("g")
    assert progress().startswith("0 of 5"), "nobody labels what they have not seen"
    page.keyboard.press("Space")
    assert page.evaluate(blur) == "none" and texts_shown.text_content() == NASTY[0]
    page.keyboard.press("g")
    assert progress() == "1 of 5 labelled · row 7 of the pool" and page.evaluate(blur) == "blur(6px)"
    page.click("#label-texts")
    assert page.evaluate(blur) == "none"
    page.click("[data-label=harmful]")
    page.keyboard.press("Space")  # shows the next row, and does not press the button again
    assert stored() == {100: "low_quality", 0: "good", 7: "harmful"}
    page.keyboard.press("s")
    assert progress() == "2 of 5 labelled · row 21 of the pool"
    for _ in range(2):
        page.keyboard.press("u")
    assert progress() == "1 of 5 labelled · row 7 of the pool" and 7 not in stored()
    for _ in range(3):
        page.keyboard.press("Space")
        page.keyboard.press("l")
    page.keyboard.press("s")
    assert progress() == "4 of 5 labelled, 1 skipped" and page.inner_text("#label-reveal").startswith("Go through")
    page.focus("#search")
    page.keyboard.type("gh")
    assert progress() == "4 of 5 labelled, 1 skipped", "keys elsewhere on the page label nothing"
    with page.expect_download() as waiting:
        page.click("#label-download")
    assert waiting.value.suggested_filename == "labels.json"
    waiting.value.save_as(tmp_path / "labels.json")
    found = read_labels(tmp_path / "labels.json", "abc", [0, 7, 14, 21, 28, 100])
    assert found == {0: "critical", 1: "low_quality", 2: "low_quality", 3: "low_quality", 5: "low_quality"}
    page.reload()
    page.wait_for_selector("#label-reveal:enabled")
    assert progress() == "4 of 5 labelled · row 28 of the pool", "kept in the browser"
    card.focus()
    page.keyboard.press("Space")
    page.keyboard.press("h")
    assert progress() == "All 5 labelled" and page.locator("#label-texts").is_hidden()
    assert page.evaluate("window.hacked") is None and browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "blob:", "data:"))] == []
    page.close()


def test_on_paper_it_is_light_and_nothing_hidden_is_printed(browser: Browser, ranking: Path) -> None:
    page = browser.open(ranking, "?theme=dark")
    page.click("[data-reason=teaches_compliance]")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('#table .concealed .text')).visibility") == "hidden"
    assert page.locator("#filters").is_hidden() and page.locator("#theme").is_hidden()
    page.close()


def test_a_hundred_thousand_rows(browser: Browser, tmp_path: Path) -> None:
    """Bounds are wide, for machines differ; benchmarks/page.py measures on a quiet one."""
    n = 100_000
    reasons = [list(REASON_OF.values())[i % 6] for i in range(n)]
    rows = [{"prompt": f"prompt {i} " + "word " * 20, "completion": "answer " * 200} for i in range(n)]
    path = tmp_path / "report.html"
    render_ranking(path, scores=scores(reasons, 30_000), texts=texts(rows), manifest=manifest(n, report()))
    found = measure(browser, path)
    assert found["first paint"] < 2000
    slowest = {name: max(times) for name, times in found.items() if name not in {"first paint", "rows shown"}}
    assert all(time < 1000 for time in slowest.values()), slowest
