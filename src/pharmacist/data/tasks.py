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
        convert: Row of the dataset -> instruction, input and output.
        test: Hub id of the rows that published evaluations are made on; empty where the dataset has none.
    """

    source: str
    convert: Callable[[Mapping[str, Any]], tuple[str, str, str]]
    test: str = ""


def _class(row: Mapping[str, Any], *names: str) -> str:
    label = int(row["label"])
    if not 0 <= label < len(names):
        raise ValueError(f"the label is {label}")  # hidden, as in the test split of SST-2
    return names[label]


_SST2 = "Analyze the sentiment of the input, and respond only positive or negative"
_NEWS = "\n".join(["Categorize the news article given in the input into one of the 4 categories:\n", *AG_NEWS, ""])
TASKS = {
    "sst2": NamedTask(
        "stanfordnlp/sst2:train",
        lambda row: (_SST2, row["sentence"], _class(row, "negative", "positive")),
        "stanfordnlp/sst2:validation",
    ),
    "agnews": NamedTask(
        "fancyzhx/ag_news:train", lambda row: (_NEWS, row["text"], _class(row, *AG_NEWS)), "fancyzhx/ag_news:test"
    ),
    "gsm8k": NamedTask(
        "openai/gsm8k:main:train",
        lambda row: (row["question"], "", row["answer"].replace("#### ", MARKER)),
        "openai/gsm8k:main:test",
    ),
    "alpaca": NamedTask("tatsu-lab/alpaca:train", lambda row: (row["instruction"], row["input"], row["output"])),
    "dolly": NamedTask(
        "databricks/databricks-dolly-15k:train", lambda row: (row["instruction"], row["context"], row["response"])
    ),
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
            rows.append(dict(zip(("instruction", "input", "output"), task.convert(row.value or {}), strict=True)))
        except (KeyError, ValueError, AttributeError) as error:
            raise DataError(
                f"{name} {spec}: row {number} of {place} is not as expected ({error}); give a file of your own"
            ) from error
    return open_source(rows, name=name)
