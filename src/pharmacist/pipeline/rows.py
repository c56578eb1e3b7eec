"""Rows and models as a stage's options say: opened, read, tokenised, loaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets

from pharmacist.core.env import rank
from pharmacist.core.options import RowOptions
from pharmacist.core.rundir import RunDir
from pharmacist.data.formats import Source, open_source
from pharmacist.data.records import Records, parse_columns, read_records
from pharmacist.data.tokenize import Encoded, encode
from pharmacist.data.where import Condition
from pharmacist.nn.models import LoadedModel, load_model


def open_several(kind: str, given: Iterable[Any], name: str) -> dict[str, Source]:
    """Files (or other rows) of one kind, as ``safe``, ``safe 2`` and so on; messages call each `name`."""
    opened = (open_source(one, name=name) for one in given)
    return {kind if number == 1 else f"{kind} {number}": source for number, source in enumerate(opened, start=1)}


def read(
    source: Source,
    options: RowOptions,
    work: Path,
    *,
    harmful: bool = False,
    usual_names: bool = False,
    where: Sequence[Condition] | None = None,
    prompts_only: bool = False,
    keep: bool = False,
) -> Records:
    """Reads a source into canonical rows as the options say, in a folder beside `work` of each process's own.

    Args:
        source: The rows.
        options: Names of columns, and what to do with rows that cannot be used.
        work: Beginning of the folder's name.
        harmful: Whether a preference row gives its rejected side.
        usual_names: Whether a file that lacks the columns of `options` is read by the usual names.
        where: As in `read_records`, like the rest.
        prompts_only: Likewise.
        keep: Likewise.
    """
    columns = parse_columns(options.columns)
    if columns is not None and usual_names:
        first = next(source.scan(), None)
        columns = columns if first is not None and set(columns.values()) <= set(first.value or ()) else None
    return read_records(
        source,
        work_dir=f"{work}-{rank()}",
        columns=columns,
        side="rejected" if harmful else "chosen",
        on_bad_row=options.on_bad_row,
        where=where,
        prompts_only=prompts_only,
        keep=keep,
    )


def texts(records: Records) -> set[tuple[str, str]]:
    """Prompts with their completions, which tell whether two files hold the same rows."""
    return set(zip(records.dataset["prompt"], records.dataset["completion"], strict=True))


def model_options(options: Any) -> dict[str, Any]:
    """How the options of a run say that models are loaded: keyword arguments of `load_model`."""
    return {name: getattr(options, name) for name in ("device", "dtype", "template", "trust_remote_code")}


def load(name: str, options: Any, *, merge: bool = True) -> LoadedModel:
    """Loads a model where and how the options of a run say; see `load_model`."""
    return load_model(name, merge=merge, **model_options(options))


def tokenise(
    rows: datasets.Dataset, name: str, loaded: LoadedModel, options: Any, run: RunDir, *, where: str = ""
) -> Encoded:
    """Canonical rows as a model reads them, on disk in a folder `name` of a run's work; see `encode`.

    Messages call the rows `where`.
    """
    return encode(
        rows,
        loaded.tokenizer,
        loaded.template,
        on_long_prompt=options.on_long_prompt,
        on_bad_row=options.on_bad_row,
        max_length=min(options.max_length or loaded.max_length, loaded.max_length),
        work_dir=run.work("data", f"{name}-{rank()}"),
        name=where,
    )
