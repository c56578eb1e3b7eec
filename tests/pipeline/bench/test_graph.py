"""The graph of a grid: what runs, how often, and what is found again. Its stages are fakes that note that they ran."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from pharmacist.core.config import from_mapping, parse
from pharmacist.core.errors import DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.data.formats import open_source
from pharmacist.pipeline.bench.command import BenchResult, StagesFailed, bench
from pharmacist.pipeline.bench.data import Data
from pharmacist.pipeline.bench.grid import Plan, expand
from pharmacist.pipeline.bench.options import BenchOptions
from pharmacist.pipeline.bench.results import Result, collect
from pharmacist.pipeline.bench.stages import has_answers, run_stage, stage_warnings
from pharmacist.report.benchmark import AXES
from pharmacist.selectors.labels import write_labels
from tests.support.bench_fakes import BROKEN, OTHER, PARTIAL, Stages, finished
from tests.support.grids import SMALL, results
from tests.support.tiny import save_tiny_model


TWO_POOLS = [{"name": name, "pool": "world", "rows": rows} for name, rows in (("a", 60), ("b", 50))]
LABELLED = {
    "pools": [{"name": "a", "pool": "world", "rows": 60, "labels": __file__}],
    "curate": {"to_label": 8},
    "defenses": ["sft"],
    "selectors": [
        "pharmacist",
        {"name": "8 labels", "selector": "pharmacist", "labels": 8},
        {"name": "9 labels", "selector": "pharmacist", "labels": 9},
        {"name": "oracle", "selector": "random", "labels": "all"},
    ],
}
"""The first two share the ranking without labels."""


def grid(folder: Path, **changes: Any) -> BenchOptions:
    return from_mapping(BenchOptions, SMALL | changes | {"output_dir": str(folder)}, where="grid")


def run(folder: Path, **changes: Any) -> BenchResult:
    return bench(grid(folder, **changes))


def plan(**changes: Any) -> Plan:
    return expand(grid(Path("/nowhere"), **changes), Path("/nowhere"))


def test_what_cells_share_runs_once(stages: Stages, tmp_path: Path) -> None:
    found = run(tmp_path / "bench")
    assert stages.began() == {"rank": 2, "select": 2, "align": 4, "attack": 4, "evaluate": 12}
    assert len(found.ran) == 24
    table = pd.read_parquet(tmp_path / "bench" / "results.parquet")
    *own, further = Result.__dataclass_fields__
    assert further == "further" and list(table.columns) == [*own, "lm_eval_arc_easy", "lm_eval_arc_easy_before"]
    assert table["lm_eval_arc_easy"].tolist() == table["harmful_score"].tolist(), "as the fakes make them up"
    assert table["win_rate"].notna().all() and table["win_rate_before"].notna().all(), "of tasks that are graded by it"
    assert table[list(AXES)].drop_duplicates().shape[0] == len(table) == 4
    assert table["selector"].tolist() == ["full", "full", "random", "random"]
    assert table["fraction"].tolist() == [1, 1, 0.5, 0.5]
    assert [list(steps) for steps in table["attack_steps"]] == [[0, 1, 8]] * 4
    first = table.iloc[0]
    assert list(first["harmful_scores"])[0] == first["harmful_score_before"] != first["harmful_score"]
    assert list(first["harmful_scores"])[-1] == first["harmful_score"]
    assert 0 < first["harmful_score_over_attack"] < 100
    manifest = read_manifest(tmp_path / "bench")
    assert manifest.status == "success"
    assert manifest.counts == {"cells": 4, "results": 4, "stages": 24, "finished": 24, "failed": 0}
    assert manifest.extra["axes"]["defense"] == ["sft", "vaccine"]


def test_what_cells_share_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = Counter[str]()
    rows = Data.rows

    def counted(data: Data, spec: str, *more: Any) -> Any:
        looked_up[spec] += 1
        return rows(data, spec, *more)

    monkeypatch.setattr(Data, "rows", counted)
    found = plan(seeds=[0, 1], judges=["keyword", {"name": "again", "judge": "keyword", "options": {"batch_size": 2}}])
    assert len(found.cells) == 16 and sum(stage.kind == "evaluate" for stage in found.stages.values()) == 48
    # For each seed and judge, of the whole evaluation and of that along the attack; for each seed and attacked model.
    assert looked_up["world:prompts:5"] == 8 and looked_up["world:attack:8"] == 8


def test_a_split_of_a_saved_dataset_is_known_by_its_content(tmp_path: Path) -> None:
    spec, found = f"{tmp_path}/saved:train", set()
    for answer in ("no", "never"):
        rows = Dataset.from_list([{"prompt": "a", "completion": answer}])
        DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
        stages = plan(pools=[spec], selectors=["random"]).stages
        (rank,) = (stage for stage in stages.values() if stage.kind == "rank")
        assert rank.options.pool == spec
        found.add(rank.key)
    assert len(found) == 2
    with pytest.raises(DataError, match="is a folder of splits; write .*:SPLIT with one of train, test"):
        plan(pools=[f"{tmp_path}/saved:tain"], selectors=["random"])


def test_a_finished_grid_runs_nothing(stages: Stages, tmp_path: Path) -> None:
    run(tmp_path / "bench")
    before = results(tmp_path / "bench")
    stages.began()
    assert run(tmp_path / "bench").ran == []
    assert stages.began() == {}
    pd.testing.assert_frame_equal(results(tmp_path / "bench"), before)


def test_another_defense_trains_its_own_column_only(stages: Stages, tmp_path: Path) -> None:
    run(tmp_path / "bench")
    stages.began()
    found = run(tmp_path / "bench", defenses=["sft", "vaccine", {"name": "more", "defense": {"name": "vaccine"}}])
    assert found.ran == []  # the same defense under another name is the same work
    assert len(found.rows) == 6
    run(tmp_path / "bench", defenses=["sft", "vaccine", {"name": "v5", "defense": {"name": "vaccine", "rho": 5}}])
    assert stages.began() == {"align": 2, "attack": 2, "evaluate": 6}
    run(tmp_path / "bench")  # the grid as it was before
    assert stages.began() == {}
    assert len(results(tmp_path / "bench")) == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fractions": [0.2, 0.5]}, {"rank": 2, "select": 3, "align": 6, "attack": 6, "evaluate": 18}),
        ({"seeds": [0, 1]}, {"rank": 4, "select": 4, "align": 8, "attack": 8, "evaluate": 24}),
        (
            {"attacks": [{"kind": "mix", "poison_ratio": [0, 0.1], "samples": 20}]},
            {"rank": 2, "select": 2, "align": 4, "attack": 8, "evaluate": 20},
        ),
        (
            {"judges": ["keyword", {"name": "k2", "judge": "keyword", "options": {"max_new_tokens": 9}}]},
            {"rank": 2, "select": 2, "align": 4, "attack": 4, "evaluate": 24},
        ),
        (
            {"post_alignment_defenses": ["none", "lisa", "safe-lora"]},
            {"rank": 2, "select": 2, "align": 4, "attack": 8, "repair": 4, "evaluate": 24},
        ),
        (
            {"selectors": ["full", {"selector": "length", "fractions": [0.1, 0.2, 0.3]}], "defenses": ["sft"]},
            {"rank": 2, "select": 4, "align": 4, "attack": 4, "evaluate": 12},
        ),
        (
            {
                "selectors": ["unrolled", {"name": "weights", "selector": "unrolled", "weighted": True}],
                "defenses": ["sft"],
            },
            {"rank": 1, "select": 1, "align": 2, "attack": 2, "evaluate": 6},
        ),
        (LABELLED, {"rank": 5, "label": 2, "select": 4, "align": 4, "attack": 4, "evaluate": 12}),
        (
            {"selectors": ["full", {"selector": "random", "pools": ["b"]}], "pools": TWO_POOLS, "defenses": ["sft"]},
            {"rank": 3, "select": 3, "align": 3, "attack": 3, "evaluate": 9},
        ),
        (
            {"defenses": ["sft", {"defense": "vaccine", "selectors": ["full"]}]},
            {"rank": 2, "select": 2, "align": 3, "attack": 3, "evaluate": 9},
        ),
        (
            {"selectors": [{"name": f"random {n}", "selector": {"name": "random", "draw": n}} for n in (0, 1)]},
            {"rank": 2, "select": 2, "align": 4, "attack": 4, "evaluate": 12},
        ),
        (
            {
                "selectors": ["random", {"name": "one ranking", "selector": "random", "seed": 0}],
                "pools": [{"pool": "world", "rows": 60, "seed": 5}],
                "defenses": ["sft"],
                "seeds": [0, 1, 2],
            },
            {"rank": 3, "select": 3, "align": 5, "attack": 5, "evaluate": 15},  # seed 0 has the same twice
        ),
        (
            {
                "selectors": ["random", {"name": "own", "selector": "random", "seed": 7, "fill": False}],
                "pools": [{"pool": "world", "rows": 60, "seed": 5}],
                "defenses": ["sft"],
                "seeds": [0, 1],
            },
            {"rank": 3, "select": 3, "align": 4, "attack": 4, "evaluate": 12},
        ),
    ],
    ids=[
        "fractions",
        "seeds",
        "sweep",
        "judges",
        "later",
        "one ranking",
        "weights",
        "labels",
        "pools",
        "some",
        "draws",
        "seed of a cell",
        "own seed",
    ],
)
def test_stages_by_axis(changes: dict[str, Any], expected: dict[str, int]) -> None:
    found = plan(**changes)
    kinds = [stage.kind for stage in found.stages.values()]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == dict(sorted(expected.items(), key=_order))
    names = list(found.stages)
    assert all(
        names.index(parent) < names.index(stage.name) for stage in found.stages.values() for parent in stage.parents
    )


def _order(item: tuple[str, int]) -> int:
    return ["rank", "label", "select", "align", "evaluate", "attack", "repair"].index(item[0])


def test_names_in_a_file_are_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        """
        models: [{name: 007, model: world, max_length: 64}]
        pools: [{name: 1e-3, pool: world, rows: 60, mislabel: 0.1}]
        selectors: [{name: 2026-11-30, selector: {name: random, draw: 1}, fractions: [0.5], seed: 3, fill: no}]
        attacks: [{name: 0.10, samples: [20, 30], options: {train: {max_steps: 4}}}]
        post_alignment_defenses: [{name: off, method: none}]
        tasks: [{name: yes, train: world:task:40}]
        attack: {harmful: world:attack:8}
        evaluate: {prompts: world:prompts:5}
        """
    )
    found = expand(parse(BenchOptions, ["--config", str(tmp_path / "grid.yaml"), "--output-dir", "out"]), tmp_path)
    assert [cell.name for cell in found.cells] == [
        f"007 / 1e-3 / 2026-11-30 0.5 / sft / 0.10 samples {n} / off / yes / keyword" for n in (20, 30)
    ]
    options = {kind: next(s.options for s in found.stages.values() if s.kind == kind) for kind in ("rank", "attack")}
    assert options["rank"].selector == {"name": "random", "draw": 1} and options["rank"].max_length == 64
    assert options["rank"].seed == 3 and options["attack"].train["max_steps"] == 4


def test_keys_follow_what_matters(tmp_path: Path) -> None:
    names = {stage.name for stage in plan().stages.values()}

    def changed(**changes: Any) -> set[str]:
        return {name.partition("-")[0] for name in {stage.name for stage in plan(**changes).stages.values()} - names}

    assert {stage.name for stage in expand(grid(tmp_path, quiet=False), tmp_path).stages.values()} == names
    assert changed(checkpoint_seconds=3) == set()
    assert changed(align={"train": {"max_steps": 3}}) == {"align", "attack", "evaluate"}
    assert changed(evaluate=SMALL["evaluate"] | {"batch_size": 3}) == {"evaluate"}
    assert changed(evaluate={"prompts": "world:prompts:6"}) == {"evaluate"}
    assert changed(pools=[{"pool": "world", "rows": 61}]) == {"rank", "select", "align", "attack", "evaluate"}
    assert changed(align={"harmful": "world:answers"}) == set()  # neither of the two defenses reads it
    assert changed(attack=SMALL["attack"] | {"safe": "world:safe"}) == set()  # nor does the plain attack
    assert {stage.options.seed for stage in plan(seed=7).stages.values()} == {7}
    general = {"perplexity": "world:safe:8", "base": "world", "lm_eval": "arc_easy"}
    found = plan(evaluate=SMALL["evaluate"] | general).stages.values()
    measured = [stage for stage in found if stage.kind == "evaluate"]
    snapshots = ["snapshots" in stage.options.model for stage in measured]
    assert [stage.options.lm_eval is None for stage in measured] == snapshots and 0 < sum(snapshots) < len(snapshots)
    entry = {"name": "own", "defense": "sft"}
    for section in ({"on-bad-row": "skip"}, {"on_bad_row": "skip"}):
        for options in ({"on-bad-row": "fail", "max-length": 64}, {"on_bad_row": "fail", "max_length": 64}):
            found = plan(align=section, defenses=[entry | {"options": options}])
            aligned = [stage.options for stage in found.stages.values() if stage.kind == "align"]
            assert {(one.on_bad_row, one.max_length) for one in aligned} == {("fail", 64)}


def test_a_changed_file_is_run_again_with_everything_below(stages: Stages, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"prompt": "a", "completion": "b"}\n')
    run(tmp_path / "bench", pools=[{"pool": str(pool)}])
    stages.began()
    assert run(tmp_path / "bench", pools=[{"pool": str(pool)}]).ran == []
    pool.write_text('{"prompt": "a", "completion": "c"}\n')
    run(tmp_path / "bench", pools=[{"pool": str(pool)}])
    assert stages.began() == {"rank": 2, "select": 2, "align": 4, "attack": 4, "evaluate": 12}


def test_synthetic_rows_that_were_changed_are_written_again(stages: Stages, tmp_path: Path) -> None:
    run(tmp_path, defenses=["sft"])
    files = {path: path.read_text() for path in (tmp_path / "data").iterdir()}
    for path in files:
        path.write_text("{}\n")
    run(tmp_path, defenses=["sft", "vaccine"])  # the pool is one file for both
    assert {path: path.read_text() for path in files} == files


def test_a_deleted_result_is_made_again_with_everything_below(stages: Stages, tmp_path: Path) -> None:
    found = run(tmp_path / "bench")
    before = results(tmp_path / "bench")
    stages.began()
    victim = next(name for name in found.ran if name.startswith("align"))
    shutil.rmtree(tmp_path / "bench" / "stages" / victim)
    ran = run(tmp_path / "bench").ran
    assert ran[0] == victim
    assert sorted(name.partition("-")[0] for name in ran) == ["align", "attack", "evaluate", "evaluate", "evaluate"]
    pd.testing.assert_frame_equal(results(tmp_path / "bench"), before)


def test_what_is_below_is_made_again_where_the_content_is_other(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = next(name for name in run(tmp_path).ran if "align" in name)
    found = expand(grid(tmp_path), tmp_path)

    def again() -> list[str]:
        shutil.rmtree(tmp_path / "stages" / victim)
        run_stage(found.stages[victim], found.stages)  # killed before it came to the others
        return [stage.kind for stage in found.waiting()]

    assert again() == []
    monkeypatch.setenv(OTHER, "yes")
    assert sorted(again()) == ["attack", "evaluate", "evaluate", "evaluate"]
    stages.began()
    cell = next(cell for cell in found.cells if victim not in cell.stages)
    rows = run(tmp_path, only=f"{cell.name} / seed 0").rows
    assert len(rows) == 3, "what was made of the other content is no result of this one"
    assert stages.began() == {}
    run(tmp_path)
    assert stages.began() == {"attack": 1, "evaluate": 3}
    assert run(tmp_path).ran == [] and len(results(tmp_path)) == 4


@pytest.mark.parametrize("what", ["judge", "opponent"])
def test_a_changed_judge_or_opponent_judges_again_and_nothing_else(stages: Stages, tmp_path: Path, what: str) -> None:
    changes: dict[str, Any] = {"selectors": ["random"], "defenses": ["sft"]}
    if what == "judge":
        file = save_tiny_model(tmp_path / "judge") / "config.json"
        judge = {"name": "guard", "model": str(tmp_path / "judge"), "family": "wildguard"}
        changes["judges"] = [{"name": "saved", "judge": judge}]
    else:
        file = tmp_path / "items.jsonl"
        file.write_text("{}\n")
        compared = {"name": "win-rate", "against": str(tmp_path), "base_url": "http://localhost:1/v1", "model": "m"}
        changes["evaluate"] = SMALL["evaluate"] | {"task_type": compared}
    found = expand(grid(tmp_path / "bench", **changes), tmp_path / "bench")
    run(tmp_path / "bench", **changes)
    for stage in found.stages.values():  # as the real stage notes it
        if stage.kind == "evaluate":
            noted = read_manifest(stage.folder)
            noted.model_copy(update={"inputs": noted.inputs | dict(stage.verdict_files)}).write(stage.folder)
    assert found.waiting() == [] and len(list(collect(found))) == 1
    with file.open("a") as text:
        text.write("\n")
    again = expand(grid(tmp_path / "bench", **changes), tmp_path / "bench")
    assert again.stages.keys() == found.stages.keys()
    # The evaluations along the curve grade no task.
    assert [stage.kind for stage in again.waiting()] == ["evaluate"] * (3 if what == "judge" else 2)
    assert list(collect(again)) == []
    file.unlink()
    if what == "opponent":
        with pytest.raises(DataError, match=r"--task-type.against .*: holds no finished evaluation"):
            expand(grid(tmp_path / "bench", **changes), tmp_path / "bench")


PROBE = {"judge": "probe", "safe": "world:judge-safe:6", "harmful": "world:judge-harmful:6"}


@pytest.mark.parametrize("same_model", [True, False])
def test_answers_are_those_of_the_model_as_it_is(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_model: bool
) -> None:
    taken = Mock()
    monkeypatch.setattr("pharmacist.pipeline.bench.stages.take_answers", taken)
    changes: dict[str, Any] = {"selectors": ["random"], "defenses": ["sft"], "judges": ["keyword", PROBE]}
    run(tmp_path, **changes, only="keyword")
    if not same_model:
        monkeypatch.setenv(OTHER, "on another machine")
        shutil.rmtree(next((tmp_path / "stages").glob("align-*")))
    run(tmp_path, **changes, only="probe")
    assert taken.call_count == (3 if same_model else 0)


def test_answers_are_those_of_a_finished_evaluation(stages: Stages, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"selectors": ["random"], "defenses": ["sft"]}
    run(tmp_path, **changes)
    for judges in (["keyword", PROBE], [PROBE, "keyword"]):
        found = expand(grid(tmp_path, **changes, judges=judges), tmp_path)
        likes = {(stage.method, stage.like is None) for stage in found.stages.values() if stage.kind == "evaluate"}
        assert likes == {("keyword", True), ("probe", False)}, "wherever the judge stands"


def test_answers_are_taken_where_verdicts_alone_failed(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARTIAL, "step-1")
    changes: dict[str, Any] = {"selectors": ["random"], "defenses": ["sft"]}
    run(tmp_path, **changes)
    graph = expand(grid(tmp_path, **changes), tmp_path).stages
    measured = [stage for stage in graph.values() if stage.kind == "evaluate"]
    assert sorted(read_manifest(stage.folder).status for stage in measured) == ["partial", "success", "success"]
    assert all(has_answers(stage, graph) for stage in measured)
    for stage in measured:
        (stage.folder / "items.jsonl").write_text('{"error": "timed out"}\n')
    assert [has_answers(stage, graph) for stage in measured].count(False) == 1, "the partial one"


def test_another_encoder_ranks_again(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"selectors": ["k-center"], "curate": {"embedder": str(tmp_path)}}
    (tmp_path / "weights.safetensors").write_text("a")
    before = plan(**changes)
    (tmp_path / "weights.safetensors").write_text("b")
    after = plan(**changes)
    ranks = [{name for name in found.stages if name.startswith("rank")} for found in (before, after)]
    assert len(ranks[0]) == len(ranks[1]) == 1 and ranks[0] != ranks[1]
    named = plan(selectors=["k-center"], curate={"embedder": "some/encoder"})
    assert next(s for s in named.stages.values() if s.kind == "rank").options.embedder == "some/encoder"


def test_labels_are_those_of_the_entry(stages: Stages, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(f'{{"prompt": "p{n}", "completion": "c{n}"}}\n' for n in range(4)))
    pools: list[dict[str, Any]] = [{"name": "none", "pool": str(pool)}]
    for name, good in (("a", (0, 1)), ("b", (2, 3))):
        known = {row: "good" if row in good else "harmful" for row in range(4)}
        write_labels(tmp_path / f"{name}.json", open_source(str(pool)).fingerprint(), known)
        pools.append({"name": name, "pool": str(pool), "labels": str(tmp_path / f"{name}.json")})
    changes: dict[str, Any] = {"pools": pools, "selectors": ["random"], "defenses": ["sft"]}
    found = expand(grid(tmp_path / "bench", **changes), tmp_path / "bench")
    run(tmp_path / "bench", **changes)
    (ranking,) = {found.stages[cell.roles["rank"]].folder for cell in found.cells}
    scores: dict[str, Any] = {"row": range(4), "rank": range(1, 5), "score": [0.9, 0.8, 0.2, 0.1], "cluster": range(4)}
    scores["reason"] = ["ranked"] * 4
    pd.DataFrame(scores).to_parquet(ranking / "scores.parquet")
    assert [row.ranking_auc for row in collect(found)] == [None, 100, 0]
    scores |= {"score": [0.9, 0.1, 0.8, 0.7], "label": ["critical", "", "", ""]}  # the first row by its label alone
    pd.DataFrame(scores).to_parquet(ranking / "scores.parquet")
    assert [row.ranking_auc for row in collect(found)] == [None, 0, 100]


def test_other_labels_measure_a_finished_grid_again(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pool, labels = tmp_path / "pool.jsonl", tmp_path / "labels.json"
    pool.write_text("".join(f'{{"prompt": "p{n}", "completion": "c{n}"}}\n' for n in range(4)))
    pools = [{"name": "own", "pool": str(pool), "labels": "~/labels.json"}]
    changes: dict[str, Any] = {"pools": pools, "selectors": ["random"], "defenses": ["sft"]}
    measured = []
    for good in ((0, 1), (0, 1), (2, 3)):
        known = {row: "good" if row in good else "harmful" for row in range(4)}
        write_labels(labels, open_source(str(pool)).fingerprint(), known)
        found = run(tmp_path / "bench", **changes)
        for ranking in (tmp_path / "bench/stages").glob("rank-*"):
            scores: dict[str, Any] = {"row": range(4), "rank": range(1, 5), "score": [0.9, 0.8, 0.2, 0.1]}
            pd.DataFrame(scores | {"reason": ["ranked"] * 4}).to_parquet(ranking / "scores.parquet")
        (auc,) = results(tmp_path / "bench")["ranking_auc"].fillna(-1)
        measured.append((len(found.ran), auc))
    assert measured == [(7, -1), (0, -1), (0, 0)], "the second run has nothing to do"


def test_no_page_of_another_grid_stays(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    for name in ("report.html", "tables.md", "tables.tex"):
        (tmp_path / name).write_text("of the first grid")
    monkeypatch.setenv(BROKEN, "draw")
    with pytest.raises(StagesFailed):
        run(tmp_path, selectors=[{"name": "other", "selector": {"name": "random", "draw": 9}}])
    assert len(results(tmp_path)) == 0
    assert {path.suffix for path in tmp_path.iterdir()}.isdisjoint({".html", ".md", ".tex"})


def test_no_clock_makes_a_result_stale(stages: Stages, tmp_path: Path) -> None:
    run(tmp_path / "bench")
    stages.began()
    for path in (tmp_path / "bench").rglob("manifest.json"):
        manifest = read_manifest(path.parent)
        manifest.model_copy(
            update={"created": "2000-01-01T00:00:00+00:00", "finished": "2099-01-01T00:00:00+00:00"}
        ).write(path.parent)
    assert run(tmp_path / "bench").ran == [] and stages.began() == {}


def test_a_stage_that_lost_an_output_is_made_again(stages: Stages, tmp_path: Path) -> None:
    victim = next(name for name in run(tmp_path / "bench").ran if "align" in name)
    stages.began()
    (tmp_path / "bench" / "stages" / victim / "result.txt").unlink()
    assert victim in run(tmp_path / "bench").ran and stages.began() == {"align": 1}
    assert (tmp_path / "bench" / "stages" / victim / "result.txt").is_file()


def test_what_fails_takes_only_its_own_with_it(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BROKEN, "'rho': 2.0")  # vaccine's
    with pytest.raises(StagesFailed, match="2 of 24 stages failed, 8 could not run without them") as caught:
        run(tmp_path / "bench")
    assert [str(error) for error in caught.value.exceptions] == ["this stage is broken"] * 2
    assert results(tmp_path / "bench")["defense"].tolist() == ["sft", "sft"]
    manifest = read_manifest(tmp_path / "bench")
    assert (manifest.status, manifest.counts["finished"], manifest.counts["failed"]) == ("started", 14, 2)
    assert [(entry["error"], entry["cells"]) for entry in manifest.extra["failed"]] == [
        ("ValueError: this stage is broken", 1)
    ] * 2
    monkeypatch.delenv(BROKEN)
    stages.began()
    run(tmp_path / "bench")
    assert stages.began() == {"align": 2, "attack": 2, "evaluate": 6}
    assert len(results(tmp_path / "bench")) == 4
    assert read_manifest(tmp_path / "bench").status == "success"
    assert read_manifest(tmp_path / "bench").extra["failed"] == []


def test_fail_fast_stops_at_the_first(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BROKEN, "'rho': 2.0")
    with pytest.raises(StagesFailed, match="1 of 24 stages failed, 16 were not started; the same command"):
        run(tmp_path / "bench", fail_fast=True)
    assert stages.began() == {"rank": 1, "select": 1, "align": 2, "attack": 1, "evaluate": 3}
    assert len(results(tmp_path / "bench")) == 1


def test_only_some_cells(stages: Stages, tmp_path: Path) -> None:
    run(tmp_path / "bench", only="random*vaccine")
    assert stages.began() == {"rank": 1, "select": 1, "align": 1, "attack": 1, "evaluate": 3}
    assert results(tmp_path / "bench")["cell"].tolist() == [
        "village / pool / random 0.5 / vaccine / mix / none / reviews / keyword"
    ]
    assert read_manifest(tmp_path / "bench").status == "started"
    run(tmp_path / "bench", only="random")
    assert stages.began() == {"align": 1, "attack": 1, "evaluate": 3}
    run(tmp_path / "bench")
    assert len(results(tmp_path / "bench")) == 4
    assert read_manifest(tmp_path / "bench").status == "success"


def test_a_dry_run_shows_the_graph_and_its_cost(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"quiet": False, "dry_run": True}
    run(tmp_path / "bench", **changes)
    text = capsys.readouterr().err
    assert "4 cells, 24 stages, 24 to run" in text
    assert "no similar stage was measured" in text
    assert not (tmp_path / "bench").exists()
    run(tmp_path / "bench", only="full*sft")
    stages.began()
    capsys.readouterr()
    run(tmp_path / "bench", **changes)
    text = capsys.readouterr().err
    assert "4 cells, 24 stages, 17 to run" in text
    assert "as measured on 7 stages" in text
    assert stages.began() == {}
    run(tmp_path / "bench", **changes, only="full*sft")
    text = capsys.readouterr().err
    assert "0 to run" in text and "sft" not in text.partition("cells such as")[0], "what is done costs nothing"
    run(tmp_path / "bench", **changes, only="full*sft", overwrite=True)
    assert "24 stages, 7 to run" in capsys.readouterr().err, "after everything is deleted"
    assert len(finished(tmp_path / "bench")) == 7


def test_the_ratio_of_an_attack_is_that_of_its_set(stages: Stages, tmp_path: Path) -> None:
    run(tmp_path, selectors=["full"], defenses=["sft"], attacks=["mix", "harmful", "benign"])
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert table[["attack", "poison_ratio"]].values.tolist() == [["mix", 0.1], ["harmful", 1.0], ["benign", 0.0]]


def test_failed_verdicts_are_told(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARTIAL, "step-1")
    changes: dict[str, Any] = {"selectors": ["full"], "defenses": ["sft"]}
    assert len(run(tmp_path, **changes).rows) == 1, "the metrics cover the rest"
    assert read_manifest(tmp_path).status == "started"
    (warning,) = read_manifest(tmp_path).warnings
    assert warning.startswith("evaluate keyword: answers or verdicts failed") and "requests them again" in warning
    monkeypatch.delenv(PARTIAL)
    stages.began()
    assert len(run(tmp_path, **changes).rows) == 1 and stages.began() == {"evaluate": 1}
    assert read_manifest(tmp_path).warnings == [] and read_manifest(tmp_path).status == "success"


def test_warnings_of_stages_that_differ_only_in_numbers_are_told_once() -> None:
    def stage(method: str, *warnings: str, status: str = "success") -> Any:
        return SimpleNamespace(kind="rank", method=method, manifest=SimpleNamespace(warnings=warnings, status=status))

    found = stage_warnings(
        [
            stage("less", "AUC of 0.97: too low", "safe-1.jsonl: 3 rows"),
            stage("dsir", "AUC of 0.9: too low", "safe-2.jsonl: 4 rows"),
            stage("ifd", "AUC of 1: too low"),
            stage("grand", "AUC of 0.8: too low"),
            stage("deita", "never told", status="started"),
            stage("length", "--selector length: all alike"),
            SimpleNamespace(kind="rank", method="full", manifest=None),
        ]
    )
    assert found == [
        "rank less and 3 more: AUC of 0.97: too low (4 stages)",
        "rank less: safe-1.jsonl: 3 rows",
        "rank dsir: safe-2.jsonl: 4 rows",
        "rank: --selector length: all alike",
    ]
