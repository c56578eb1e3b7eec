"""How the options of a stage decide which columns of a file are read."""

from pathlib import Path

import pytest

from pharmacist.core.options import RowOptions
from pharmacist.data.formats import open_source
from pharmacist.pipeline.rows import read


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
