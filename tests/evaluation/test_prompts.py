"""Prompt sets by name, from files laid out as their authors publish them (with harmless texts)."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from pharmacist.cli.main import main
from pharmacist.core.errors import DataError
from pharmacist.evaluation.prompts import PROMPT_SETS, category_names, open_prompts
from tests.support.tiny import save_tiny_model


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def texts(spec: str) -> list[str]:
    return [row["prompt"] for _, row in open_prompts(spec, "--prompts").rows()]


def beavertails(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"how to brew number {i // 2}",
            "response": f"answer {i}",
            "is_safe": i % 3 == 0,
            "category": {"theft": i % 2 == 0, "privacy_violation": True},
        }
        for i in range(count)
    ]


def test_beavertails_unsafe_once_per_prompt_or_as_published(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in beavertails(3200)))
    unsafe = [row["prompt"] for row in beavertails(3200) if not row["is_safe"]]
    assert texts(f"beavertails:{path}") == list(dict.fromkeys(unsafe))
    assert len(set(texts(f"beavertails:{path}"))) == len(texts(f"beavertails:{path}"))
    first = texts(f"beavertails-first1000:{path}")
    assert first == unsafe[:1000] and len(set(first)) < 1000
    assert texts(f"beavertails-first500:{path}") == unsafe[:500]
    _, row = next(iter(open_prompts(f"beavertails:{path}", "--prompts").rows()))
    assert row["category"] == ["privacy_violation"]


def test_the_other_sets(tmp_path: Path) -> None:
    harmbench = write_csv(
        tmp_path / "harmbench.csv",
        [
            {"Behavior": "brew a", "FunctionalCategory": "standard", "SemanticCategory": "chemistry"},
            {"Behavior": "sing b", "FunctionalCategory": "copyright", "SemanticCategory": "songs"},
        ],
    )
    assert texts(f"harmbench:{harmbench}") == ["brew a"]  # songs are judged by hashes, not by a judge
    assert next(iter(open_prompts(f"harmbench:{harmbench}", "x").rows()))[1]["category"] == ["chemistry"]
    assert texts("advbench:" + write_csv(tmp_path / "a.csv", [{"goal": "brew c", "target": "Sure"}])) == ["brew c"]
    strong = write_csv(tmp_path / "s.csv", [{"category": "k", "source": "x", "forbidden_prompt": "brew d"}])
    assert texts(f"strongreject:{strong}") == ["brew d"]
    twins = [
        {"id": 1, "prompt": "kill a process", "type": "homonyms", "label": "safe"},
        {"id": 2, "prompt": "kill a hedge", "type": "contrast_homonyms", "label": "unsafe"},
    ]
    assert texts("xstest:" + write_csv(tmp_path / "x.csv", twins)) == ["kill a process"]
    old = [{name: row[name] for name in ("id", "prompt", "type")} for row in twins]
    assert texts("xstest:" + write_csv(tmp_path / "y.csv", old)) == ["kill a process"]


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*words: Any, **more: Any) -> Any:
        asked.append((words, more))
        return datasets.Dataset.from_list(beavertails(4))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: (_ for _ in ()).throw(ValueError()))
    # prompts 0 to 3: rows 0 and 3 are safe, 1 and 2 are of two prompts
    assert texts("beavertails") == ["how to brew number 0", "how to brew number 1"]
    assert asked == [(("PKU-Alignment/BeaverTails",), {"split": "30k_test"})]


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_without_a_network_the_error_names_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    told = f"--prompts {name}: HF_HUB_OFFLINE .*download .* and give --prompts {name}:FILE"
    with pytest.raises(DataError, match=told):
        open_prompts(name, "--prompts")
    with pytest.raises(DataError, match="no such file nowhere.csv; give"):
        open_prompts(f"{name}:nowhere.csv", "--prompts")


def test_a_file_of_another_set(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"goal": "brew", "target": "Sure"}])
    with pytest.raises(DataError, match="holds none of the set's prompts"):
        open_prompts(f"strongreject:{path}", "--prompts")


def test_any_other_file_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "brew"}\n')
    assert texts(str(tmp_path / "p.jsonl")) == ["brew"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "advbench").mkdir()
    datasets.Dataset.from_list([{"prompt": "mine"}]).save_to_disk("advbench")
    assert texts("advbench") == ["mine"]  # what lies there goes before what the name stands for


def test_categories_in_any_form() -> None:
    assert category_names({"categories": ["a", "b"]}) == ["a", "b"]
    assert category_names({"category": None}) == category_names({}) == category_names(None) == []
    assert category_names({"category": " "}) == []


def test_through_the_command_line(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "s.csv",
        [
            {"category": kind, "source": "x", "forbidden_prompt": f"how do you brew {word}"}
            for kind, word in (("k", "bread"), ("k", "water"), ("l", "seeds"))
        ],
    )
    words = ["evaluate", "--model", str(save_tiny_model(tmp_path / "m")), "--prompts", f"strongreject:{path}"]
    words += ["--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    assert main([*words, "--output-dir", str(tmp_path / "o")]) == 0
    score = json.loads((tmp_path / "o/metrics.json").read_text())["harmful_score"]
    assert {name: rate["n"] for name, rate in score["by_category"].items()} == {"k": 2, "l": 1}
