"""Prompt sets by name. A new one is one line in `PROMPT_SETS`.

``--prompts harmbench`` takes the set from the hub; ``--prompts harmbench:FILE`` from a file of the set as its authors
publish it, so that nothing needs the network. Any other file or hub id goes through `data.formats.open_source`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pharmacist.core.env import offline
from pharmacist.core.errors import DataError
from pharmacist.data.formats import Source, open_source
from pharmacist.data.normalise import prompt_key


Row = Mapping[str, Any]


def _unsafe(row: Row) -> bool:
    return row.get("is_safe") is False or str(row.get("is_safe")).lower() == "false"


def _safe_twin(row: Row) -> bool:
    label = row.get("label")
    if label is None:  # the set's first versions tell unsafe twins by their type alone
        return not str(row.get("type", "")).startswith("contrast_")
    return str(label).lower() == "safe"


@dataclass(frozen=True)
class PromptSet:
    """Where a set is and which of its rows are meant.

    Attributes:
        hub: Hub id, with configuration and split.
        file: What the authors' own file is, for whoever has no network.
        columns: Names that the prompt's column has in one or the other.
        keep: Which rows.
        distinct: Whether a prompt counts once, whatever its number of rows.
        limit: At most so many rows, the first ones; 0 for all.
        category: Column with the category.
    """

    hub: str
    file: str
    columns: tuple[str, ...]
    keep: Callable[[Row], bool] = lambda row: True
    distinct: bool = True
    limit: int = 0
    category: tuple[str, ...] = ("category",)


_BEAVERTAILS = "PKU-Alignment/BeaverTails:30k_test"
_BEAVERTAILS_FILE = "the 30k_test split of PKU-Alignment/BeaverTails (prompt, is_safe, category)"


def _first(limit: int) -> PromptSet:
    """The first unsafe rows of BeaverTails, in which prompts repeat."""
    return PromptSet(_BEAVERTAILS, _BEAVERTAILS_FILE, ("prompt",), _unsafe, distinct=False, limit=limit)


PROMPT_SETS = {
    "beavertails": PromptSet(_BEAVERTAILS, _BEAVERTAILS_FILE, ("prompt",), _unsafe),
    "beavertails-first500": _first(500),  # as T-Vaccine takes them
    "beavertails-first1000": _first(1000),  # as Booster, Antidote and NLSR do
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
    """Opens a set by name, by ``name:FILE``, or whatever `open_source` takes.

    Args:
        spec: As given.
        name: The option, for messages.

    Raises:
        DataError: It is not there, or holds no such prompts; the message says which file to provide.
    """
    known, colon, file = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if known not in PROMPT_SETS or os.path.exists(spec):
        return open_source(spec, name=name)
    chosen = PROMPT_SETS[known]
    if colon and not os.path.exists(Path(file).expanduser()):
        raise DataError(f"{name} {spec}: no such file {file}; give {chosen.file}")
    try:
        source = open_source(file if colon else chosen.hub, name=name)
    except DataError as error:
        if colon:
            raise
        why = "HF_HUB_OFFLINE forbids the hub" if offline() else "the hub cannot give it (network, or a gated set)"
        raise DataError(f"{name} {known}: {why}; download {chosen.file} and give {name} {known}:FILE") from error
    rows = list(_rows(source, chosen))
    if not rows:
        raise DataError(
            f"{name} {spec}: holds none of the set's prompts (column {' or '.join(chosen.columns)}); "
            f"give {chosen.file}"
        )
    return open_source(rows, name=name)


def _rows(source: Source, chosen: PromptSet) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    count = 0
    for _, row in source.rows():
        text = next((row[column] for column in chosen.columns if isinstance(row.get(column), str)), "")
        if not text.strip() or not chosen.keep(row):
            continue
        key = prompt_key(text)
        if chosen.distinct and key in seen:
            continue
        seen.add(key)
        yield {"prompt": text, "category": category_names(row, chosen.category)}
        count += 1
        if count == chosen.limit:
            return


def category_names(row: Row | None, columns: tuple[str, ...] = ("category", "categories")) -> list[str]:
    """Categories of a row: a text, a list of texts, or a mapping from names to true and false (BeaverTails).

    >>> category_names({"category": {"theft": True, "fraud": False}}), category_names({"category": "theft"})
    (['theft'], ['theft'])
    """
    for column in columns:
        value = (row or {}).get(column)
        if isinstance(value, str) and value.strip():
            return [_writable(value.strip())]
        if isinstance(value, Mapping):
            return [_writable(str(name)) for name, true in value.items() if true is True]
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return [_writable(name) for name in value]
    return []


def _writable(name: str) -> str:
    """The name with lone surrogates spelled out, which no file can hold."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
