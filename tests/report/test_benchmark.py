"""Tables and page of a benchmark: numbers, what counts as a real difference, and that a chance one is not bold."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pharmacist.cli.main import main
from pharmacist.core.errors import DataError
from pharmacist.report.benchmark import Benchmark, Value, corrected, summaries, to_latex, to_markdown, verdicts
from pharmacist.report.numbers import Figure
from tests.support.benches import results, write_bench
from tests.support.pages import Page


def line(benchmark: Benchmark, selector: str, defense: str = "sft") -> dict[str, Value]:
    (found,) = [it for it in benchmark.lines if it.axes["selector"] == selector and it.axes["defense"] == defense]
    return dict(found.values)


def bold(table: str, selector: str) -> list[str]:
    return [cell for row in table.splitlines() if f"| {selector} " in row for cell in re.findall(r"\*\*.*?\*\*", row)]


def test_means_and_paired_differences() -> None:
    table = results({"pharmacist": -12.0})
    value = line(Benchmark(table), "pharmacist")["harmful_score"]
    own, full = (
        table[(table["selector"] == name) & (table["defense"] == "sft")].set_index("seed")["harmful_score"]
        for name in ("pharmacist", "full")
    )
    assert value.mean == pytest.approx(own.mean()) and value.seeds == 5
    low, high = stats.t.interval(0.95, 4, own.mean(), stats.sem(own))
    assert (value.low, value.high) == pytest.approx((low, high))
    reference = stats.ttest_rel(own, full)
    assert value.difference.mean == pytest.approx((own - full).mean())
    assert (value.difference.low, value.difference.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert value.p == pytest.approx(reference.pvalue)
    assert value.high - value.low > 2 * (value.difference.high - value.difference.low), "pairing takes seeds away"
    # The order of the rows does not matter.
    again = line(Benchmark(table.sample(frac=1, random_state=1)), "pharmacist")["harmful_score"]
    assert again == pytest.approx(value) or vars(again) == pytest.approx(vars(value))


def test_only_real_differences_are_bold() -> None:
    benchmark = Benchmark(results({"random": 0.0, "pharmacist": -12.0, "bad": 12.0}, noise=0.5))
    assert line(benchmark, "pharmacist")["harmful_score"].verdict == 1
    assert line(benchmark, "bad")["harmful_score"].verdict == -1
    assert line(benchmark, "random")["harmful_score"].verdict == 0
    assert line(benchmark, "full")["harmful_score"].verdict is None
    table = to_markdown(benchmark)
    assert len([cell for cell in bold(table, "pharmacist") if cell.startswith("**−1")]) == 3, "and over both defenses"
    assert [cell for cell in bold(table, "random") if not cell.startswith("**−70")] == [], "only its time is real"
    assert bold(table, "full") == []
    latex = to_latex(benchmark)
    rows = [row for row in latex.splitlines() if row.startswith("sft & random")]
    assert len(rows) == len(benchmark.metrics), "a table per metric"
    assert "".join(rows).count("\\textbf") == 1
    assert sum("\\textbf{+1" in row for row in latex.splitlines() if row.startswith("sft & bad")) == 1
    assert all(f"\\label{{tab:benchmark-{metric.name}}}" in latex for metric in benchmark.metrics)


def test_a_mean_over_fewer_comparisons_than_others_says_so() -> None:
    table = results({"random": 0.0, "pharmacist": -12.0}, noise=0.5)
    table = table[(table["selector"] != "random") | (table["defense"] == "sft")]
    _, _, (pharmacist, random) = next(summaries(Benchmark(table)))
    assert random[1].endswith(" (1 of 2)") and pharmacist[1].endswith("*")


def test_a_difference_that_is_real_alone_may_not_be_among_many() -> None:
    """Holm's correction by hand: the smallest p times the number of tests, the next times one less, and so on."""
    values = [Value(0, 0, 0, 5, difference=Figure(-1.0), p=p) for p in (0.04, 0.001, 0.3, 0.012)]
    after = corrected([values[0]], better=-1)[0]
    assert after is not None and after.verdict == 1
    found = corrected(values, better=-1)
    assert [value.p_corrected for value in found if value] == pytest.approx([0.08, 0.004, 0.3, 0.036])
    assert [value.verdict for value in found if value] == [0, 1, 0, 1]


