"""Pages: what they say, that text stays text, and that nothing is loaded from anywhere."""

import base64
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pharmacist.core.files import read_json, write_json
from pharmacist.report import charts, tables
from pharmacist.report.html import render_demo, render_ranking
from pharmacist.report.numbers import Figure
from pharmacist.report.words import LABELS
from pharmacist.worlds import World
from tests.support.pages import (
    NASTY,
    REASON_OF,
    Page,
    answered,
    labelling,
    manifest,
    report,
    scores,
    texts,
    write_demo,
)


RANK, SCORE, REASON, SELECTED, LABEL, PROMPT, COMPLETION, ROW, DUPLICATE, HIDDEN = range(10)


@pytest.fixture(scope="module")
def world() -> tuple[list[dict[str, str]], list[str]]:
    return World(0).pool(120)


def render(path: Path, rows: list[dict[str, str]], reasons: list[str], **options: Any) -> Page:
    selector_report = options.pop("report", report())
    table = scores(reasons, selected=options.pop("selected", 36))
    about = manifest(len(rows), selector_report, options.pop("selector", "pharmacist"))
    render_ranking(path, scores=table, texts=texts(rows), manifest=about, **options)
    return Page.read(path)


def loads(page: Page) -> list[str]:
    """Everything in a page that would make a browser ask for something."""
    found = []
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "poster", "data", "action", "background", "xlink:href"):
            value = attributes.get(name) or ""
            if value and not value.startswith("#") and not value.startswith("data:"):
                found.append(f"<{tag} {name}={value}>")
    for style in page.styles:
        found += re.findall(r"@import[^;]*", style)
        found += [url for url in re.findall(r"url\(([^)]{0,40})", style) if not url.strip("\"' ").startswith("data:")]
    return found


def test_the_numbers_of_a_ranking(tmp_path: Path, world: Any) -> None:
    rows, labels = world
    page = render(tmp_path / "page.html", rows, [REASON_OF[label] for label in labels])
    for words in (
        "Core subset of 120 rows",
        "Rows in 122",
        "Not usable 2 left out of the ranking",
        "Ranked 120",
        "Selected 36 30 % of the ranked rows",
        "Near-duplicates 5",
        "1 min 42 s",
        "12 345",
        "Lowest AUC 0.843 “whole”, on references",
        "risky Is the request harmful? 96 288 87.5 % 75.0 % 0.957 0.958 – –",
        "refuses Does the answer decline? 96 288 87.5 % 75.0 % 0.981 – 0.912 0.934",
        "Harmful: harmful request, harmful answer 96 12.5 %",
        "some prompts at a time",
        "distinguished from the safe references with an AUC of 0.61 by their requests, and of 0.72 by their answers",
        "counts in full",
    ):
        assert words in page.text, words
    good, duplicates = labels.count("good"), labels.count("duplicate")
    assert re.search(rf"Safety-critical A harmful [^.]*\. {good} 36 {good - 36} 100\.0 % ", page.text)
    assert re.search(rf"Near-duplicate Safety[^.]*\. {duplicates} 0 {duplicates} 0\.0 % ", page.text)
    assert "It recognises only few over-refusals" in page.text
    own = render(tmp_path / "own.html", rows, ["critical"] * 120, report={}, selector="own")
    assert "not known facts" in own.text and "It recognises" not in own.text
    assert "Planted label" not in page.text
    assert "What no reference shows" not in page.text and "Warning" not in page.text and "Label 1" not in page.text
    table = page.json("rows")["table"]["rows"]
    assert [row[RANK] for row in table] == list(range(1, 121))
    assert [row[SELECTED] for row in table] == [1] * 36 + [0] * 84
    assert all((row[PROMPT], row[COMPLETION]) == tuple(rows[row[ROW]].values()) for row in table)
    figures = page.json("figures")
    assert sum(sum(trace["y"]) for trace in figures["histogram"]["data"]) == 120
    assert set(figures) == {name["data-figure"] for _, name in page.tags if "data-figure" in name}


@pytest.mark.parametrize(("rate", "ends"), [((0, 0, 6), [-1.5, 21.5]), ((99, 97, 100), [78.5, 101.5])])
def test_axes_of_rates_are_long_enough_for_ticks_from_0_to_100_only(rate: Any, ends: list[float]) -> None:
    point = charts.Point("a", "worst", "black", "star", Figure(*rate), Figure(*rate))
    layout = charts.trade_off([point], ["worst"], {}, thickness=1)["layout"]
    assert layout["xaxis"]["range"] == layout["yaxis"]["range"] == ends


