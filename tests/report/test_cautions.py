"""Cautions about comparisons: when they are given, and that tables and pages show them."""

from pathlib import Path

import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.report.benchmark import Benchmark, to_markdown
from pharmacist.report.cautions import cautions
from tests.support.benches import results, write_bench
from tests.support.pages import Page


def test_an_alignment_that_has_not_taken_is_told() -> None:
    curves = {
        name: [[before, 60.0], [before + 2, 70.0]]
        for name, before in (("a", 5), ("b", 18.9), ("c", 19), ("d", 40), ("e", 90))
    }
    (found,) = cautions(curves)
    assert "before the attack, the harmful score is high for c (20 %), d (41 %), e (91 %). Align" in found
    (found,) = cautions(curves | {"f": [[30.0, 30.0]]})
    assert "e (91 %) and 1 more. Align" in found


def test_an_attack_without_effect_is_told_unless_one_model_shows_its_effect() -> None:
    held = {"strong": [[1.0, 20.0, 4.0]], "none": []}
    (found,) = cautions(held)
    assert "no harmful score rises by 5 points" in found
    assert cautions(held | {"weak": [[1.0, 3.0, 6.0]]}) == []
    assert cautions({}) == cautions({"unmeasured": []}) == []


def curves(table: pd.DataFrame, before: float, end: float) -> pd.DataFrame:
    return table.assign(attack_steps=[[0, 8]] * len(table), harmful_scores=[[before, end]] * len(table))


def test_a_benchmark_tells_the_setting_and_the_judge() -> None:
    table = curves(results({"pharmacist": -12.0}, seeds=2), 1.0, 50.0)
    assert Benchmark(table).cautions == []
    assert Benchmark(table.drop(columns="harmful_scores")).cautions == [], "results of another program"
    weak = curves(table, 30.0, 50.0).assign(judge="*weak*", task="two")
    (found,) = Benchmark(pd.concat([table, weak])).cautions
    assert found.startswith("task two · judge *weak*: The alignment has had little effect")
    assert "full with sft (30 %)" in found
    assert "task two · judge \\*weak\\*: The alignment" in to_markdown(Benchmark(pd.concat([table, weak])))
    weak = weak.assign(task="t", judge="j")
    more = [weak.assign(attack=name) for name in ("mix", "harmful")]
    (found,) = Benchmark(pd.concat(more)).cautions
    assert found.startswith("The alignment has had little effect"), "whatever the attack"
    (found,) = Benchmark(pd.concat([*more, table.assign(attack="benign")])).cautions
    assert found.startswith("attack harmful; attack mix: The alignment")


def test_without_snapshots_the_scores_before_and_after_count() -> None:
    table = curves(results({"pharmacist": -12.0}, seeds=2, defenses=["sft"]), 1.0, 50.0)
    table = table.assign(harmful_scores=[[]] * len(table), repair_seconds=float("nan"))
    table = table.assign(harmful_score_before=30.0)
    (found,) = Benchmark(table).cautions
    assert "high for full (30 %), pharmacist (30 %)" in found
    (found,) = Benchmark(table.assign(harmful_score_before=1.0, harmful_score=[2.0] * len(table))).cautions
    assert "The attack does little" in found
    repaired = table.assign(harmful_score_before=1.0, harmful_score=2.0, repair_seconds=3.0)
    assert Benchmark(repaired).cautions == [], "what the attack did is not known"


def test_the_page_and_the_console_show_cautions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for before, shown in ((1.0, False), (40.0, True)):
        write_bench(tmp_path, curves(results({"<b>new</b>": -12.0}, seeds=2, defenses=["sft"]), before, 80.0))
        assert main(["report", str(tmp_path), "--quiet"]) == 0
        assert ("warning: The alignment has had little effect" in capsys.readouterr().err) is shown
        page = Page((tmp_path / "report.html").read_text())
        assert ("high for full (40 %), <b>new</b> (40 %)" in page.text) is shown