@pytest.mark.slow
def test_chance_is_seldom_bold() -> None:
    """Where nothing differs, 5 % of benchmarks have a bold harmful score at most: of 200, 10 on average."""
    rng, wrong, uncorrected = np.random.default_rng(3), 0, 0
    base = results({"a": 0.0, "b": 0.0, "c": 0.0}, defenses=["sft", "booster"], seeds=5)
    base = base.drop(columns=["harmful_score_over_attack", "fine_tune_accuracy", "alignment_seconds"])
    for _ in range(200):
        benchmark = Benchmark(base.assign(harmful_score=rng.normal(50, 3, len(base))))
        scores = [it.values["harmful_score"] for it in benchmark.lines]
        wrong += any(value.verdict for value in scores)
        uncorrected += any(value.p is not None and value.p < 0.05 for value in scores)
    assert wrong <= 20
    assert uncorrected > 30, "negative control: without correction chance would be bold much more often"


def test_what_cannot_be_tested_is_not_bold() -> None:
    one = Benchmark(results({"pharmacist": -50.0}, seeds=1))
    value = line(one, "pharmacist")["harmful_score"]
    assert (value.low, value.p, value.verdict) == (None, None, 0)
    assert "**" not in to_markdown(one) and "One seed" in to_markdown(one)
    same = results({"pharmacist": 0.0}, seeds=5)
    same["harmful_score"] = np.where(same["selector"] == "full", 10.1, 9.3) + same["seed"]
    value = line(Benchmark(same), "pharmacist")["harmful_score"]
    assert value.p is None and value.verdict == 0 and value.difference.mean == pytest.approx(-0.8)
    assert Benchmark(same).comparisons["harmful_score"] == 0
    assert (value.difference.low, value.difference.high) == (None, None), "no spread, no interval of width 0"
    assert "none where all seeds agree" in to_markdown(Benchmark(same))
    without = Benchmark(results({"pharmacist": -50.0}).query("selector != 'full'"))
    assert not without.has_baseline and "minus full" not in to_markdown(without) and verdicts(without) == []


def test_where_nothing_is_tested_no_test_is_spoken_of() -> None:
    table = results({"pharmacist": -12.0}, seeds=3).query("selector != 'full' or seed == 0")
    text = to_markdown(Benchmark(table))
    assert "3 seeds with 95 % intervals" in text and "paired by seed" in text and "comparisons" not in text


def test_no_interval_of_a_rate_reaches_beyond_what_is_possible() -> None:
    table = results({"pharmacist": 0.0}, seeds=3)
    core = table["selector"] == "pharmacist"
    table.loc[core, "harmful_score"] = table.loc[core, "seed"].map({0: 0.0, 1: 0.0, 2: 3.0})
    table.loc[core, "alignment_seconds"] = table.loc[core, "seed"].map({0: 1.0, 1: 9.0, 2: 1.0})
    table.loc[~core, "harmful_score"] = table.loc[~core, "seed"].map({0: 90.0, 1: 100.0, 2: 100.0})
    core_line, full = (line(Benchmark(table), name) for name in ("pharmacist", "full"))
    assert (core_line["harmful_score"].low, full["harmful_score"].high) == (0.0, 100.0)
    assert core_line["harmful_score"].difference.low == -100.0
    assert core_line["alignment_seconds"].low == 0.0, "nor does a time fall below 0"