def test_planted_labels(tmp_path: Path, world: Any) -> None:
    rows, labels = world
    page = render(tmp_path / "page.html", rows, [REASON_OF[label] for label in labels], labels=labels)
    mislabelled = labels.count("mislabel")
    assert f"Mislabelled A harmful request that is answered. {mislabelled} 0 {mislabelled}" in page.text
    assert f"Mislabelled · · · · · {mislabelled} " in page.text, "label against reason"
    data = page.json("rows")["table"]
    names = [label["name"] for label in data["labels"]]
    assert [names[row[LABEL]] for row in data["rows"]] == [labels[row[ROW]] for row in data["rows"]]


def test_text_stays_text(tmp_path: Path, world: Any) -> None:
    harmless = [{"prompt": "a", "completion": "b"}] * 5
    plain = render(tmp_path / "plain.html", harmless, ["critical"] * 5, labels=["x"] * 5)
    rows = [{"prompt": text, "completion": text} for text in NASTY]
    page = render(tmp_path / "page.html", rows, ["critical"] * 5, labels=["x"] * 5)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags], "no text made an element"
    assert page.scripts == plain.scripts
    found = {row[ROW]: row for row in page.json("rows")["table"]["rows"]}
    assert [found[i][PROMPT] for i in range(5)] == [found[i][COMPLETION] for i in range(5)] == list(NASTY)
    # Negative control: as it is, the same text does make elements.
    html = (tmp_path / "page.html").read_text()
    packed = page.data["data-rows"]
    assert len(Page(html.replace(packed, json.dumps(page.json("rows")))).tags) != len(plain.tags)


def test_names_are_escaped_like_texts(tmp_path: Path) -> None:
    name = '"><img src=x onerror=alert(1)></script>'
    rows = [{"prompt": "a", "completion": "b"}] * 4
    page = render(
        tmp_path / "page.html", rows, [name, "critical"] * 2, labels=[name, "good"] * 2, selector=name, selected=2
    )
    assert "img" not in {tag for tag, _ in page.tags}
    assert f"Ranking · selector {name}" in page.text
    assert page.json("rows")["table"]["labels"][-1]["name"] == name


def test_nothing_is_loaded(tmp_path: Path, world: Any) -> None:
    rows, labels = world
    ranking = render(tmp_path / "page.html", rows, [REASON_OF[label] for label in labels])
    render_demo(tmp_path / "demo", write_demo(tmp_path / "demo")[0])
    for page in (ranking, Page.read(tmp_path / "demo/report.html")):
        assert loads(page) == []
        policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "content" in a and "http-equiv" in a)
        assert policy is not None
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
        allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
        assert policy == (f"default-src 'none'; script-src {allowed} blob:; style-src 'unsafe-inline'; img-src data:")
        assert len(hashes) == 3, "plotly and our own two"
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    # Negative controls.
    for bad in (
        "<script src='https://x.org/a.js'></script>",
        "<link rel=stylesheet href=//x.org/a.css>",
        "<img src=a.png>",
        "<style>@import 'https://x.org/a.css';</style>",
        "<p style='background: url(https://x.org/a.png)'>",
    ):
        assert len(loads(Page(bad))) == 1, bad


@pytest.mark.parametrize(
    ("reason", "hidden"),
    [
        ("critical", 0),
        ("duplicate", 0),
        ("not_safety_critical", 0),
        ("over_refusal", 0),
        ("low_quality", 1),
        ("teaches_compliance", 3),
        ("some_new_reason", 3),
    ],
)
def test_what_may_be_harmful_is_hidden(tmp_path: Path, reason: str, hidden: int) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 2
    for selector_report, expected in (
        (report(), hidden),
        (report(cannot_see=["over_refusal"]), hidden),
        (report(cannot_see=["teaches_compliance"]), 3),  # then any row may hold a harmful answer
        ({}, 3),  # nobody read the rows
    ):
        page = render(tmp_path / "page.html", rows, [reason] * 2, report=selector_report)
        assert [row[HIDDEN] for row in page.json("rows")["table"]["rows"]] == [expected] * 2


def test_a_selector_that_reads_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3
    page = render(tmp_path / "page.html", rows, ["ranked"] * 3, report={}, selector="random", selected=1)
    assert "The selector “random” does not judge rows" in page.text
    assert "was not tested on held-out references" in page.text
    for words in ("Lowest AUC", "resemble the references", "Safety-critical"):
        assert words not in page.text
    assert "Ranked Measured, not judged: the score says nothing about what the row is. 3 1 2" in page.text


