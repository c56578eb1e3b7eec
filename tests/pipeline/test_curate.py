"""The stage `curate` through the command line and from Python: what the contract promises."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pharmacist as ph
from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.hashing import sha256_file
from pharmacist.core.manifest import read_manifest
from pharmacist.nn.adapters import AdapterBank
from pharmacist.pipeline.choosing import number_of
from pharmacist.pipeline.curate import CurateOptions, Ranking
from pharmacist.worlds import BASE_MODEL
from tests.support.world_files import CHEAP, FEW_STEPS, curate_words, fingerprints, write_rows, write_world


REASONS = {"critical", "teaches_compliance", "not_safety_critical", "over_refusal", "low_quality", "duplicate"}
CHEAP_SELECTOR = {
    "name": "pharmacist",
    "form": "both",
    "twin_steps": 4,
    "folds": 2,
    "corruptions_per_row": 1,
    "batch_size": 4,
    "readers": "lexical,probe",
    "cotrain": 0.0,
}
"""`TWINS`, as Python says it."""

TWINS = [*CHEAP, "--selector.form", "both"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Good files; the pool's rows have further columns, and two rows occur twice."""
    made = write_world(tmp_path_factory.mktemp("files"))
    pool = [
        {"id": f"r{i}", **json.loads(line), "tags": ["ü", str(i)], "deep": {"n": i}, "none": None}
        for i, line in enumerate(Path(made["pool"]).open())
    ]
    for copy, original in ((7, 31), (50, 12)):
        pool[copy] |= {name: pool[original][name] for name in ("prompt", "completion")}
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0, separators=(",", ":")) for i, row in enumerate(pool)]
    Path(made["pool"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def ranked(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cheap run, to be read only."""
    folder = tmp_path_factory.mktemp("ranked") / "out"
    assert main(curate_words(files, folder, *TWINS, "--quiet")) == 0
    return folder


def scores(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "scores.parquet")


def check_table(table: pd.DataFrame, n: int) -> None:
    """What holds for every ranking."""
    assert table["row"].tolist() == list(range(n))  # in pool order
    assert np.isfinite(table["score"]).all()
    by_rank = table.sort_values("rank")
    assert by_rank["rank"].tolist() == list(range(1, n + 1))
    best_first = table.sort_values(["score", "row"], ascending=[False, True])  # ties broken by row
    assert by_rank["row"].tolist() == best_first["row"].tolist()
    assert set(table["reason"]) <= REASONS


def test_the_contracts_files(files: dict[str, str], tmp_path: Path) -> None:
    """With everything the selector has: two readers, twins that train on the pool."""
    out = tmp_path / "out"
    words = [*FEW_STEPS, "--selector.form", "both", "--top", "0.25", "--quiet", "--seed", "5"]
    assert main(curate_words(files, out, *words)) == 0
    assert {path.name for path in out.iterdir()} == {
        "scores.parquet",
        "selected.jsonl",
        "to_label.jsonl",
        "manifest.json",
        "report.html",
        "selector",
    }
    schema = pq.read_schema(out / "scores.parquet")
    types = {"row": pa.int64(), "score": pa.float64(), "rank": pa.int64(), "selected": pa.bool_()}
    assert {name: schema.field(name).type for name in types} == types
    assert schema.field("reason").type in (pa.string(), pa.large_string())
    classes = ("safe", "harmful", "utility", "over_refusal", "corrupted")
    questions = ("risky", "refuses", "whole", "pertinent")
    signals = {"loss_safe", "loss_toxic", "contrast", "duplicate_of", *questions, *(f"p_{name}" for name in classes)}
    by_reader = set(schema.names) - {*types, "reason", *signals}
    assert signals <= set(schema.names)
    assert {"refuses", "whole", "typical"} <= {name.split("_")[0] for name in by_reader} <= {*questions, "typical"}
    assert {name.split("_")[1] for name in by_reader} == {"lexical", "probe"}

    table = scores(out)
    check_table(table, 60)
    assert np.allclose(sum(table[f"p_{name}"] for name in classes), 1)
    assert np.allclose(table["contrast"], table["loss_toxic"] - table["loss_safe"])
    assert table["selected"].sum() == 15
    good = table[table["reason"].isin(["critical", "duplicate"])]
    assert set(table["row"][table["selected"]]) == set(good.nsmallest(15, "rank")["row"])
    for one, other in ((7, 31), (50, 12)):  # equal rows, equal scores, the earlier one first
        assert table["score"][one] == table["score"][other]
        first, second = sorted((one, other))
        assert table["rank"][second] == table["rank"][first] + 1
        assert table["duplicate_of"][second] == first
        assert table["duplicate_of"][first] == -1
    lines = Path(files["pool"]).read_bytes().splitlines(keepends=True)
    chosen = [line for line, selected in zip(lines, table["selected"], strict=True) if selected]
    assert (out / "selected.jsonl").read_bytes() == b"".join(chosen)

    manifest = read_manifest(out)
    assert (manifest.stage, manifest.status, manifest.device) == ("curate", "success", "cpu")
    assert set(manifest.config) == {field.name for field in fields(CurateOptions)}
    assert manifest.config["selector"]["tau"] == 1.0  # those left at their defaults too
    asked = [json.loads(line) for line in (out / "to_label.jsonl").open()]
    assert 0 < len(asked) <= 40 and len({row["row"] for row in asked}) == len(asked)
    assert all(table["reason"][row["row"]] == row["reason"] for row in asked)
    assert {name: manifest.inputs[name] for name in files} == {name: sha256_file(path) for name, path in files.items()}
    assert len(manifest.inputs["model"]) == 64
    expected = {"in": 60, "refused": 0, "ranked": 60, "selected": 15, "references_safe": 16, "truncated": 0}
    assert expected.items() <= manifest.counts.items()
    assert manifest.seeds["seed"] == 5
    assert {"python", "torch", "transformers", "pharmacist"} <= set(manifest.versions)
    reading = {"read references", "read pool", "train twins", "score with twins"}
    assert set(manifest.phases) == {"read", "find duplicates", "answer", *reading}
    assert all(phase.seconds > 0 for phase in manifest.phases.values())
    for name in reading:
        assert manifest.phases[name].tokens > 1000
    assert manifest.phases["read"].tokens == 0
    written = {"scores.parquet", "selected.jsonl", "to_label.jsonl", "report.html", "selector"}
    assert set(manifest.outputs) == written
    report = manifest.extra["selector_report"]
    assert {"risky", "refuses", "whole", "typical"} <= set(report["questions"])
    assert all(0 <= quality["combined"]["auc"] <= 1 for quality in report["questions"].values())


def test_a_second_run_is_complete(files: dict[str, str], ranked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprints(ranked)
    assert main(curate_words(files, ranked, *TWINS)) == 0
    assert "already complete; --overwrite ranks again" in capsys.readouterr().err
    selector = {"name": "pharmacist"} | CHEAP_SELECTOR
    options = CurateOptions(**files, model=str(BASE_MODEL), selector=selector, output_dir=str(ranked), device="cpu")
    assert ph.curate(options) is None  # the command line and Python say the same run
    assert fingerprints(ranked) == before


def test_overwriting_finds_the_same(files: dict[str, str], tmp_path: Path, ranked: Path) -> None:
    pool = {"pool": files["pool"]}
    words = ["--selector", "random", "--quiet"]
    assert main(curate_words(pool, tmp_path / "out", *words, model=None)) == 0
    first = fingerprints(tmp_path / "out")
    assert main(curate_words(files, tmp_path / "out", *TWINS, "--quiet", "--overwrite")) == 0
    assert (tmp_path / "out/scores.parquet").read_bytes() == (ranked / "scores.parquet").read_bytes()
    assert main(curate_words(pool, tmp_path / "out", *words, "--overwrite", model=None)) == 0
    second = fingerprints(tmp_path / "out")
    assert set(first) == set(second)  # nothing of the other run is left
    changed = {Path(name).name for name in first if first[name] != second[name]}
    assert changed <= {"manifest.json", "report.html"}


def test_permuted_rows_get_permuted_scores(files: dict[str, str], ranked: Path, tmp_path: Path) -> None:
    lines = Path(files["pool"]).read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    (tmp_path / "pool.jsonl").write_text("\n".join(lines[i] for i in order) + "\n", encoding="utf-8")
    words = curate_words(files | {"pool": str(tmp_path / "pool.jsonl")}, tmp_path / "out", *TWINS, "--quiet")
    assert main(words) == 0
    before, after = scores(ranked), scores(tmp_path / "out")
    assert (after["score"].to_numpy() == before["score"].to_numpy()[order]).all()
    # Which of two equal rows comes first is the order's to say; all else is not.
    once = np.flatnonzero(~before["score"].duplicated(keep=False).to_numpy()[order])
    assert (after["rank"].to_numpy()[once] == before["rank"].to_numpy()[order][once]).all()


def test_a_saved_selector_gives_the_scores_of_the_run_that_trained_it(
    files: dict[str, str], ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be trained")

    monkeypatch.setattr(AdapterBank, "train", never)
    words = curate_words({"pool": files["pool"]}, tmp_path / "out", "--resume-selector", str(ranked), "--quiet")
    assert main(words) == 0
    assert (tmp_path / "out/scores.parquet").read_bytes() == (ranked / "scores.parquet").read_bytes()
    reading = {"read references", "read pool", "answer", "score with twins"}
    assert set(read_manifest(tmp_path / "out").phases) == {"read", "find duplicates", *reading}
    # The copy that it writes serves as well, for another pool.
    (tmp_path / "pool.jsonl").write_text("".join(Path(files["pool"]).open().readlines()[20:]))
    other = {"pool": str(tmp_path / "pool.jsonl")}
    words = curate_words(other, tmp_path / "more", "--resume-selector", str(tmp_path / "out"), "--quiet")
    assert main(words) == 0
    check_table(scores(tmp_path / "more"), 40)
    both = scores(tmp_path / "more"), scores(ranked).iloc[20:]
    assert np.allclose(both[0]["refuses_lexical"], both[1]["refuses_lexical"], atol=1e-6)
    assert np.allclose(both[0]["contrast"], both[1]["contrast"], atol=1e-4)


def test_a_saved_selector_reads_rows_anew_where_they_are_cut_otherwise(
    files: dict[str, str], ranked: Path, tmp_path: Path
) -> None:
    words = curate_words({"pool": files["pool"]}, tmp_path / "out", "--resume-selector", str(ranked), "--quiet")
    assert main([*words, "--max-length", "24"]) == 0
    tokens = {folder: read_manifest(folder).phases["read pool"].tokens for folder in (ranked, tmp_path / "out")}
    assert 0 < tokens[tmp_path / "out"] < tokens[ranked]
    assert (scores(tmp_path / "out")["refuses_probe"] != scores(ranked)["refuses_probe"]).any()


@pytest.mark.parametrize("cut", [("--min-score", "0"), ("--top", "0.5")])
def test_an_unfinished_run_goes_on_when_only_the_cut_changes(
    cut: tuple[str, str], files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = curate_words(files, tmp_path / "out", *TWINS, "--quiet")
    assert main([*words, "--min-score", "1e9"]) == 2
    trained = []
    monkeypatch.setattr(AdapterBank, "train", lambda *_, **__: trained.append(1))
    assert main([*words, *cut]) == 0
    assert not trained
    table = scores(tmp_path / "out")
    if "--min-score" in cut:
        assert (table["selected"] == (table["score"] >= 0)).all()
    assert 0 < table["selected"].sum() < 60


@pytest.mark.parametrize("name", ["pool.json", "pool.csv", "pool.parquet", "pool.jsonl", "pool.csv.gz", "pool.arrow"])
def test_the_inputs_own_format(name: str, files: dict[str, str], tmp_path: Path) -> None:
    frame = pd.read_json(files["pool"], lines=True)[["id", "prompt", "completion"]]
    path = tmp_path / name
    if name.endswith("arrow"):
        datasets.Dataset.from_pandas(frame).save_to_disk(path)
    elif ".csv" in name:
        frame.to_csv(path, index=False)
    elif name.endswith("parquet"):
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=name.endswith("l"))
    words = ["--selector", "random", "--format", "input", "--top-k", "7", "--quiet"]
    assert main(curate_words({"pool": str(path)}, tmp_path / "out", *words, model=None)) == 0
    kind = {"arrow": "jsonl", "gz": "csv"}.get(name.split(".")[-1], name.split(".")[-1])
    read = {
        "json": pd.read_json,
        "csv": pd.read_csv,
        "parquet": pd.read_parquet,
        "jsonl": lambda file: pd.read_json(file, lines=True),
    }[kind]
    selected = read(tmp_path / "out" / f"selected.{kind}")
    pd.testing.assert_frame_equal(selected, frame[scores(tmp_path / "out")["selected"]].reset_index(drop=True))
    assert f"selected.{kind}" in read_manifest(tmp_path / "out").outputs


def test_bad_rows_can_be_skipped(files: dict[str, str], tmp_path: Path) -> None:
    lines = Path(files["pool"]).read_text(encoding="utf-8").splitlines()
    lines[3], lines[9] = "{", '{"prompt": "x", "completion": 7}'
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--selector", "random", "--on-bad-row", "skip", "--top", "1", "--quiet"]
    assert main(curate_words({"pool": str(tmp_path / "pool.jsonl")}, tmp_path / "out", *words, model=None)) == 0
    refused = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").open()]
    assert [(row["row"], row["line"]) for row in refused] == [(3, 4), (9, 10)]
    assert "not valid JSON" in refused[0]["reason"]
    assert refused[1]["reason"] == "'completion' is a number, not text"
    assert scores(tmp_path / "out")["row"].tolist() == [row for row in range(60) if row not in (3, 9)]
    kept = [line for row, line in enumerate(lines) if row not in (3, 9)]
    assert (tmp_path / "out/selected.jsonl").read_text(encoding="utf-8").splitlines() == kept
    manifest = read_manifest(tmp_path / "out")
    counts = {"in": 60, "refused": 2, "ranked": 58, "selected": 58}
    assert counts.items() <= manifest.counts.items()
    assert "refused.jsonl" in manifest.outputs


def test_everything_can_be_kept(files: dict[str, str], tmp_path: Path) -> None:
    words = ["--selector", "full", "--top", "1", "--quiet"]
    assert main(curate_words({"pool": files["pool"]}, tmp_path / "out", *words, model=None)) == 0
    assert (tmp_path / "out/selected.jsonl").read_bytes() == Path(files["pool"]).read_bytes()
    assert scores(tmp_path / "out")["rank"].tolist() == list(range(1, 61))


def test_near_duplicates_can_be_left_out(files: dict[str, str], ranked: Path, tmp_path: Path) -> None:
    words = [*TWINS, "--quiet", "--resume-selector", str(ranked), "--fill", "--top-k", "30"]
    pool = {"pool": files["pool"]}
    selected = {}
    for diversity in ("none", "near-duplicates"):
        assert main(curate_words(pool, tmp_path / diversity, *words, "--diversity", diversity)) == 0
        table = scores(tmp_path / diversity)
        assert table["selected"].sum() == 30
        selected[diversity] = table[table["selected"]]
    assert (selected["none"]["duplicate_of"] >= 0).any()  # else this proves nothing
    assert (selected["near-duplicates"]["duplicate_of"] < 0).all()
    table = scores(ranked)
    copies = table[table["duplicate_of"] >= 0]
    assert (copies["rank"].to_numpy() > table["rank"].to_numpy()[copies["duplicate_of"]]).all()
    assert not (copies["reason"] == "critical").any()


@pytest.mark.parametrize(
    "words", ["--selector length+k-center", "--selector deita", "--selector length --diversity facility-location"]
)
def test_what_memory_cannot_hold_is_refused_before_the_work(
    words: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("pharmacist.selectors.embeddings.available_memory", lambda: 1000)
    monkeypatch.setattr("pharmacist.pipeline.curate.find_duplicates", lambda *_, **__: pytest.fail("work was done"))
    assert main(curate_words({"pool": files["pool"]}, tmp_path / "out", *words.split(), "--device", "cpu")) == 2
    assert "comparing 60 rows with each other needs" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "missing"), [("evidence", "contrast"), ("bilevel", "p_safe")])
def test_each_form_alone(form: str, missing: str, files: dict[str, str], tmp_path: Path) -> None:
    assert main(curate_words(files, tmp_path / "out", *CHEAP, "--quiet", "--selector.form", form)) == 0
    table = scores(tmp_path / "out")
    check_table(table, 60)
    assert missing not in table
    if form == "evidence":
        # p is for the pool's own shares of the classes, the score for equal ones.
        assert table["score"].corr(table["p_safe"], method="spearman") > 0.9
        good = table["reason"].isin(["critical", "duplicate"])
        assert good.any() and not good.all() and table["score"][good].min() > table["score"][~good].max()
        lower_half = table["score"] < table["score"][~good].median()
        assert table["p_safe"][good].min() > table["p_safe"][lower_half].max()
    else:
        assert (table["score"] == table["contrast"]).all()


def test_without_harmful_references_it_says_what_it_does_instead(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = {name: path for name, path in files.items() if name != "harmful"}, tmp_path / "out"
    both = [*FEW_STEPS, "--selector.readers", "lexical", "--selector.form", "both"]
    assert main(curate_words(given, out, *both)) == 0
    said = capsys.readouterr().err
    assert "selector 'pharmacist': without harmful references the twins fall back to SEAL's contrast" in said
    assert "no reference shows" not in said and "toxic" not in said  # utility references show what complies
    table = scores(out)
    check_table(table, 60)
    assert "loss_toxic" not in table and np.allclose(table["contrast"], table["loss_auxiliary"] - table["loss_safe"])
    page = (out / "report.html").read_text(encoding="utf-8")
    text = page.split("<script")[0] + page.split("</script>")[-1]  # what is written out; the rows are packed
    assert "Without harmful references the twins fall back to" in text and "toxic" not in text
    # Nothing of the kind with them, nor without twins.
    for more, words in ((files, both), (given, ["--selector.readers", "lexical"])):
        assert main(curate_words(more, tmp_path / f"{len(more)}", *words)) == 0
        assert "SEAL" not in capsys.readouterr().err
    # A saved selector needs no references, so there is nothing to say.
    more = curate_words({"pool": files["pool"]}, tmp_path / "again", "--resume-selector", str(out / "selector"))
    assert main(more) == 0 and "SEAL" not in capsys.readouterr().err
    assert (scores(tmp_path / "again")["score"] == table["score"]).all()


def test_a_lexical_ranking_needs_no_model(files: dict[str, str], tmp_path: Path) -> None:
    words = ["--selector.form", "evidence", "--selector.readers", "lexical", "--quiet"]
    assert main(curate_words(files, tmp_path / "out", *words, model=None)) == 0
    check_table(scores(tmp_path / "out"), 60)
    assert not list((tmp_path / "out/selector").glob("adapters"))


def test_a_preference_file_gives_both_references(files: dict[str, str], ranked: Path, tmp_path: Path) -> None:
    read = {name: [json.loads(line) for line in Path(files[name]).open()] for name in ("safe", "harmful")}
    pairs = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(read["safe"], read["harmful"], strict=True)
    ]
    own = {"pool": files["pool"], "safe": write_rows(tmp_path / "pairs.jsonl", pairs), "utility": files["utility"]}
    assert main(curate_words(own, tmp_path / "a", *TWINS, "--quiet")) == 0
    same = own | {"harmful": own["safe"]}
    assert main(curate_words(same, tmp_path / "b", *TWINS, "--quiet")) == 0
    assert (tmp_path / "a/scores.parquet").read_bytes() == (tmp_path / "b/scores.parquet").read_bytes()
    harmful = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs]
    two_files = files | {"safe": own["safe"], "harmful": write_rows(tmp_path / "harmful.jsonl", harmful)}
    assert main(curate_words(two_files, tmp_path / "c", *TWINS, "--quiet")) == 0
    assert (tmp_path / "a/scores.parquet").read_bytes() == (tmp_path / "c/scores.parquet").read_bytes()
    halves = [write_rows(tmp_path / f"{n}.jsonl", pairs[n::2]) for n in (0, 1)]
    how = {"utility": own["utility"], "model": str(BASE_MODEL), "selector": CHEAP_SELECTOR, "device": "cpu"}
    apart, together = (ph.rank(own["pool"], safe=halves, **how, **more) for more in ({"harmful": halves}, {}))
    assert together.manifest["counts"]["references_harmful"] == len(pairs)
    assert together.table.equals(apart.table)


def test_the_pools_columns_may_have_other_names(files: dict[str, str], ranked: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(files["pool"]).open(encoding="utf-8")]
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    own = files | {"pool": write_rows(tmp_path / "pool.jsonl", renamed)}
    words = [*TWINS, "--quiet", "--columns", "prompt=question,completion=answer"]
    assert main(curate_words(own, tmp_path / "out", *words)) == 0
    assert (scores(tmp_path / "out")["score"] == scores(ranked)["score"]).all()
    assert json.loads((tmp_path / "out/selected.jsonl").open().readline()).keys() == {"question", "answer"}


# --- Python -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranking(files: dict[str, str]) -> Ranking:
    references = {name: [json.loads(line) for line in Path(files[name]).open()] for name in ("safe", "harmful")}
    return ph.rank(
        files["pool"],
        **references,
        utility=datasets.Dataset.from_json(files["utility"]),
        model=str(BASE_MODEL),
        selector=CHEAP_SELECTOR,
        device="cpu",
    )


def test_python_ranks_as_the_command_line_does(ranking: Ranking, ranked: Path, tmp_path: Path) -> None:
    ranking.to_parquet(tmp_path / "scores.parquet")
    assert (tmp_path / "scores.parquet").read_bytes() == (ranked / "scores.parquet").read_bytes()
    ranking.report(tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"scores.parquet", "report.html"}
    assert ranking.manifest["counts"]["ranked"] == 60


def test_the_core_subset(ranking: Ranking, files: dict[str, str]) -> None:
    rows = [json.loads(line) for line in Path(files["pool"]).open(encoding="utf-8")]
    table = ranking.table
    core = ranking.select(fraction=0.3)
    assert isinstance(core, datasets.Dataset)
    assert core.column_names == ["id", "prompt", "completion", "tags", "deep", "none"]
    assert core["id"] == [rows[i]["id"] for i in table["row"][table["rank"] <= 18]]
    assert core["prompt"] == [rows[i]["prompt"] for i in table["row"][table["rank"] <= 18]]
    assert ranking.select(k=7)["id"] == [rows[i]["id"] for i in table["row"][table["rank"] <= 7]]
    middle = float(table["score"].median())
    assert len(ranking.select(min_score=middle)) == (table["score"] >= middle).sum()
    best = float(table["score"].max())
    assert len(ranking.select(min_score=best)) == (table["score"] == best).sum() > 0  # at least this score
    good = int(table["reason"].isin(["critical", "duplicate"]).sum())
    assert 18 < good < 60 and len(ranking.select(fraction=1.0)) == good  # no row that speaks against itself
    assert len(ranking.select(fraction=1.0, fill=True)) == 60
    diverse = ranking.select(k=30, diversity="near-duplicates", fill=True)
    assert len(diverse) == 30
    assert len(set(zip(diverse["prompt"], diverse["completion"], strict=True))) == 30


@pytest.mark.parametrize(
    ("top", "rows", "number"), [(0.3, 24, 7), (0.58, 25, 15), (0.29, 100, 29), (0.5, 3, 2), (0.01, 10, 1), (1.0, 7, 7)]
)
def test_a_share_of_the_rows_is_rounded_to_the_nearest_number(top: float, rows: int, number: int) -> None:
    assert number_of(CurateOptions(pool="pool.jsonl", output_dir="out", top=top), rows) == number


def test_a_written_ranking_is_loaded_again(ranked: Path, ranking: Ranking, tmp_path: Path) -> None:
    loaded = Ranking.load(ranked)
    pd.testing.assert_frame_equal(loaded.to_pandas(), ranking.table)
    assert loaded.select(k=7).to_list() == ranking.select(k=7).to_list()
    assert (
        loaded.rows_to_label() == ranking.rows_to_label() and len(loaded.rows_to_label()) == len(loaded.to_label) > 0
    )
    loaded.report(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == (ranked / "report.html").read_bytes()
    assert repr(loaded) == f"Ranking of {loaded.source.label}: 60 rows ranked, 18 selected"
    shown = loaded._repr_html_()
    assert "60 rows ranked, 18 selected" in shown and "<svg" in shown and "critical" in shown
    assert loaded.counts().sum().to_dict() == {"selected": 18, "left out": 42}
    with pytest.raises(DataError, match="a run of 'align', which writes no ranking; give the folder of a curate"):
        write_json(tmp_path / "manifest.json", read_json(ranked / "manifest.json") | {"stage": "align"})
        Ranking.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of fraction, k and min_score"),
        ({"fraction": 0.3, "k": 5}, "give exactly one of fraction, k and min_score"),
        ({"fraction": 0.0}, "fraction must lie in [(]0, 1], not 0.0"),
        ({"fraction": 1.5}, "fraction must lie in [(]0, 1], not 1.5"),
        ({"fraction": "0.3"}, "fraction must be a number, not 0.3"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"k": 61}, "k 61: only 60 rows were ranked"),
        ({"k": 5, "diversity": "near-duplicate"}, "diversity must be one of none, near-duplicates, k-center"),
        ({"k": 5, "diversity_margin": 0.5}, "diversity_margin must be at least 1, not 0.5"),
        ({"k": 5, "balance_share": -0.5}, r"balance_share must lie in \[0, 1\], not -0.5"),
        ({"k": 5, "fill": "no"}, "fill must be true or false, not no"),
        ({"min_score": "0.3"}, "min_score must be a number, not 0.3"),
        ({"min_score": 1e9}, "min score 1e[+]09: no row reaches it"),
        ({"min_score": 0.0, "diversity": "k-center"}, "so diversity k-center has no effect; leave one out"),
        ({"min_score": 0.0, "balance_share": 0.5}, "so balance has no effect; leave one out"),
    ],
)
def test_a_core_subset_that_cannot_be(options: dict[str, Any], message: str, ranking: Ranking) -> None:
    with pytest.raises(ConfigError, match=message):
        ranking.select(**options)


def test_rows_in_memory_and_other_column_names(files: dict[str, str], ranking: Ranking, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(files["pool"]).open(encoding="utf-8")]
    renamed = [{"question": row["prompt"], "answer": row["completion"], "id": row["id"]} for row in rows]
    found = ph.rank(renamed, columns={"prompt": "question", "completion": "answer"}, selector="random", seed=3)
    assert found.select(k=5).column_names == ["question", "answer", "id"]
    same = ph.rank(
        datasets.Dataset.from_list(renamed),
        columns={"prompt": "question", "completion": "answer"},
        selector="random",
        seed=3,
    )
    assert (same.table["score"] == found.table["score"]).all()
    other = ph.rank(renamed, columns={"prompt": "question", "completion": "answer"}, selector="random", seed=4)
    assert (other.table["score"] != found.table["score"]).any()
