"""Opens, reads and tokenises rows, and loads models, with the options of a stage."""

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
    """Reads a source into canonical rows with the options of a stage.

    Args:
        source: The rows.
        options: The stage's.
        work: Folder for the canonical rows; the rank of the process is added to its name.
        harmful: Take the rejected answer of a preference row.
        usual_names: Read a file that lacks the columns of the options by the usual names.
        where: As in `read_records`, like the following.
        prompts_only: Read prompts alone.
        keep: Keep the rows as they are in the file too.
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
    """Pairs of prompt and completion, to compare the rows of two files."""
    return set(zip(records.dataset["prompt"], records.dataset["completion"], strict=True))


def model_options(options: Any) -> dict[str, Any]:
    """The keyword arguments of `load_model` among the options of a run."""
    return {name: getattr(options, name) for name in ("device", "dtype", "template", "trust_remote_code")}


def load(name: str, options: Any, *, merge: bool = True) -> LoadedModel:
    """Loads a model with the options of a run; see `load_model`."""
    return load_model(name, merge=merge, **model_options(options))


def tokenise(
    rows: datasets.Dataset, name: str, loaded: LoadedModel, options: Any, run: RunDir, *, where: str = ""
) -> Encoded:
    """Tokenises canonical rows for a model, on disk in a folder `name` of the run's work; see `encode`.

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
