"""Public prompt sets by name. A new one is one entry of `PROMPT_SETS`."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pharmacist.core.env import offline
from pharmacist.core.errors import DataError
from pharmacist.data.formats import Source, open_source
from pharmacist.data.normalise import prompt_key
from pharmacist.data.records import Records


Row = Mapping[str, Any]


def _safe_twin(row: Row) -> bool:
    label = row.get("label")
    if label is None:  # the first versions of the set mark unsafe twins by their type only
        return not str(row.get("type", "")).startswith("contrast_")
    return str(label).lower() == "safe"


@dataclass(frozen=True)
class PromptSet:
    """A public prompt set.

    Attributes:
        hub: Hub id, with configuration and split.
        file: Description of the authors' file, for use without a network.
        columns: Names of the prompt's column in either.
        keep: Which rows belong to the set.
        distinct: Whether repeated prompts are dropped.
        limit: Number of rows, the first ones; 0 for all.
        category: Names of the category's column.
    """

    hub: str
    file: str
    columns: tuple[str, ...]
    keep: Callable[[Row], bool] = lambda row: True
    distinct: bool = True
    limit: int = 0
    category: tuple[str, ...] = ("category",)


_BEAVERTAILS = PromptSet(
    "PKU-Alignment/BeaverTails:30k_test",
    "the 30k_test split of PKU-Alignment/BeaverTails (prompt, is_safe, category)",
    ("prompt",),
    lambda row: str(row.get("is_safe")).lower() == "false",
)
PROMPT_SETS = {
    "beavertails": _BEAVERTAILS,
    # The first unsafe rows, in which prompts repeat: as T-Vaccine takes them, and as Booster, Antidote and NLSR do.
    "beavertails-first500": replace(_BEAVERTAILS, distinct=False, limit=500),
    "beavertails-first1000": replace(_BEAVERTAILS, distinct=False, limit=1000),
    "harmbench": PromptSet(
        "walledai/HarmBench:standard:train",
        "harmbench_behaviors_text_all.csv of the HarmBench repository",
        ("Behavior", "prompt"),
        lambda row: row.get("FunctionalCategory", "standard") == "standard",
        category=("SemanticCategory", "category"),
    ),
    "advbench": PromptSet(
        "walledai/AdvBench:train", "harmful_behaviors.csv of the AdvBench (llm-attacks) repository", ("goal", "prompt")
    ),
    "strongreject": PromptSet(
        "walledai/StrongREJECT:train",
        "strongreject_dataset.csv of the StrongREJECT repository",
        ("forbidden_prompt", "prompt"),
    ),
    "xstest": PromptSet(
        "walledai/XSTest:test",
        "xstest_prompts.csv of the XSTest repository; its safe prompts are taken",
        ("prompt",),
        _safe_twin,
        category=("type",),
    ),
}


def open_prompts(spec: Any, name: str) -> Source:
    """Opens a set by name (from the hub), by ``name:FILE`` (its authors' file), or any source of `open_source`.

    A DataError where it is missing, or holds no such prompts, says which file to provide.
    """
    known, colon, file = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if known not in PROMPT_SETS or os.path.exists(spec):
        return open_source(spec, name=name)
    chosen = PROMPT_SETS[known]
    if colon and not os.path.exists(os.path.expanduser(file)):
        raise DataError(f"{name} {spec}: no such file {file}; give {chosen.file}")
    try:
        source = open_source(file if colon else chosen.hub, name=name)
    except DataError as error:
        if colon:
            raise
        failed = "it cannot be downloaded from the Hub (network error, or a gated set)"
        why = "HF_HUB_OFFLINE forbids downloads" if offline() else failed
        raise DataError(f"{name} {known}: {why}; download {chosen.file} and give {name} {known}:FILE") from error
    rows = list(islice(_rows(source, chosen), chosen.limit or None))
    if not rows:
        column = f"column {' or '.join(chosen.columns)}"
        raise DataError(f"{name} {spec}: holds none of the set's prompts ({column}); give {chosen.file}")
    return open_source(rows, name=name)


def _rows(source: Source, chosen: PromptSet) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for _, row in source.rows():
        text = next((row[column] for column in chosen.columns if isinstance(row.get(column), str)), "")
        if not text.strip() or not chosen.keep(row):
            continue
        key = prompt_key(text)
        if not (chosen.distinct and key in seen):
            yield {"prompt": text, "category": category_names(row, chosen.category)}
        seen.add(key)


def category_names(row: Row | None, columns: tuple[str, ...] = ("category", "categories")) -> list[str]:
    """Categories of a row: a text, a list of texts, or a mapping from names to true and false (BeaverTails).

    >>> category_names({"category": {"theft": True, "fraud": False}}), category_names({"category": "theft"})
    (['theft'], ['theft'])
    """
    for column in columns:
        value = (row or {}).get(column)
        if isinstance(value, str) and value.strip():
            names = [value.strip()]
        elif isinstance(value, Mapping):
            names = [str(name) for name, true in value.items() if true is True]
        elif isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            names = value
        else:
            continue
        # Lone surrogates, which no file can hold, are spelled out.
        return [name.encode("utf-8", "backslashreplace").decode("utf-8") for name in names]
    return []


def categories_of(rows: Records) -> list[list[str]]:
    """Categories of each row, where its file has such a column; else nothing."""
    found = [category_names(row) for row in rows.originals({"category", "categories"})]
    return found if any(found) else []
