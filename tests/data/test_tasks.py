from pathlib import Path
from typing import Any

import datasets
import pytest

from pharmacist.core.errors import DataError
from pharmacist.data import tasks
from pharmacist.data.records import read_records
from pharmacist.data.tasks import TASKS, open_task


ROWS: dict[str, list[dict[str, Any]]] = {
    "sst2": [{"idx": 0, "sentence": "a fine day ", "label": 1}, {"idx": 1, "sentence": "a bad day ", "label": 0}],
    "agnews": [{"text": "The team won.", "label": 1}, {"text": "A new chip.", "label": 3}],
    "gsm8k": [{"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "alpaca": [{"instruction": "Add.", "input": "2, 3", "output": "5", "text": "ignored"}],
    "dolly": [{"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"}],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub, as far as these datasets go."""
    of = {task.source.split(":")[0]: name for name, task in TASKS.items()}

    def load(identifier: str, *_: str, split: str | None = None) -> datasets.Dataset:
        assert split == "train" or identifier != "openai/gsm8k"
        return datasets.Dataset.from_list(ROWS[of[identifier]])

    def builder(identifier: str, config: str) -> None:
        raise ValueError("no such config")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)


def read(name: str, folder: Path) -> datasets.Dataset:
    return read_records(open_task(name), work_dir=folder).dataset


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_rows_in_the_wording_of_the_papers(hub: None, tmp_path: Path, name: str) -> None:
    found = read(name, tmp_path)
    assert len(found) == len(ROWS[name])
    expected = {
        "sst2": ["positive", "negative"],
        "agnews": ["Sports", "Sci/Tech"],
        "gsm8k": ["2 + 3 = <<2+3=5>>5\nThe final answer is: 5"],
        "alpaca": ["5"],
        "dolly": ["Ann"],
    }
    assert found["completion"] == expected[name]
    assert ("input" in str(found["instruction"][0])) == (name in ("sst2", "agnews"))


def test_the_input_is_kept_apart(hub: None, tmp_path: Path) -> None:
    row = read("agnews", tmp_path)[0]
    assert row["instruction"].endswith("4 categories:\n\nWorld\nSports\nBusiness\nSci/Tech\n")
    assert row["input"] == "The team won."


def test_a_hidden_label_is_named(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "sst2", [{"sentence": "x", "label": 1}, {"sentence": "y", "label": -1}])
    with pytest.raises(DataError, match="--task sst2: row 1 of stanfordnlp/sst2:train is not as expected .*-1"):
        open_task("sst2")
    monkeypatch.setitem(ROWS, "sst2", [{"sentence": "x", "label": None}])
    with pytest.raises(DataError, match="--task sst2: row 0 of stanfordnlp/sst2:train is not as expected .*NoneType"):
        open_task("sst2")


def test_another_layout_is_named(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "dolly", [{"prompt": "x"}])
    with pytest.raises(DataError, match="row 0 of databricks/.*give a file of your own"):
        open_task("dolly")


def test_other_rows_are_evaluated_on_than_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(identifier: str, *config: str, split: str | None = None) -> datasets.Dataset:
        asked.append((identifier, *config, split))
        return datasets.Dataset.from_list(ROWS["gsm8k"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for test in (False, True):
        open_task("gsm8k", test=test)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert {name for name in TASKS if TASKS[name].test == TASKS[name].source} == set()
    with pytest.raises(DataError, match="--task alpaca: has no test rows"):
        open_task("alpaca", test=True)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alpaca").mkdir()
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk("alpaca")
    assert read("alpaca", tmp_path)["completion"] == ["b"]


def test_without_a_network_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(DataError, match="--task gsm8k: openai/gsm8k:main:train: no such file or folder"):
        tasks.open_task("gsm8k")
