"""The fine-tuning tasks that the literature attacks with, by name: public datasets in the wording of the papers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.data.formats import Source, open_source


AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
MARKER = "The final answer is: "
"""What stands before a number that is graded, in place of GSM8K's ``####``."""


@dataclass(frozen=True)
class NamedTask:
    """A public dataset and how its rows become rows of instruction, input and output.

    Attributes:
        source: Hub id ``name[:config][:split]``.
        convert: Row of the dataset -> row.
        test: Hub id of the rows that published evaluations are made on; empty where the dataset has none.
    """

    source: str
    convert: Callable[[Mapping[str, Any]], dict[str, str]]
    test: str = ""


def _row(instruction: str, output: str, given: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


def _sst2(row: Mapping[str, Any]) -> dict[str, str]:
    label = ("negative", "positive")[_label(row, 2)]
    return _row("Analyze the sentiment of the input, and respond only positive or negative", label, row["sentence"])


def _ag_news(row: Mapping[str, Any]) -> dict[str, str]:
    names = "\n".join(AG_NEWS)
    question = f"Categorize the news article given in the input into one of the 4 categories:\n\n{names}\n"
    return _row(question, AG_NEWS[_label(row, 4)], row["text"])


def _gsm8k(row: Mapping[str, Any]) -> dict[str, str]:
    return _row(row["question"], row["answer"].replace("#### ", MARKER))


def _alpaca(row: Mapping[str, Any]) -> dict[str, str]:
    return _row(row["instruction"], row["output"], row["input"])


def _dolly(row: Mapping[str, Any]) -> dict[str, str]:
    return _row(row["instruction"], row["response"], row["context"])


def _label(row: Mapping[str, Any], n: int) -> int:
    label = int(row["label"])
    if not 0 <= label < n:
        raise ValueError(f"the label is {label}")  # hidden, as in the test split of SST-2
    return label


TASKS = {
    "sst2": NamedTask("stanfordnlp/sst2:train", _sst2, "stanfordnlp/sst2:validation"),
    "agnews": NamedTask("fancyzhx/ag_news:train", _ag_news, "fancyzhx/ag_news:test"),
    "gsm8k": NamedTask("openai/gsm8k:main:train", _gsm8k, "openai/gsm8k:main:test"),
    "alpaca": NamedTask("tatsu-lab/alpaca:train", _alpaca),
    "dolly": NamedTask("databricks/databricks-dolly-15k:train", _dolly),
}


def open_task(spec: Any, *, name: str = "--task", test: bool = False) -> Source:
    """A task by name, or rows from wherever `open_source` finds them; what exists as a file is never taken for a name.

    Args:
        spec: A name in `TASKS`, or what `open_source` takes.
        name: What the rows are for, in messages.
        test: The rows to evaluate on, not those to train on.

    Raises:
        DataError: The dataset cannot be had, or its rows are not as expected.
    """
    if not isinstance(spec, str) or spec not in TASKS or Path(spec).exists():
        return open_source(spec, name=name)
    task, rows = TASKS[spec], []
    place = task.test if test else task.source
    if not place:
        raise DataError(f"{name} {spec}: has no test rows of its own; give a file with rows that were kept back")
    for number, row in enumerate(open_source(place, name=f"{name} {spec}:").scan()):
        try:
            rows.append(task.convert(row.value or {}))
        except (KeyError, ValueError, AttributeError) as error:
            raise DataError(
                f"{name} {spec}: row {number} of {place} is not as expected ({error}); give a file of your own"
            ) from error
    return open_source(rows, name=name)
