"""curate and rank: balance, diversity, mixtures, and what is told before the work starts."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pharmacist as ph
from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.formats import open_source
from pharmacist.pipeline.choosing import balance_counts, changed_by_labels, shortfall
from pharmacist.pipeline.curate import SelectOptions, select
from pharmacist.pipeline.stages.curate import CurateOptions
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.labels import write_labels
from tests.support import village
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    pool = [row | {"category": "abc"[min(i // 15, 2)], "number": i % 2} for i, row in enumerate(village.pool(40))]
    # The rarest category has the shortest answers, so that the longest rows leave it out.
    for row in pool[30:]:
        row["completion"] = "no"
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("pool.jsonl", pool)
    write("few.jsonl", village.rows("safe", 5, seed=99))
    return {name: str(folder / f"{name}.jsonl") for name in ("pool", "few")}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.2))


def curate(files: dict[str, str], out: Path, *words: str) -> int:
    return main(["curate", "--pool", files["pool"], "--output-dir", str(out), *words])


def test_balance_keeps_every_value_and_says_so(files, tmp_path, capfd):
    assert curate(files, tmp_path / "a", "--selector", "length", "--balance", "category", "--top-k", "12") == 0
    said = " ".join("".join(capfd.readouterr()).split())
    table = pd.read_parquet(tmp_path / "a" / "scores.parquet")
    kept = table[table["selected"]]["group"].value_counts().to_dict()
    assert sum(kept.values()) == 12 and kept["c"] == 1
    assert "--balance category: c: 1 of 10 rows are selected; by rank alone it would be 0" in said
    noted = json.loads((tmp_path / "a" / "manifest.json").read_text())["extra"]["balance"]
    assert noted["c"] == {"rows": 10, "selected": 1, "by_rank": 0} and sum(n["rows"] for n in noted.values()) == 40
    assert curate(files, tmp_path / "b", "--selector", "length", "--top-k", "12", "--quiet") == 0
    plain = pd.read_parquet(tmp_path / "b" / "scores.parquet")
    assert "group" not in plain and not plain["selected"][30:].any(), "else this proves nothing"


def test_balance_is_not_said_to_change_what_other_options_change(capfd):
    reasons = ["critical", *["duplicate"] * 3, *["low_quality"] * 2, *["critical"] * 2]
    table = pd.DataFrame({"row": range(8), "score": range(8, 0, -1), "rank": range(1, 9), "reason": reasons})
    table = table.assign(duplicate_of=[-1, 0, 0, 0, -1, -1, -1, -1], group=list("aaaaccbb"), selected=False)
    table.loc[[0, 6], "selected"] = True  # the best rows that are neither near-duplicates nor of low quality
    options = CurateOptions(pool="p", top_k=2, balance="kind", diversity="near-duplicates", output_dir="o")
    counts = balance_counts(table, options)
    assert {group: found["by_rank"] for group, found in counts.items()} == {"a": 1, "b": 1, "c": 0}
    said = capfd.readouterr().err
    assert "c: none of its 2 rows is selected" in said and said.count("--balance") == 1


def test_no_model_is_aligned_on_no_row(files, tmp_path, capfd):
    labels, few = tmp_path / "labels.json", {"pool": files["few"]}
    said_of = dict(enumerate(["harmful", "over_refusal", "harmful", "harmful", "harmful"]))
    write_labels(labels, open_source(files["few"]).fingerprint(), said_of)
    for number, more in enumerate([(), ("--labels", str(labels))]):
        assert curate(few, tmp_path / str(number), "--selector", "length", "--top-k", "2", *more) == 0
        said = "".join(capfd.readouterr())
        assert ("5 rows ranked, 0 selected" in said) == (number == 1)
        assert ("next: pharmacist align" in said) == (number == 0)


def test_balance_by_numbers_lists_and_python(files):
    rows = [json.loads(line) for line in Path(files["pool"]).read_text().splitlines()]
    ranking = ph.rank(rows, selector="length", balance="number", balance_share=1.0, top_k=10)
    assert ranking.table[ranking.table["selected"]]["group"].value_counts().to_dict() == {"0": 5, "1": 5}
    assert len(ranking.select(k=4, balance_share=0.5)) == 4
    lists = [row | {"category": ["all", row["category"]]} for row in rows]
    ranking = ph.rank(lists, selector="length", balance="category", top_k=10)
    assert set(ranking.table["group"]) == {"a", "b", "c"}, "of several values the rarest counts"
    with pytest.raises(ConfigError, match="ranked without balance"):
        ph.rank(rows, selector="length").select(k=4, balance_share=0.5)


@pytest.mark.parametrize("words", [("--balance", "category"), ("--diversity", "near-duplicates")])
def test_select_chooses_as_the_ranking_was_told_to(files, tmp_path, words):
    doubled = tmp_path / "pool.jsonl"
    doubled.write_text(Path(files["pool"]).read_text() * 2)
    files = {"pool": str(doubled)}
    folder = tmp_path / "ranking"
    assert curate(files, folder, "--selector", "length", "--top", "0.3", "--quiet", *words) == 0
    select(SelectOptions(ranking=str(folder), top=0.3, output_dir=str(tmp_path / "some"), quiet=True))
    assert (tmp_path / "some/selected.jsonl").read_bytes() == (folder / "selected.jsonl").read_bytes()
    # Negative control: without them other rows are on top.
    assert curate(files, tmp_path / "plain", "--selector", "length", "--top", "0.3", "--quiet") == 0
    assert (tmp_path / "plain/selected.jsonl").read_bytes() != (folder / "selected.jsonl").read_bytes()


@pytest.mark.parametrize(("reason", "told"), [("low_quality", True), ("ranked", False)])
def test_too_few_rows_beside_near_duplicates_are_told_where_more_would_fill(reason, told):
    table = pd.DataFrame({"reason": ["ranked", "ranked", reason], "selected": [True, False, False]})
    given = CurateOptions(output_dir="", pool="pool", top_k=2, diversity="near-duplicates")
    text = "1 rows are selected, not 2: all others are near-duplicates or do not look worth keeping; --fill takes"
    assert [warning.startswith(text) for warning in shortfall(table, given)] == [True] * told


def test_too_few_rows_beside_labelled_ones_are_told_where_all_others_fill():
    table = pd.DataFrame({"reason": ["low_quality", "ranked", "ranked"], "selected": [True, True, False]})
    filled, few = shortfall(table, CurateOptions(output_dir="", pool="pool", top_k=3, fill=True))
    assert filled == "1 of the 2 selected rows are only there to fill the quota: 1 low_quality"
    assert few == "2 rows are selected, not 3: all others are labelled as bad, which --fill does not overrule"


@pytest.mark.parametrize("diversity", ["k-center", "facility-location"])
def test_diversity_after_any_ranking(files, model, tmp_path, diversity):
    words = ["--selector", "length", "--top-k", "10", "--model", model, "--quiet"]
    assert curate(files, tmp_path / "a", *words, "--diversity", diversity) == 0
    assert curate(files, tmp_path / "b", *words) == 0
    spread, plain = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in "ab")
    assert (spread["rank"] == plain["rank"]).all() and spread["selected"].sum() == 10
    assert spread[spread["selected"]]["rank"].max() in range(11, 16), "from 1.5 times as many"


def test_diversity_in_python(files, model):
    rows = [json.loads(line) for line in Path(files["pool"]).read_text().splitlines()]
    ranking = ph.rank(rows, selector="length+perplexity", model=model, diversity="k-center", top_k=10)
    some = ranking.select(k=10, diversity="facility-location", diversity_margin=2.0)
    assert len(some) == 10 and some.column_names == ["prompt", "completion", "category", "number"]
    with pytest.raises(ConfigError, match="diversity k-center: needs distances between rows"):
        ph.rank(rows, selector="length").select(k=10, diversity="k-center")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--selector length --balance sort", "--balance sort: the pool has no such column; it has prompt, completion"),
        ("--selector length --balance category --top-k 2", "2 rows cannot hold one of each of 3 values"),
        ("--selector length --balance category --min-score 3", "--balance has no effect; leave one out"),
        ("--selector length --diversity k-center --min-score 3", "--diversity k-center has no effect"),
        ("--selector length --diversity k-center", "--diversity k-center compares rows by a model; give --model, or"),
        ("--selector length --balance-share 0", "--balance-share 0: must lie in (0, 1]"),
        ("--selector length --diversity-margin 0.5", "--diversity-margin 0.5: must be at least 1"),
        ("--selector perplexity", "'perplexity' reads the pool with a model; give --model"),
        ("--selector k-center", "'k-center' compares rows by a model; give --model, or --embedder"),
        ("--selector embedding --model MODEL", "needs safe references; give --safe FILE"),
        ("--selector dsir --safe FEW", "--safe: 5 rows are left, at least 8 are needed"),
        ("--selector embedding+length --safe FEW --model MODEL", "--safe: 5 rows are left, at least 8 are needed"),
        ("--selector full+random", "'full' ranks nothing; leave it out"),
        ("--selector length+length", "'length' is named twice; name different selectors"),
        (
            "--selector k-center --diversity k-center --model MODEL",
            "--diversity k-center: selector 'k-center' covers the pool by itself; leave one of the two out",
        ),
        ("--selector k-center --diversity facility-location --model MODEL", "'k-center' covers the pool by itself"),
        ("--selector full --diversity k-center --model MODEL", "selector 'full' ranks nothing; leave one of the two"),
        ("--selector length --resume-selector OUT", "'length' stores nothing that it learns; leave the option out"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(files, model, tmp_path, capfd, monkeypatch, words, message):
    monkeypatch.setattr("pharmacist.nn.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "earlier").mkdir()
    places = {"MODEL": model, "FEW": files["few"], "OUT": str(tmp_path / "earlier")}
    assert curate(files, tmp_path / "out", *(places.get(word, word) for word in words.split())) == 2
    said = capfd.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*")), "the folder stays free"


def _needs() -> list[tuple[str, str]]:
    return [
        (name, need)
        for name in SELECTORS.names()
        for need in ("safe", "harmful", "utility")
        if need in SELECTORS.build(name, {}).needs
    ]


@pytest.mark.parametrize(("name", "need"), _needs())
def test_every_selector_says_which_references_are_missing_or_too_few(
    files, model, tmp_path, capfd, monkeypatch, name, need
):
    monkeypatch.setattr("pharmacist.nn.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    enough = tmp_path / "enough.jsonl"
    enough.write_text("".join(json.dumps(row) + "\n" for row in village.rows("harmful", 8, seed=98)))
    words = ["--selector", name, "--model", model]
    for other in SELECTORS.build(name, {}).needs - {need, "model", "embedder"}:
        words += [f"--{other}", str(enough)]
    for given, message in (
        ([], f"selector '{name}' needs {need} references; give --{need} FILE"),
        ([f"--{need}", files["few"]], f"--{need}: 5 rows are left, at least 8 are needed"),
    ):
        assert curate(files, tmp_path / "out", *words, *given) == 2
        said = capfd.readouterr().err.strip()
        assert len(said.splitlines()) == 1 and message in said
        assert not list((tmp_path / "out").glob("*"))


def test_the_order_of_reference_files_does_not_matter(files, tmp_path, capfd):
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(row) + "\n" for row in village.rows("harmful", 8, seed=98)))
    orders = ([files["few"], str(many)], [str(many), files["few"]])
    tables = []
    for number, both in enumerate(orders):
        assert curate(files, tmp_path / str(number), "--selector", "dsir", "--safe", *both) == 0
        tables.append(pd.read_parquet(tmp_path / str(number) / "scores.parquet"))
    assert (tables[0]["rank"] == tables[1]["rank"]).all()


def test_most_selectors_that_learn_from_references_need_them():
    assert {name for name, _ in _needs()} >= {"pharmacist", "seal", "less", "unrolled", "embedding", "dsir"}


def test_a_missing_extra_is_told_before_the_pool_is_read(files, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("pharmacist.pipeline.rows.read_records", lambda *_, **__: pytest.fail("the pool was read"))
    assert curate(files, tmp_path / "out", "--selector", "k-center", "--embedder", "encoder") == 2
    assert "pip install 'pharmacist[embeddings]'" in capfd.readouterr().err


def test_overwriting_reads_the_new_input_before_it_deletes_the_old_results(files, tmp_path, capfd):
    out = tmp_path / "out"
    assert curate(files, out, "--selector", "length", "--quiet") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    for words in (["--pool", str(bad)], ["--pool", files["pool"], "--balance", "sort"]):
        assert main(["curate", *words, "--selector", "length", "--output-dir", str(out), "--overwrite"]) == 2
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    capfd.readouterr()
    assert curate(files, out, "--selector", "length", "--quiet", "--top-k", "3", "--overwrite") == 0
    assert pd.read_parquet(out / "scores.parquet")["selected"].sum() == 3


def test_a_ranking_that_is_made_again_with_labels_leaves_nothing_of_the_one_before(tmp_path):
    rows = [{**row, "category": "ab"[i % 2]} for i, row in enumerate(village.pool(20))]
    pd.DataFrame(rows).to_csv(tmp_path / "pool.csv", index=False)
    words = ["curate", "--pool", str(tmp_path / "pool.csv"), "--selector", "random", "--quiet", "--output-dir"]
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert main([*words, str(out), "--balance", "category"]) == 0
    before = json.loads((out / "manifest.json").read_text())
    assert "selected.jsonl" in before["outputs"] and "balance" in before["extra"], "else this proves nothing"
    entries = [{"row": 0, "label": "good"}, {"row": 1, "label": "harmful"}]
    (tmp_path / "labels.json").write_text(json.dumps({"pool": before["inputs"]["pool"], "labels": entries}))
    for folder in (out, fresh):
        again = [str(folder), "--labels", str(tmp_path / "labels.json"), "--format", "input"]
        assert main([*words, *again]) == 0
    left, right = (json.loads((folder / "manifest.json").read_text()) for folder in (out, fresh))
    assert {path.name for path in out.iterdir()} == {path.name for path in fresh.iterdir()}
    assert left["extra"].keys() == right["extra"].keys()


def test_labels_are_compared_with_a_ranking_of_the_same_pool_only(files, tmp_path, monkeypatch):
    assert curate(files, tmp_path / "out", "--selector", "random", "--quiet") == 0
    pool = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]["pool"]
    scores = tmp_path / "out" / "scores.parquet"
    table = pd.read_parquet(scores)
    after = table.assign(selected=~table["selected"])
    resumed = CurateOptions(pool=files["pool"], output_dir="", resume_selector=str(tmp_path / "out"))
    counts = {"entered": int(after["selected"].sum()), "left": int(table["selected"].sum())}
    assert changed_by_labels(after, resumed, None, pool) == counts
    assert changed_by_labels(after, resumed, None, "another") == {}
    # Without an output folder the files of the current one are nobody's.
    (tmp_path / "labels.json").write_text('[{"row": 0, "label": "good"}, {"row": 1, "label": "harmful"}]')
    monkeypatch.chdir(scores.parent)
    ranking = ph.rank(files["pool"], selector="random", labels=str(tmp_path / "labels.json"))
    assert ranking.about["changed"] == {}
    # What cannot be read is made anew.
    scores.write_text("damaged")
    assert changed_by_labels(after, resumed, None, pool) == {}


def test_rows_that_another_share_selects_are_not_due_to_labels(files, tmp_path):
    out = tmp_path / "out"
    assert curate({"pool": files["pool"]}, out, "--selector", "random", "--top", "0.2", "--quiet") == 0
    manifest, table = json.loads((out / "manifest.json").read_text()), pd.read_parquet(out / "scores.parquet")
    best, worst = (int(table["row"][table["rank"] == rank].item()) for rank in (1, len(table)))
    write_labels(tmp_path / "labels.json", manifest["inputs"]["pool"], {best: "harmful", worst: "good"})
    words = ["--selector", "random", "--top", "0.5", "--quiet", "--labels", str(tmp_path / "labels.json")]
    assert curate({"pool": files["pool"]}, out, *words) == 0
    changed = json.loads((out / "manifest.json").read_text())["extra"]["selector_report"]["changed"]
    assert changed == {"entered": 1, "left": 1}, "the labelled row and the one in its place"


def test_labels_that_are_not_there_are_told_in_one_line(files, tmp_path):
    with pytest.raises(DataError, match="^labels .*gone.json: cannot be read .*; give the file that was saved"):
        ph.rank(files["pool"], selector="random", labels=str(tmp_path / "gone.json"))


def test_mixtures_take_the_options_of_their_parts(files, model, tmp_path):
    options = ["--selector.k_center.block", "8", "--selector.length.keep", "shortest", "--quiet", "--model", model]
    assert curate(files, tmp_path / "out", "--selector", "length+k-center", *options) == 0
    config = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]["selector"]
    assert config == {"name": "length+k-center", "length": {"keep": "shortest"}, "k_center": {"block": 8}}
    table = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    np.testing.assert_allclose(table["score"], (table["length_place"] + table["k_center_place"]) / 2)


def test_categories_are_shown_that_only_late_rows_have(tmp_path):
    rows = [{"prompt": f"May I stir pot {i}?", "completion": "No."} for i in range(1001)]
    ranking = ph.rank([*rows, rows[0] | {"category": "cauldrons"}], selector="random", top_k=3)
    ranking.report(tmp_path / "report.html")
    assert "cauldrons" in (tmp_path / "report.html").read_text()


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def test_the_pool_is_read_once(files, tmp_path):
    """Records, groups, categories, selection come from one reading; the fingerprint too, unless it is needed first."""
    words = ["--selector", "length", "--quiet", "--balance", "category", "--device", "cpu"]
    # Twice to see what kind of file it is; for its fingerprint, which tells whether the run is finished; for its rows.
    for more, times in ([], 4), (["--overwrite"], 3):
        OPENED.clear()
        assert curate(files, tmp_path / "out", *words, *more) == 0
        assert OPENED.count(files["pool"]) == times
    table = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    pool = Path(files["pool"]).read_text().splitlines(keepends=True)
    written = (tmp_path / "out" / "selected.jsonl").read_text().splitlines(keepends=True)
    assert written == [pool[row] for row in table["row"][table["selected"]]]
    assert len(set(table["group"])) == 3 and "category" in (tmp_path / "out" / "report.html").read_text()
