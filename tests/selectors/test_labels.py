"""Labels of a person: the file that holds them, the rows that are asked for, and what `curate` makes of them."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pharmacist.cli.main import main
from pharmacist.core.errors import DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.data.formats import open_source
from pharmacist.nn.adapters import AdapterBank
from pharmacist.readers import kept
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.labels import read_labels, rows_to_label, write_labels
from tests.support import village
from tests.support.world_files import fingerprints, write_rows


KINDS = list(village.KINDS)
POOL = [{**row, "category": f"c{i % 3}"} for i, row in enumerate(village.pool(60))]
LABEL = dict(zip(KINDS, ("good", "harmful", "not_safety_critical", "over_refusal", "low_quality"), strict=True))
"""Kind of a row of the village -> what a person says of it."""


# --- the file -------------------------------------------------------------------------------------------------------


def written(path: Path, labels, pool="p") -> Path:
    path.write_text(json.dumps({"pool": pool, "labels": labels}))
    return path


def test_labels_are_read_as_they_were_written(tmp_path):
    write_labels(tmp_path / "labels.json", "p", {30: "good", 7: "over_refusal", 11: "harmful"})
    content = json.loads((tmp_path / "labels.json").read_text())
    assert [entry["row"] for entry in content["labels"]] == [7, 11, 30]
    found = read_labels(tmp_path / "labels.json", "p", [5, 7, 11, 30])
    assert found == {1: "over_refusal", 2: "teaches_compliance", 3: CRITICAL}, "by position among the usable rows"


def test_a_bare_list_is_read_with_a_warning(tmp_path, capsys):
    (tmp_path / "labels.json").write_text(json.dumps([GOOD, BAD]))
    assert read_labels(tmp_path / "labels.json", "p", [1, 2]) == {0: CRITICAL, 1: "teaches_compliance"}
    assert "names no pool" in " ".join(capsys.readouterr().err.split())


GOOD, BAD = {"row": 1, "label": "good"}, {"row": 2, "label": "harmful"}
MISTAKES = {
    "a row the pool lacks": ([GOOD, {"row": 99, "label": "harmful"}], "entry 1: the pool has no usable row 99"),
    "a row before the first": ([{"row": -1, "label": "good"}], "no usable row -1"),
    "no row": ([{"label": "good"}], "no usable row None"),
    "true for a row": ([GOOD, {"row": True, "label": "harmful"}], "entry 1: the pool has no usable row True"),
    "a share of a row": ([{"row": 1.0, "label": "good"}], "no usable row 1.0"),
    "a row in words": ([{"row": "1", "label": "good"}], "no usable row '1'"),
    "an unknown label": ([GOOD, {"row": 2, "label": "bad"}], "entry 1, row 2: label 'bad' is none of good, harmful"),
    "a list for a label": ([{"row": 2, "label": ["good"]}], r"label \['good'\] is none of"),
    "no label": ([{"row": 2}], "label None is none of"),
    "two labels": ([GOOD, BAD, {"row": 1, "label": "harmful"}], "row 1 has two labels"),
    "the same label twice": ([GOOD, BAD, GOOD], "row 1 has two labels"),
    "no entry": ([GOOD, "good"], "entry 1: 'good' is no object with row and label"),
    "nothing": ([], "holds no labels; label some rows"),
    "no list": ({"1": "good"}, "write it as"),
}


@pytest.mark.parametrize("labels, said", MISTAKES.values(), ids=MISTAKES)
def test_what_labels_cannot_be(tmp_path, labels, said):
    with pytest.raises(DataError, match=f"--labels .*labels.json: .*{said}"):
        read_labels(written(tmp_path / "labels.json", labels), "p", [1, 2])


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "holds no labels"),
        ("3", "write it as"),
        ("{}", "write it as"),
        ("{oops", "--labels .*labels.json: contains no JSON, .*; write it as"),
        ('{"row": 1, "label": "good"}\n{"row": 2, "label": "harmful"}\n', "more than one value; write it as"),
    ],
)
def test_what_a_file_of_labels_cannot_be(tmp_path, content, said):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_labels(tmp_path / "labels.json", "p", [1, 2])
    with pytest.raises(DataError, match="was made for another pool than --pool, whose fingerprint is other"):
        read_labels(written(tmp_path / "labels.json", [GOOD, BAD]), "other", [1, 2])


# --- the rows to ask for --------------------------------------------------------------------------------------------


def asked(n, informativeness, reasons, prompts=None, clusters=None) -> list[int]:
    size = len(informativeness)
    prompts = range(size) if prompts is None else prompts
    clusters = np.arange(size) if clusters is None else np.array(clusters)
    return rows_to_label(np.array(informativeness, float), reasons, prompts, clusters, n).tolist()


def test_the_least_certain_rows_of_each_reason_come_in_turn():
    informativeness, reasons = [1, 5, 2, 4, 3, 0], ["b", "b", "a", "b", "a", "c"]
    assert asked(6, informativeness, reasons) == [4, 1, 5, 2, 3, 0]
    assert asked(3, informativeness, reasons) == [4, 1, 5] and asked(0, informativeness, reasons) == []
    assert asked(99, informativeness, reasons) == asked(6, informativeness, reasons)


def test_labelled_rows_are_not_asked_for_again():
    assert asked(9, [1, -1, 2, -1], "aaab") == [2, 0]
    # Nor are rows of the same prompt, or near-duplicates of them.
    assert asked(9, [1, -1, 2, 3], "aaab", prompts=["p", "q", "q", "r"]) == [0, 3]
    assert asked(9, [1, -1, 2, 3], "aaab", clusters=[0, 1, 2, 1]) == [2, 0]


def test_no_two_rows_are_alike():
    informativeness, reasons = [6, 5, 4, 3, 2, 1], "aabbab"
    assert asked(9, informativeness, reasons, prompts=["p", "p", "p", "q", "r", "s"]) == [0, 3, 4, 5]
    assert asked(9, informativeness, reasons, clusters=[0, 1, 0, 1, 2, 1]) == [0, 3, 4]
    rng = np.random.default_rng(0)
    prompts, clusters = rng.integers(0, 30, 200).tolist(), rng.integers(0, 30, 200)
    rows = asked(20, rng.uniform(size=200), rng.choice(list("abc"), 200), prompts, clusters)
    assert len({prompts[row] for row in rows}) == len({clusters[row] for row in rows}) == len(rows) > 10


# --- curate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    given = {"pool": POOL, **village.references(24)}
    return {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in given.items()}


def words(files, out, *more, model=None) -> list[str]:
    given = [word for name, path in files.items() for word in (f"--{name}", path)]
    return ["curate", *given, "--output-dir", str(out), *(["--model", str(model)] if model else []), *more]


@pytest.fixture(scope="module")
def ranked(files, model, tmp_path_factory) -> Path:
    """A finished ranking by both readers, to be copied or read only."""
    out = tmp_path_factory.mktemp("ranked") / "out"
    assert main(words(files, out, "--quiet", model=model)) == 0
    return out


def fingerprint(run: Path) -> str:
    return read_manifest(run).inputs["pool"]


def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "scores.parquet")


def labels_of(rows) -> list[dict]:
    return [{"row": int(row), "label": LABEL[KINDS[row % 57 % len(KINDS)]]} for row in rows]


SOME = [0, 5, 1, 6, 12, 7, 3, 8, 13, 9, 10, 15, 20, 11, 16]


def test_rows_to_label_are_written(ranked, files):
    rows = [json.loads(line) for line in (ranked / "to_label.jsonl").open()]
    assert 10 < len(rows) <= 40 and set(rows[0]) == {"row", "prompt", "completion", "reason"}
    found = table(ranked)
    for row in rows:
        assert {part: POOL[row["row"]][part] for part in ("prompt", "completion")}.items() <= row.items()
        assert row["reason"] == found["reason"][row["row"]]
    assert len({row["prompt"] for row in rows}) == len(rows)
    spread = Counter(row["reason"] for row in rows[: found["reason"].nunique()])
    assert set(spread.values()) == {1}, "each reason in turn"


@pytest.mark.parametrize("labels, said", MISTAKES.values(), ids=MISTAKES)
def test_wrong_labels_change_nothing(files, tmp_path, capsys, labels, said):
    """A pool of three rows, so that each mistake is one there too."""
    out = tmp_path / "out"
    (out / "keep").mkdir(parents=True)
    (out / "keep" / "me.txt").write_text("mine")
    small = files | {"pool": write_rows(tmp_path / "pool.jsonl", POOL[:3])}
    path = written(tmp_path / "labels.json", labels, open_source(small["pool"], name="pool").fingerprint())
    before = fingerprints(tmp_path)
    assert main(words(small, out, "--overwrite", "--labels", str(path))) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(said, re.sub(r"\s+", " ", error)) and "Traceback" not in error
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize(
    "content, said",
    [
        ("{oops", "contains no JSON"),
        ('{"labels": "good"}', "write it as"),
        (None, "labels.json: cannot be read (No such file or directory)"),
        (json.dumps({"pool": "x", "labels": [GOOD, BAD]}), "was made for another pool than --pool"),
    ],
)
def test_a_wrong_file_of_labels_changes_nothing(ranked, files, model, tmp_path, capsys, content, said):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content)
    before = fingerprints(ranked)
    assert main(words(files, ranked, "--labels", str(path), model=model)) == 2
    error = capsys.readouterr().err
    assert said in re.sub(r"\s+", " ", error) and "Traceback" not in error
    assert fingerprints(ranked) == before


def test_labels_rank_a_finished_folder_anew_without_the_model(ranked, files, model, tmp_path, monkeypatch):
    again, fresh = tmp_path / "again", tmp_path / "fresh"
    shutil.copytree(ranked, again)
    labels = str(written(tmp_path / "labels.json", labels_of(SOME), fingerprint(ranked)))
    assert main(words(files, fresh, "--labels", labels, "--quiet", model=model)) == 0

    def never(*_, **__):
        pytest.fail("the model was asked")

    with monkeypatch.context() as patch:
        patch.setattr(kept, "hidden_states", never)
        patch.setattr("pharmacist.nn.models.load_model", never)
        patch.setattr(AdapterBank, "__init__", never)
        assert main(words(files, again, "--labels", labels, "--quiet", model=model)) == 0
    pd.testing.assert_frame_equal(table(again), table(fresh))
    assert (again / "selected.jsonl").read_bytes() == (fresh / "selected.jsonl").read_bytes()
    assert (again / "to_label.jsonl").read_bytes() == (fresh / "to_label.jsonl").read_bytes()
    # Negative control: they do change what was not labelled, and a fresh run does ask the model.
    old, new = table(ranked), table(again)
    others = ~old["row"].isin(SOME)
    assert (old["score"] != new["score"])[others].mean() > 0.9
    monkeypatch.setattr(kept, "hidden_states", never)
    with pytest.raises(pytest.fail.Exception):
        main(words(files, tmp_path / "control", "--quiet", model=model))


def test_labels_are_honoured(files, tmp_path):
    plain, told = tmp_path / "plain", tmp_path / "told"
    lexical = ("--selector.readers", "lexical", "--quiet")
    assert main(words(files, plain, *lexical)) == 0
    before = table(plain).sort_values("rank")
    # The opposite of what is right: the three best rows are bad, the three worst good.
    best, worst = before["row"].tolist()[:3], before["row"].tolist()[-3:]
    wrong = [{"row": row, "label": "low_quality"} for row in best] + [{"row": row, "label": "good"} for row in worst]
    path = str(written(tmp_path / "labels.json", wrong, fingerprint(plain)))
    for more in ((), ("--fill",), ("--fill", "--top", "1"), ("--min-score", "-1000")):
        assert main(words(files, told, *lexical, "--labels", path, "--overwrite", *more)) == 0
        found = table(told).set_index("row")
        assert not found["selected"][best].any() and (found["reason"][best] == "low_quality").all()
        assert set(found["reason"][worst]) <= {CRITICAL, "duplicate"} and found["selected"][worst].all()
        twins = [
            row
            for row in found.index
            if {k: POOL[row][k] for k in ("prompt", "completion")}
            in [{k: POOL[other][k] for k in ("prompt", "completion")} for other in worst]
        ]
        rest = found.drop(twins)
        assert found["score"][worst].min() > rest["score"].max()
        assert found["label"][worst].tolist() == [CRITICAL] * 3 and (found["label"] != "").sum() == 6
    asked = {json.loads(line)["row"] for line in (told / "to_label.jsonl").open()}
    assert not asked & {*best, *worst}


def test_a_selector_that_learns_nothing_from_labels_is_named(files, tmp_path, capsys):
    path = str(written(tmp_path / "labels.json", labels_of(range(0, 40)), open_source(files["pool"]).fingerprint()))
    notice = "does not learn from them; they only keep rows labelled bad out of the selection"
    learning = "pharmacist+length --selector.pharmacist.readers lexical".split()
    for selector, told in ((["length"], True), (learning, False)):
        assert main(words(files, tmp_path / selector[0], "--selector", *selector, "--labels", path)) == 0
        assert (notice in re.sub(r"\s+", " ", "".join(capsys.readouterr()))) == told
        assert (table(tmp_path / selector[0]).query("selected")["label"].isin(["", CRITICAL])).all()


def test_a_label_holds_for_copies_of_the_row_whatever_the_selector(files, tmp_path, capsys):
    rows, path = [*POOL, {**POOL[3], "category": "another"}], tmp_path / "labels.json"
    given = files | {"pool": write_rows(tmp_path / "pool.jsonl", rows)}
    path.write_text(json.dumps([{"row": 3, "label": "harmful"}, {"row": 5, "label": "good"}]))
    told = ["--selector", "length", "--top", "1", "--fill", "--labels", str(path)]
    assert main(words(given, tmp_path / "out", *told)) == 0
    found, n = table(tmp_path / "out"), len(rows)
    assert np.flatnonzero(found["label"] == "teaches_compliance").tolist() == [3, n - 1]
    assert np.flatnonzero(~found["selected"]).tolist() == [3, n - 1]
    # A bare list of labels is read with a warning, once, which is kept.
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning") and "no pool" in line]
    kept = read_manifest(tmp_path / "out").warnings
    assert said == [f"warning: {text}" for text in kept if "no pool" in text] and len(said) == 1
    assert [text for text in kept if f"{n - 2} rows are selected, not {n}" in text]


def test_what_labels_changed_is_said(files, tmp_path, capsys):
    lexical = ("--selector.readers", "lexical")
    assert main(words(files, tmp_path / "out", *lexical)) == 0
    path = str(written(tmp_path / "labels.json", labels_of(range(0, 40)), fingerprint(tmp_path / "out")))
    assert main(words(files, tmp_path / "out", *lexical, "--labels", path)) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "AUC on 40 labelled rows:" in said and "with those of other prompts" in said
    report = read_manifest(tmp_path / "out").extra["selector_report"]["labels"]
    assert (report["labels"], report["good"]) == (40, 8) and report["advice"] in said


@pytest.mark.parametrize("label", ["harmful", "good"])
def test_labels_may_all_say_the_same(files, tmp_path, label):
    assert main(words(files, tmp_path / "out", "--selector.readers", "lexical", "--quiet")) == 0
    best = table(tmp_path / "out").sort_values("rank")["row"].tolist()[:2]
    alike = [{"row": row, "label": label} for row in best]
    path = str(written(tmp_path / "labels.json", alike, fingerprint(tmp_path / "out")))
    for selector in (("--selector.readers", "lexical"), ("--selector", "length", "--top", "1")):
        assert main(words(files, tmp_path / selector[1], *selector, "--labels", path, "--quiet")) == 0
        found = table(tmp_path / selector[1]).set_index("row")
        assert (found["selected"][best] == (label == "good")).all()


# --- a quota that cannot be filled, and several files ---------------------------------------------------------------


def test_a_quota_is_filled_with_bad_rows_only_when_asked(files, tmp_path, capsys):
    lexical = ("--selector.readers", "lexical", "--top-k", "40")
    assert main(words(files, tmp_path / "few", *lexical)) == 0
    few = table(tmp_path / "few")
    n = int(few["selected"].sum())
    assert 5 < n < 40 and set(few["reason"][few["selected"]]) <= {CRITICAL, "duplicate"}
    said = re.sub(r"\s+", " ", "".join(capsys.readouterr()))
    warning = f"{n} rows are selected, not 40: no others look worth keeping; --fill takes the next best all the same"
    assert warning in said and warning in read_manifest(tmp_path / "few").warnings
    assert main(words(files, tmp_path / "all", *lexical, "--fill")) == 0
    filled = table(tmp_path / "all")
    assert filled["selected"].sum() == 40 and filled["selected"][few["selected"]].all()
    said = re.sub(r"\s+", " ", "".join(capsys.readouterr()))
    assert f"{40 - n} of the 40 selected rows are only there to fill the quota" in said


def test_several_files_of_a_kind_are_as_many_sources(files, tmp_path):
    refs = {name: village.references(24)[name] for name in ("safe", "harmful", "utility")}
    halves, counts = {}, set()
    for name, rows in refs.items():
        halves[name] = [write_rows(tmp_path / f"{name}{i}.jsonl", rows[i::2]) for i in (0, 1)]

    def held_out_by(several):
        out = tmp_path / "-".join(several or ["none"])
        given = [
            "curate",
            "--pool",
            files["pool"],
            "--output-dir",
            str(out),
            "--quiet",
            "--selector.readers",
            "lexical",
        ]
        for name in refs:
            given += [f"--{name}", *(halves[name] if name in several else [files[name]])]
        assert main(given) == 0
        manifest = read_manifest(out)
        counts.add(tuple(manifest.counts[f"references_{name}"] for name in refs))
        assert ("safe 2" in manifest.inputs) == ("safe" in several)
        return manifest.extra["selector_report"]["held_out_by"]

    assert held_out_by(["safe", "harmful", "utility"]) == "source"
    assert held_out_by(["safe", "harmful"]) == held_out_by([]) == "prompt"
    assert len(counts) == 1, "the same rows, however they are shared out"