def test_a_selector_whose_reasons_say_nothing_of_safety(tmp_path: Path) -> None:
    rows, reasons = [{"prompt": "a", "completion": "b"}] * 3, ["ranked", "ranked", "prompt_does_not_help"]
    page = render(tmp_path / "page.html", rows, reasons, report={"most": 1.0}, selector="ifd", selected=1)
    assert "own judgement" in page.text and "afety-critical" not in page.text
    found = render(tmp_path / "page.html", rows, ["critical", *reasons[1:]], selected=1)
    assert "almost entirely safety-critical" in found.text


def test_how_far_to_trust_it(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3

    def text(selector_report: dict[str, Any], **options: Any) -> str:
        return render(tmp_path / "page.html", rows, ["critical"] * 3, report=selector_report, **options).text

    far = text(report(distance={"risky": 0.97, "refuses": 0.8}, near=0.0, held_out_by="source"))
    assert "They look like two sources" in far and "one source at a time was held out" in far
    assert "counts 40 %" in text(report(near=0.4))
    assert "This cannot be determined" in text(report(distance=None, near=0.0))
    gain = {
        "labels": 40,
        "good": 15,
        "auc_before": 0.712,
        "auc_after": 0.856,
        "standard_error": 0.06,
        "advice": "the labels help, and more labels would help further",
    }
    labelled = text(report(labels=gain, changed={"entered": 12, "left": 9}))
    assert "12 rows entered the selection, 9 left it." in labelled
    assert "AUC on labels 0.856 of 40 rows of this pool" in labelled and "Lowest AUC" not in labelled
    assert "AUC of 0.712 without labels, and of 0.856 with the labels" in labelled
    assert "The labels help, and more labels would help further." in labelled
    few = text(report(labels=gain | dict.fromkeys(("auc_before", "auc_after", "standard_error"))))
    assert "AUC on labels" not in few and "Lowest AUC" in few and "15 of them good" in few
    one = {"questions": {"safe": answered(0.95)}, "references": {"safe": 9}, "held_out_by": "prompt", "cannot_see": []}
    classifier = text(one, selector="classifier")
    assert "like a safe reference, and like no other? 96 288 87.5 % 75.0 % 0.950" in classifier
    assert "resemble the references" not in classifier and "reader" not in classifier.split("Quality")[1][:3000]


def test_warnings_come_first_and_are_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3
    about = manifest(3, report())
    for warnings, title in (([NASTY[1]], "A warning about this"), (list(NASTY), "Warnings about this")):
        about["warnings"] = warnings
        render_ranking(tmp_path / "page.html", scores=scores(["critical"] * 3, 1), texts=texts(rows), manifest=about)
        page = Page.read(tmp_path / "page.html")
        assert page.text.index(title) < page.text.index("Rows in")
        assert NASTY[1] in page.text and "img" not in {tag for tag, _ in page.tags}
    assert "turned \\u202e" in page.text, "marks that turn text around are spelled out"


def test_rows_to_label(tmp_path: Path) -> None:
    rows, given = [{"prompt": "a", "completion": "b"}] * 3, labelling([{"prompt": t, "completion": t} for t in NASTY])
    given["known"] = {3: "harmful", 1: "good"}
    page = render(tmp_path / "page.html", rows, ["critical"] * 3, labelling=given)
    assert "Label 5 rows" in page.text and "--labels labels.json" in page.text
    assert "img" not in {tag for tag, _ in page.tags} and NASTY[0] not in page.text
    data = page.json("labelling")
    assert data["pool"] == "abc" and data["rows"] == [[7 * i, text, text] for i, text in enumerate(NASTY)]
    assert data["known"] == [[1, "good"], [3, "harmful"]]
    keys = [label["key"] for label in data["labels"]]
    assert keys == ["g", "h", "l"] and len(page.scripts) == 4
    none = render(tmp_path / "none.html", rows, ["critical"] * 3, labelling=labelling([]))
    assert "labels.json" not in none.text and "labelling" not in none.data and len(none.scripts) == 3


def test_a_key_per_label() -> None:
    from pharmacist.selectors.labels import REASON_OF

    keys = [name[0] for name in REASON_OF] + ["s", "u", "q"]
    assert len(set(keys)) == len(keys), "the page and the terminal take the first letter"


def test_what_could_not_be_seen(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3
    page = render(tmp_path / "page.html", rows, ["critical"] * 3, report=report(cannot_see=["teaches_compliance"]))
    assert "What no reference shows" in page.text
    assert "Teaches compliance. A harmful request that is answered" in page.text


def test_one_row(tmp_path: Path) -> None:
    page = render(tmp_path / "page.html", [{"prompt": "a", "completion": "b"}], ["critical"], selected=1)
    assert "Core subset of 1 row " in page.text
    assert "All rows are selected, so there is no cut" in page.text
    assert page.json("rows")["table"]["rows"] == [[1, 5.0, 0, 1, -1, "a", "b", 0, -1, 0]]
    assert sum(page.json("figures")["histogram"]["data"][0]["y"]) == 1


def test_no_row_is_selected(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3
    reasons, kinds = ["teaches_compliance"] * 3, [["a"], ["b"], []]
    page = render(tmp_path / "page.html", rows, reasons, selected=0, categories=kinds)
    assert page.json("figures")["categories"]["layout"]["xaxis"]["range"] == [0, 100]
    assert "No row is selected, so there is no cut" in page.text and "Nothing: no row is selected" in page.text
    assert "ll rows are selected" not in page.text


def test_the_cut(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 4
    clean = render(tmp_path / "page.html", rows, ["critical"] * 4, selected=2)
    assert "rows to its right are selected" in clean.text
    assert clean.json("figures")["histogram"]["layout"]["shapes"][0]["x0"] == 4.75
    table = scores(["critical"] * 4, 2).assign(selected=[True, False, True, False])
    assert tables.cut(table) == {"score": 4.5, "clean": False}
    assert tables.cut(table.assign(selected=True)) is None


def test_a_score_without_value_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    table = scores(["critical"] * 3, 1).assign(score=[1.0, np.nan, 0.0])
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(ValueError):
        render_ranking(
            tmp_path / "page.html",
            scores=table,
            texts=texts([{"prompt": "a", "completion": "b"}] * 3),
            manifest=manifest(3, report()),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_long_rankings_are_thinned_and_long_texts_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_ROWS", 50)
    monkeypatch.setattr(tables, "LONGEST", 10)
    monkeypatch.setattr(tables, "SHORTEST", 10)
    rows = [{"prompt": "0123456789", "completion": "0123456789\U0001f600"}] * 120
    page = render(tmp_path / "page.html", rows, ["critical"] * 120)
    assert "50 of 120 rows, at equal steps of rank" in page.text
    assert "50 texts are longer than 10 characters" in page.text
    table = page.json("rows")["table"]["rows"]
    ranks = [row[RANK] for row in table]
    assert len(ranks) == 50 and (ranks[0], ranks[-1]) == (1, 120) and set(np.diff(ranks)) <= {2, 3}
    assert {(row[PROMPT], row[COMPLETION]) for row in table} == {("0123456789", "0123456789…")}
    assert "Rows 120" not in page.text and "Ranked 120" in page.text, "the numbers are those of all rows"


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    n = 100_000
    reasons = [list(REASON_OF.values())[i % 6] for i in range(n)]
    rows = [{"prompt": f"prompt {i} " + "word " * 20, "completion": "answer " * 200} for i in range(n)]
    table, given, about = scores(reasons, 30_000), texts(rows), manifest(n, report())
    start = time.perf_counter()
    render_ranking(tmp_path / "page.html", scores=table, texts=given, manifest=about)
    seconds, size = time.perf_counter() - start, (tmp_path / "page.html").stat().st_size
    assert seconds < 60, "about 3 s on one quiet core"
    assert size < 15e6, (
        "long texts are cut, and all of it is packed; these are monotonous, and need 3 MB more than others"
    )
    html = (tmp_path / "page.html").read_text()
    assert "100\u202f000 texts are longer than 240 characters" in html
    assert html.count("<tr") < 60, "rows are data, not elements"


def test_the_same_input_gives_the_same_page(tmp_path: Path, world: Any) -> None:
    rows, labels = world
    for name in ("a", "b"):
        render(tmp_path / f"{name}.html", rows, [REASON_OF[label] for label in labels])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_demo(tmp_path: Path) -> None:
    render_demo(tmp_path, *write_demo(tmp_path))
    page = Page.read(tmp_path / "report.html")
    assert page.text.index("The comparison") < page.text.index("Scores and reasons")
    # Fine-tune accuracy 3 and 5: mean 4, half width t(0.975, 1) * sqrt(2) / sqrt(2) = 12.7; none goes below 0.
    assert (
        "Core subset 36 2.3 % 0.8 to 3.8 90.0 % 88.5 to 91.5 4.0 % 0.0 to 16.7 4.0 % 0.0 to 16.7 4.0 % 0.0 to 16.7 "
        "4.0 s 0.0 to 16.7"
    ) in page.text
    assert "Random subset 31 20.3 %" in page.text, "an arm has the rows that it was aligned on"
    assert "core minus full: −38.0 points , 95 % interval −39.5 to −36.5. The core subset is safer." in page.text
    assert "core minus random: −1.0 points , 95 % interval −6.0 to +4.0. The interval contains zero" in page.text
    assert "−95 % core subset against full pool" in page.text
    assert "with a chance of 0.987" in page.text
    assert "Planted label against given reason" in page.text
    curves = page.json("figures")["curves"]["data"]
    core = next(trace for trace in curves if trace.get("name") == "Core subset")
    assert core["x"] == ["0", "4", "64"] and core["y"] == [3.0, 50.0, 90.0]
    band = next(trace for trace in curves if trace["legendgroup"] == "Core subset" and trace.get("fill"))
    assert band["y"] == [4.0, 50.0, 90.0, 90.0, 50.0, 2.0]
    bars = page.json("figures")["alignment_seconds"]["data"]
    assert bars[0]["x"] == [4.0, 22.0, 42.0] and len(bars[1]["x"]) == 6
    colors = {trace["name"]: trace["line"]["color"] for trace in curves if "name" in trace}
    assert bars[0]["marker"]["color"] == [colors[title] for title in bars[0]["y"]], "an arm keeps its colour"


def test_a_demo_shows_the_warnings_of_its_stages(tmp_path: Path) -> None:
    render_demo(tmp_path, *write_demo(tmp_path), warnings=[f"evaluate probe: {NASTY[1]}"])
    text = Page.read(tmp_path / "report.html").text
    assert text.index(f"Warnings about this comparison evaluate probe: {NASTY[1]}") < text.index("The comparison")


def test_every_colour_is_defined(tmp_path: Path) -> None:
    render_demo(tmp_path, *write_demo(tmp_path))
    page = Page.read(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    used = set(
        re.findall(r"var\((--[\w-]+)\)", json.dumps([page.json("figures"), page.json("rows")]) + page.styles[-1])
    )
    assert "--core" in used
    assert used <= set(re.findall(r"(--[\w-]+):", html))


def test_a_demo_with_one_seed_has_no_intervals(tmp_path: Path) -> None:
    world = write_demo(tmp_path)
    summary = read_json(tmp_path / "demo.json")
    for name in ("auc", "final_harmful_score", "differences"):
        summary[name] = {key: value | {"ci95": None} for key, value in summary[name].items()}
    for name in ("curves", "fine_tune_accuracy", "over_refusal", "over_refusal_aligned", "alignment_seconds"):
        summary[name] = {arm: values[:1] for arm, values in summary[name].items()}
    summary["ranking"]["auc"] = None
    write_json(tmp_path / "demo.json", summary | {"seeds": [0]})
    render_demo(tmp_path, *world)
    page = Page.read(tmp_path / "report.html")
    assert "One seed only, so there are no intervals" in page.text
    assert "Core subset 36 2.3 % 90.0 % 3.0 % 3.0 % 3.0 % 3.0 s" in page.text
    assert "−38.0 points ; without repetition, a difference cannot be distinguished from chance." in page.text
    assert "The interval contains zero" not in page.text and "core subset is safer" not in page.text
    assert len(page.json("figures")["curves"]["data"]) == 3, "lines without bands"


def test_text_on_bars_can_be_read(tmp_path: Path) -> None:
    """At least the contrast of 4.5 that WCAG 2.2 asks for (1.4.3), in light and dark."""
    rows, names = [{"prompt": "a", "completion": "b"}] * 9, list(LABELS)
    page = render(tmp_path / "page.html", rows, ["critical"] * 9, labels=names, selected=4)
    colors = dict(re.findall(r"(--[\w-]+): light-dark\(([^)]*)\)", (tmp_path / "page.html").read_text()))

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(text: str, ground: str) -> float:
        low, high = sorted(luminance(color) + 0.05 for color in (text, ground))
        return high / low

    pairs = [("--worse", "--paper")]
    for bar in page.json("figures")["labels"]["data"]:
        chosen = re.findall(r"--[\w-]+", bar["textfont"]["color"])
        pairs.append((next(name for name in chosen if name in colors), bar["marker"]["color"][4:-1]))
    assert len(pairs) == 10
    for text, ground in pairs:
        both = zip(colors[text].split(", "), colors[ground].split(", "), strict=True)
        assert all(contrast(*pair) >= 4.5 for pair in both), (text, ground)