def test_over_all_defenses_runs_are_averaged_before_they_are_compared() -> None:
    table = results({"random": 0.0, "pharmacist": -12.0}, defenses=["sft", "booster", "vaccine"])
    lost = (table["selector"] == "random") & (table["defense"] == "sft") & (table["seed"] == 4)
    table.loc[lost, "harmful_score"] = np.nan
    overall = Benchmark(table).over_defenses
    assert overall is not None and overall.order["defense"] == ["all 3"]
    means = table.groupby(["selector", "seed"])["harmful_score"].mean().unstack("selector")
    reference = stats.ttest_rel(means["pharmacist"], means["full"])
    value = line(overall, "pharmacist", "all 3")["harmful_score"]
    assert value.difference.mean == pytest.approx((means["pharmacist"] - means["full"]).mean())
    assert (value.difference.low, value.difference.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    # A seed that one defense lacks is not averaged over the others.
    assert line(overall, "random", "all 3")["harmful_score"].seeds == 4
    assert overall.comparisons["harmful_score"] == 2, "a family of its own"
    for text in (to_markdown(Benchmark(table)), to_latex(Benchmark(table))):
        assert text.count("over the defenses booster, sft, vaccine") == 1
    one = Benchmark(results({"pharmacist": -12.0}, defenses=["sft"]))
    assert one.over_defenses is None and "over the defenses" not in to_markdown(one)


def test_a_mean_and_its_interval_are_of_the_same_seeds() -> None:
    """Seeds that one defense of an unfinished grid lacks move neither the mean nor its interval."""
    table = results({"pharmacist": -12.0})
    first, late = table["defense"] == "sft", table["seed"] >= 3
    table.loc[first & ~late & (table["selector"] == "pharmacist"), "harmful_score"] -= 60
    (shown,) = verdicts(Benchmark(table[first | late]))
    score = shown["metrics"]["harmful_score"]
    means = table[late].groupby(["selector", "seed"])["harmful_score"].mean().unstack("selector")
    assert score["mean"] == pytest.approx((means["pharmacist"] - means["full"]).mean())
    assert score["low"] < score["mean"] < score["high"] and score["n"] == 2
    # No seed in all defenses: no interval, certainly not that of one defense.
    (shown,) = verdicts(Benchmark(table[first != late]))
    score = shown["metrics"]["harmful_score"]
    assert score["mean"] < -30 and (score["low"], score["high"], score["n"]) == (None, None, 2)


def test_a_line_with_fewer_seeds_than_others_says_so() -> None:
    table = results({"pharmacist": -12.0})
    text = to_markdown(Benchmark(table[(table["selector"] == "full") | (table["seed"] < 2)]))
    assert "| pharmacist (2 of 5 seeds) |" in text and "full (" not in text


def test_another_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = results({"less": -8.0, "pharmacist": -20.0}, noise=0.5)
    value = line(Benchmark(table, baseline="less"), "pharmacist")["harmful_score"]
    assert value.difference.mean == pytest.approx(-12.0, abs=1) and value.verdict == 1
    assert line(Benchmark(table, baseline="less"), "less")["harmful_score"].difference is None
    assert line(Benchmark(table, baseline="less"), "full")["harmful_score"].difference.mean == pytest.approx(8, abs=1)
    # With several fractions it is that of the same fraction.
    several = results({"less": -8.0, "pharmacist": -20.0}, noise=0.5, fractions=(0.1, 0.3), defenses=["sft"])
    several.loc[(several["selector"] == "less") & (several["fraction"] == 0.1), "harmful_score"] += 50.0
    found = Benchmark(several, baseline="less").lines
    differences = {it.series: it.values["harmful_score"].difference for it in found}
    assert differences["pharmacist", 0.1].mean == pytest.approx(-62, abs=1)
    assert differences["pharmacist", 0.3].mean == pytest.approx(-12, abs=1)
    assert differences["full", 1.0] is None
    write_bench(tmp_path, table)
    assert main(["report", str(tmp_path), "--baseline", "les"]) == 2
    assert "has no selector 'les'; did you mean 'less'?" in " ".join(capsys.readouterr().err.split())
    assert main(["report", str(tmp_path), "--baseline", "less", "--quiet"]) == 0
    page = Page.read(tmp_path / "report.html")
    assert "Against less" in page.text and "Against the full" not in page.text
    assert re.search(r"pharmacist −1\d\.\d \[−1\d\.\d, −1\d\.\d\] better in 2 of 2", page.text)
    assert "minus less" in (tmp_path / "tables.md").read_text()


def test_a_baseline_that_the_grid_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bench(tmp_path, results({"less": -8.0}))
    assert main(["report", str(tmp_path), "--baseline", "les"]) == 2
    assert "--baseline: the grid has no selector 'les'; did you mean 'less'?" in capsys.readouterr().err


def test_pairs_need_the_same_seed_and_cell() -> None:
    table = results({"pharmacist": -12.0}, attack=["weak", "strong"])
    table = table[~((table["selector"] == "full") & (table["seed"] > 2) & (table["attack"] == "weak"))]
    table.loc[(table["selector"] == "full") & (table["attack"] == "strong"), "harmful_score"] = np.nan
    benchmark = Benchmark(table)
    by_attack = {
        it.axes["attack"]: it.values
        for it in benchmark.lines
        if it.series == ("pharmacist", 0.3) and it.axes["defense"] == "sft"
    }
    weak, strong = by_attack["weak"]["harmful_score"], by_attack["strong"]["harmful_score"]
    assert weak.seeds == 5 and weak.difference is not None
    seeds = table[(table["attack"] == "weak") & (table["defense"] == "sft") & (table["seed"] <= 2)]
    means = seeds.groupby("selector")["harmful_score"].mean()
    assert weak.difference.mean == pytest.approx(means["pharmacist"] - means["full"]), "of three pairs"
    assert strong.difference is None and strong.verdict is None
    assert "over_refusal" not in {metric.name for metric in benchmark.metrics}, "it was not measured"


def test_the_order_is_that_of_the_grid() -> None:
    order = {"selector": ["full", "zebra", "ant"], "defense": ["vaccine", "sft"]}
    benchmark = Benchmark(results({"ant": 0, "zebra": 0}, defenses=["sft", "vaccine"]), order)
    assert [(it.axes["defense"], it.axes["selector"]) for it in benchmark.lines[:3]] == [
        ("vaccine", "full"),
        ("vaccine", "zebra"),
        ("vaccine", "ant"),
    ]
    assert [name for name, _ in benchmark.series] == order["selector"]
    several = Benchmark(results({"ant": 0}, fractions=(0.1, 0.3)))
    assert [several.name(series) for series in several.series] == ["full", "ant 10 %", "ant 30 %"]


def test_a_page_without_the_full_pool_does_not_speak_of_it(tmp_path: Path) -> None:
    table = results({"less": -5.0}, fractions=(0.1, 0.3))
    for name, rows in (("with", table), ("without", table[table["selector"] != "full"])):
        write_bench(tmp_path / name, rows)
        assert main(["report", str(tmp_path / name), "--quiet"]) == 0
        text = Page.read(tmp_path / name / "report.html").text
        assert ("no selector “full”" in text) is (name == "without")
        for words in ("The dashed line is the full pool", "significant differences from the full pool are in bold"):
            assert (words in text) is (name == "with")
    assert main(["report", str(tmp_path / "with"), "--baseline", "less", "--quiet"]) == 0
    text = Page.read(tmp_path / "with" / "report.html").text
    assert "Nothing is compared with less: no run" in text and "no selector" not in text, "full has another fraction"


def test_no_number_is_minus_zero() -> None:
    assert Figure(-0.04, -0.04, 0.03).text(sign="+") == "+0.0 [0.0, 0.0]"
    assert Figure(-0.04).text(digits=2) == "-0.04"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[:0], "no cell is finished"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "two rows for m / p / mix"),
    ],
)
def test_results_that_cannot_be_used(change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Benchmark(change(results({"pharmacist": -12.0})))


NASTY = 'a|b_"%$<script>window.hacked=1</script>'
NASTIER = NASTY + "\n| *x* | [c](javascript:d) `e` \x1b[2J\u202e"


@pytest.mark.parametrize("name", [NASTY, NASTIER])
def test_names_are_escaped(name: str, tmp_path: Path) -> None:
    table = results({name: -12.0}, defenses=[name, "sft"])
    failed = {"axes": {}, "failed": [{"stage": "x", "error": name, "cells": 1}]}
    write_bench(tmp_path, table, extra=failed, warnings=[f"a warning of {name}"])
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    page = Page.read(tmp_path / "report.html")
    assert f"a warning of {NASTY}" in page.text
    assert len(page.scripts) == 3 and not any("hacked" in script for script in page.scripts)
    assert NASTY in page.text
    figures = json.dumps(page.json("figures"), ensure_ascii=False)
    assert "<script>" not in figures and "&lt;script&gt;" in figures, "charts take names for HTML"
    assert not {"\x1b", "\u202e"} & set(page.text + figures)
    latex, markdown = (tmp_path / "tables.tex").read_text(), (tmp_path / "tables.md").read_text()
    assert "a|b\\_" in latex and "\\%\\$" in latex and "b_" not in latex
    for part in markdown.split("The same over"):
        rows = [row for row in part.splitlines() if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, "a name makes no column"
    for text in (latex, markdown):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<script>" not in markdown and not re.search(r"(?<!\\)[`\[](?=c|e)", markdown)


def test_numbers_and_names_in_markdown_are_as_written() -> None:
    table = with_margin(results({"2e1": -12.0}, pool=["007"], defenses=["sft"], seeds=1))
    text = to_markdown(Benchmark(table))
    assert "| 2e1 " in text and "| 007 " not in text, "one pool needs no column"
    assert "0.300 |" in text and "+0.500 |" in text, "three digits and the sign of a difference"
    assert "| 007 " in to_markdown(Benchmark(results({"2e1": -12.0}, pool=["007", "2e1"], defenses=["sft"], seeds=1)))


def test_names_are_no_arguments_of_line_breaks() -> None:
    table = results({"[core]": -12.0, "*": 0.0}, defenses=["<b~"])
    rows = [line for line in to_latex(Benchmark(table)).splitlines() if line.endswith("\\\\") and " & " in line]
    assert any(row.startswith("{[}core] &") for row in rows) and any(row.startswith("{*} &") for row in rows)
    assert not [row for row in rows if row.startswith(("[", "*"))], "LaTeX reads these as arguments of the \\\\ before"
    several = to_latex(Benchmark(results({"core": -12.0}, defenses=["<b~", "sft"])))
    assert "$<$b\\textasciitilde{} &" in several


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selectors = ["full", "random", "pharmacist"]
    table = results({"random": 0.0, "pharmacist": -20.0}, fractions=(0.1, 0.3), attack=["mild", "hard"], noise=0.5)
    write_bench(tmp_path, table, extra={"axes": {"selector": selectors, "attack": ["mild", "hard"]}, "failed": []})
    assert main(["report", "--run", str(tmp_path)]) == 0
    assert f"report {tmp_path}" in capsys.readouterr().err.replace("\n", "")
    page = Page.read(tmp_path / "report.html")
    assert "Benchmark · 20 cells · 5 seeds" in page.text
    assert ", seeds 0, 1, 2, 3, 4." in page.text
    assert re.search(r"pharmacist 30 % −(19|20|21)\.\d better in 4 of 4", page.text), "no interval over settings"
    assert re.search(r"random 30 % [+−]0\.\d none of 4", page.text)
    assert "This grid is incomplete" not in page.text
    assert "over the 16 comparisons of its metric" in page.text
    figures = page.json("figures")
    assert set(figures) == {name["data-figure"] for _, name in page.tags if "data-figure" in name}
    assert set(figures) == {"trade_off", "cost", "curve-0", "curve-1", "fraction-0", "fraction-1"}
    assert {len(figure) for figure in figures.values()} == {2}, "one per attack"
    points = figures["trade_off"][0]["data"][2]
    assert len(points["x"]) == 4 and all(array > 0 for array in points["error_y"]["array"]), "defenses x fractions"
    core = table.query("selector == 'pharmacist' and attack == 'mild' and fraction == 0.1 and defense == 'booster'")
    assert points["y"][0] == pytest.approx(core["harmful_score"].mean())
    curve = figures["curve-0"][0]["data"][-2]
    assert curve["name"] == "pharmacist 10 %" and curve["x"] == ["0", "8", "64"]
    assert curve["y"] == pytest.approx(np.mean(core["harmful_scores"].tolist(), axis=0).tolist())
    fractions = figures["fraction-0"][0]["data"]
    assert [trace["x"] for trace in fractions] == [[100], [10, 30], [10, 30]]
    bars = figures["cost"][0]["data"]
    assert len(bars) == 2 and len(bars[0]["x"]) == 10
    found = page.json("results")
    assert len(found["rows"]) == 20 and {len(row) for row in found["rows"]} == {len(found["columns"])}
    used = set(re.findall(r"var\((--[\w-]+)\)", json.dumps([figures, found]) + page.styles[-1]))
    assert used <= set(re.findall(r"(--[\w-]+):", (tmp_path / "report.html").read_text())), "every colour is defined"
    before = [(tmp_path / name).read_bytes() for name in ("report.html", "tables.md", "tables.tex")]
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    assert [(tmp_path / name).read_bytes() for name in ("report.html", "tables.md", "tables.tex")] == before


def test_ends_of_curves_are_one_where_seeds_have_other_numbers_of_steps(tmp_path: Path) -> None:
    table = results({"core": -20.0}, defenses=["sft"])
    table["attack_steps"] = [[0, 8, 63 + seed % 2] for seed in table["seed"]]
    write_bench(tmp_path, table, extra={"axes": {"selector": ["full", "core"]}, "failed": []})
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    curves = Page.read(tmp_path / "report.html").json("figures")["curve-0"][0]["data"]
    (curve,) = [it for it in curves if it.get("name", "").startswith("core") and not it.get("fill")]
    core = table[table["selector"] == "core"]
    assert curve["x"] == ["0", "8", "64"]
    assert curve["y"] == pytest.approx(np.mean(core["harmful_scores"].tolist(), axis=0).tolist()), "of all seeds"


def with_margin(table: pd.DataFrame) -> pd.DataFrame:
    """A table with loss margins, which are the same under every judge: -0.2 at the end for `full`, else 0.5 more."""
    ends = -0.2 + 0.5 * (table["selector"] != "full") + 0.01 * table["seed"] * (1 + (table["selector"] != "full"))
    curves = [[end + 1.0, end, end] for end in ends]
    return table.assign(loss_margin=ends, loss_margin_over_attack=ends + 0.5 * 8 / 64, loss_margins=curves)


def test_the_loss_margin() -> None:
    benchmark = Benchmark(with_margin(results({"pharmacist": 0.0}, defenses=["sft"])))
    value = line(benchmark, "pharmacist")["loss_margin"]
    assert value.mean == pytest.approx(0.34) and value.difference.mean == pytest.approx(0.52), "no bounds"
    assert value.verdict == 1, "higher is better"
    assert line(benchmark, "full")["loss_margin"].mean == pytest.approx(-0.18)
    over = line(benchmark, "full")["loss_margin_over_attack"]
    assert over.mean == pytest.approx(-0.18 + 0.5 * 8 / 64)
    table = to_markdown(benchmark)
    assert "Loss margin, nats minus full" in table and "0.340 [0.301, 0.379]" in table and "**+0.520 [0.500," in table
    assert "tab:benchmark-loss_margin_over_attack" in to_latex(benchmark)


def test_judges_are_never_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = with_margin(results({"pharmacist": -20.0}, noise=0.5, judge=["a*b", "keyword"]))
    table.loc[table["judge"] == "keyword", ["harmful_score", "harmful_score_over_attack"]] += 15.0
    # Seconds are the same under both judges; the accuracies differ, as where an entry's options change the answers.
    runs = table.groupby(["selector", "defense", "seed"])
    table["alignment_seconds"] = runs["alignment_seconds"].transform("first")
    benchmark = Benchmark(table, {"judge": ["keyword", "a*b"]})
    assert list(benchmark.groups) == ["Judge: keyword", "Judge: a*b", "Without a judge"] and len(benchmark.lines) == 4
    for judge in ("keyword", "a*b"):
        alone = Benchmark(table[table["judge"] == judge])
        for name in ("full", "pharmacist"):
            found, expected = (line(it, name) for it in (benchmark, alone))
            assert found[f"harmful_score by {judge}"].mean == expected["harmful_score"].mean
            assert found["loss_margin"].mean == expected["loss_margin"].mean
    assert benchmark.comparisons["harmful_score"] == 4, "both judges are one family"
    assert benchmark.comparisons["loss_margin"] == benchmark.comparisons["alignment_seconds"] == 2, "once"
    assert benchmark.comparisons["fine_tune_accuracy"] == 4
    write_bench(tmp_path, table, extra={"axes": {"judge": ["keyword", "a*b"]}, "failed": []})
    assert main(["report", str(tmp_path)]) == 0
    console = " ".join(capsys.readouterr().err.split())
    assert "minus full, mean over defenses and settings" in console and "+0.520*" in console
    markdown, latex = ((tmp_path / name).read_text() for name in ("tables.md", "tables.tex"))
    heads = [row for row in markdown.split("The same over")[0].splitlines() if row.startswith("| defense")]
    assert [("by keyword" in head, r"by a\*b" in head, "Loss margin, nats mean" in head) for head in heads] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert latex.count("label{tab:benchmark-harmful_score-2}") == latex.count("label{tab:benchmark-loss_margin}") == 1
    page = Page.read(tmp_path / "report.html")
    assert "Aligned on Judge: keyword Judge: a*b Without a judge Harmful score, %" in page.text
    assert page.text.count("pharmacist −") == 1 and "+0.520 [+0.5" in page.text
    curves = [figure["data"][-1]["y"][-1] for figure in page.json("figures")["curve-0"]]
    scores = table.query("selector == 'pharmacist' and defense == 'booster'").groupby("judge")["harmful_scores"]
    assert curves == [pytest.approx(np.mean(scores.get_group(judge).tolist(), 0)[-1]) for judge in ("keyword", "a*b")]
    margins = page.json("figures")["margin-0"]
    ends = [[trace["y"][-1] for trace in figure["data"] if trace["mode"] == "lines+markers"] for figure in margins]
    assert ends == [pytest.approx([-0.18, 0.34])] * 2, "the same under both judges"
    low, high = margins[0]["layout"]["yaxis"]["range"]
    assert low < table["loss_margins"].map(min).min() < table["loss_margins"].map(max).max() < high
    figures = [figure for name, views in page.json("figures").items() if name.startswith("margin") for figure in views]
    assert {tuple(figure["layout"]["yaxis"]["range"]) for figure in figures} == {(low, high)}, "defenses compare"
    columns = page.json("results")["columns"]
    assert [column["digits"] for column in columns if column["title"] == "Loss margin, nats"] == [3]
    assert len([column for column in columns if "over the attack by" in column["title"]]) == 2


def test_a_partial_benchmark_says_so(tmp_path: Path) -> None:
    table = results({}, seeds=2)
    counts = {"cells": 2 * len(table), "results": len(table), "stages": 40, "finished": 39, "failed": 0}
    write_bench(tmp_path, table, status="started", counts=counts)
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    page = Page.read(tmp_path / "report.html")
    assert "This grid is incomplete" in page.text and "to continue it" in page.text
    assert "worst" not in page.text and "How much to keep" not in page.text


def test_a_benchmark_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bench(tmp_path, results({}).iloc[:0])
    assert main(["report", str(tmp_path)]) == 2
    (tmp_path / "results.parquet").unlink()
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no cell is finished yet" in error and "results.parquet: cannot be read" in error and error.count("\n") == 2


def test_time_saved_is_of_the_seeds_that_both_have() -> None:
    table = results({"core": -12.0}, defenses=["sft"], seeds=2)
    times = {("full", 0): 100.0, ("core", 0): 30.0, ("core", 1): 90.0}
    table = table[[key in times for key in zip(table["selector"], table["seed"], strict=True)]]
    seconds = [times[key] for key in zip(table["selector"], table["seed"], strict=True)]
    (core,) = verdicts(Benchmark(table.assign(alignment_seconds=seconds)))
    assert core["time_saved"] == pytest.approx(70.0)
