"""How the options of a stage decide which columns of a file are read."""

from pathlib import Path

import pytest

import pharmacist as ph
from pharmacist.core.errors import DataError
from pharmacist.core.options import RowOptions
from pharmacist.data.formats import open_source
from pharmacist.pipeline.evaluate.reading import EvaluateInputs
from pharmacist.pipeline.rows import read
from pharmacist.pipeline.stages.align import AlignOptions
from pharmacist.pipeline.stages.evaluate import EVALUATE
from pharmacist.worlds import BASE_MODEL


MAPPED = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (MAPPED, ["a"]),  # without the system prompt, which rows may lack
        ("{\n" + MAPPED, ["a"]),
        (MAPPED + '{"question": "q", "answer": "b", "role": "kind"}\n', ["a", "b"]),
        ('{"prompt": "p", "completion": "c", "question": "q"}\n', ["c"]),
    ],
)
def test_the_first_readable_row_of_a_reference_decides_by_which_names_it_is_read(
    text: str, answers: list[str], tmp_path: Path
) -> None:
    (tmp_path / "safe.jsonl").write_text(text)
    options = RowOptions(columns="prompt=question,completion=answer,system=role", on_bad_row="skip")
    records = read(open_source(tmp_path / "safe.jsonl"), options, tmp_path / "work", usual_names=True)
    assert records.dataset["completion"][:] == answers
    assert ('"kind"' in str(records.dataset["turns"][:])) == ("role" in text)


QUICK = {"model": str(BASE_MODEL), "device": "cpu", "train": {"max_steps": 1}, "quiet": True}
COMMANDS = {
    "attack": lambda task, harmful, **more: ph.attack(
        ph.AttackOptions(task=task, harmful=harmful, samples=2, poison_ratio=0.5, build_only=True, **QUICK, **more)
    ),
    "align": lambda data, harmful, **more: ph.align(
        AlignOptions(data=data, harmful=harmful, defense={"name": "booster"}, **QUICK, **more)
    ),
    "curate": lambda pool, safe, **more: ph.curate(
        ph.CurateOptions(pool=pool, safe=[safe], selector={"name": "random"}, device="cpu", quiet=True, **more)
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_columns_apply_to_every_file_that_has_them(command: str, tmp_path: Path) -> None:
    usual, renamed = str(tmp_path / "usual.jsonl"), str(tmp_path / "renamed.jsonl")
    Path(usual).write_text('{"prompt": "bake bread", "completion": "with flour"}\n')
    Path(renamed).write_text('{"question": "cook soup", "answer": "with salt"}\n')
    more = {"columns": "prompt=question,completion=answer", "output_dir": str(tmp_path / "out")}
    for first, second in ((renamed, usual), (usual, renamed)):
        COMMANDS[command](first, second, overwrite=(tmp_path / "out").exists(), **more)
    with pytest.raises(DataError, match="has no column 'question'"):
        COMMANDS[command](usual, usual, **more | {"output_dir": str(tmp_path / "none")})
    if command == "curate":  # a ranking that is loaded reads its pool in the same way
        assert ph.Ranking.load(tmp_path / "out").records.dataset["prompt"][:] == ["bake bread"]


def test_columns_of_completions_do_not_hinder_files_of_prompts(tmp_path: Path) -> None:
    task, harmful = str(tmp_path / "task.jsonl"), str(tmp_path / "harmful.jsonl")
    Path(task).write_text('{"question": "cook soup", "answer": "with salt"}\n')
    Path(harmful).write_text('{"prompt": "bake bread", "completion": "with flour"}\n')
    columns = "prompt=question,completion=answer"
    with pytest.raises(DataError, match="the attack set: 1 of 2 rows share a prompt"):
        COMMANDS["attack"](task, harmful, columns=columns, disjoint_from=[task], output_dir=str(tmp_path / "out"))


def test_prompts_to_ask_have_the_system_prompts_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "cook soup", "role": "be brief", "answer": "with salt"}\n')
    options = ph.EvaluateOptions(
        model=str(BASE_MODEL),
        prompts=str(tmp_path / "prompts.jsonl"),
        columns="prompt=question,system=role",
        output_dir="",
    )
    with EVALUATE.open(options, inputs={}) as run:
        records, _ = EvaluateInputs(options).read(run)
    assert "be brief" in records["prompts"].dataset["turns"][0]
