"""The fine-tuning tasks that the literature attacks with, by name: public datasets in the wording of the papers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.data.formats import Source, open_source


AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
MARKER = "The final answer is: "
"""Text before a number that is graded; it replaces GSM8K's ``####``."""


@dataclass(frozen=True)
class NamedTask:
    """A public dataset (Hub id), its rows as instruction, input and output, and the rows of published evaluations."""

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
    """Opens a task by name, or rows as `open_source` does; a file that exists takes precedence over a name.

    With `test` the rows are those of the published evaluation, else those to train on.
    """
    if not isinstance(spec, str) or spec not in TASKS or Path(spec).exists():
        return open_source(spec, name=name)
    task, rows = TASKS[spec], []
    dataset = task.test if test else task.source
    if not dataset:
        raise DataError(f"{name} {spec}: has no test rows of its own; give a file with rows that were kept back")
    for number, row in enumerate(open_source(dataset, name=f"{name} {spec}:").scan()):
        try:
            rows.append(dict(zip(("instruction", "input", "output"), task.convert(row.value or {}), strict=True)))
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{name} {spec}: row {number} of {dataset} is not as expected ({error}); give a file of your own"
            ) from error
    return open_source(rows, name=name)
