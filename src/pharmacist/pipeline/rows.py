"""Opens, reads and tokenises rows and loads models as the options of a stage say."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets

from pharmacist.core.env import process_index
from pharmacist.core.naming import flag
from pharmacist.core.options import RowOptions
from pharmacist.core.progress import say
from pharmacist.core.rundir import RunDir
from pharmacist.data.formats import Source, open_source
from pharmacist.data.layouts import OPTIONAL
from pharmacist.data.records import Records, own_columns, parse_columns, read_records
from pharmacist.data.tokenize import Encoded, encode
from pharmacist.data.where import Condition
from pharmacist.nn.models import LoadedModel, load_model
from pharmacist.pipeline.stages.curate import REFERENCES


T = TypeVar("T")
PROMPT_COLUMNS = OPTIONAL | {"prompt", "messages", "instruction"}
"""Columns of which prompts are made."""


def open_references(options: Any, within: str = "") -> dict[str, Source]:
    """Opens the references that options name, as ``safe``, ``safe 2`` and so on.

    Messages name the options, with `within` in front: ``evaluate.`` for those in a sweep.
    """
    found: dict[str, Source] = {}
    for kind in REFERENCES:
        found |= numbered(kind, (open_source(one, name=flag(within + kind)) for one in getattr(options, kind)))
    return found


def numbered(kind: str, several: Iterable[T]) -> dict[str, T]:
    """The inputs of one kind by the names ``safe``, ``safe 2`` and so on."""
    return {kind if number == 1 else f"{kind} {number}": one for number, one in enumerate(several, start=1)}


def read(
    source: Source,
    options: RowOptions,
    work: Path,
    *,
    harmful: bool = False,
    columns: Mapping[str, str] | None = None,
    usual_names: bool = False,
    where: Sequence[Condition] | None = None,
    prompts_only: bool = False,
    keep: bool = False,
) -> Records:
    """Reads a source into canonical rows as the options say.

    Args:
        source: The rows.
        options: Columns, and what happens to rows that cannot be used.
        work: Prefix of the folder that each process writes the rows to.
        harmful: Whether a preference row gives its rejected answer.
        columns: Used instead of the options' columns.
        usual_names: Whether a source that lacks columns of the options, but for those that rows may lack, is read by
            the usual names.
        where: As in `read_records`, like `prompts_only` and `keep`.
        prompts_only: Whether rows need no completion, so that the columns of completions do not count.
        keep: Whether the user's own columns travel along.
    """
    columns = parse_columns(options.columns) if columns is None else columns
    if columns is not None and prompts_only:
        columns = {to: name for to, name in columns.items() if to in PROMPT_COLUMNS}
    if columns is not None and usual_names:
        columns = own_columns(source, columns)
    return read_records(
        source,
        work_dir=f"{work}-{process_index()}",
        columns=columns,
        side="rejected" if harmful else "chosen",
        on_bad_row=options.on_bad_row,
        where=where,
        prompts_only=prompts_only,
        keep=keep,
    )


def usual_names(sources: Iterable[Source], options: RowOptions) -> bool:
    """Whether files that lack the columns of ``--columns`` are read by the usual names: where another one has them."""
    columns = parse_columns(options.columns) or {}
    return any(own_columns(source, columns) for source in sources)


def name_unused(options: Any, names: Iterable[str], used: Collection[str], method: str) -> None:
    """Prints which of some options are given although a method does not use them."""
    for name in names:
        if name not in used and getattr(options, name) is not None:
            say(f"--{name}: the {method} does not use it")


def texts(records: Records) -> set[tuple[str, str]]:
    """Pairs of prompt and completion, by which files with the same rows are recognised."""
    return set(zip(records.dataset["prompt"][:], records.dataset["completion"][:], strict=True))


def model_options(options: Any) -> dict[str, Any]:
    """The keyword arguments of `load_model` that a run's options hold."""
    return {name: getattr(options, name) for name in ("device", "dtype", "template", "trust_remote_code")}


def load(name: str, options: Any, *, merge: bool = True) -> LoadedModel:
    """Loads a model as a run's options say; see `load_model`."""
    return load_model(name, merge=merge, **model_options(options))


def tokenise(
    rows: datasets.Dataset, name: str, loaded: LoadedModel, options: Any, run: RunDir, *, where: str
) -> Encoded:
    """Tokenises canonical rows for a model, on disk under `name`; see `encode`.

    Prints how many rows are left out or cut; messages call the rows `where`.
    """
    encoded = encode(
        rows,
        loaded.tokenizer,
        loaded.template,
        on_long_prompt=options.on_long_prompt,
        on_bad_row=options.on_bad_row,
        max_length=min(options.max_length or loaded.max_length, loaded.max_length),
        work_dir=run.work("data", f"{name}-{process_index()}"),
        name=where,
    )
    lost = {
        "rows are left out, since the chat template refuses them": len(encoded.not_rendered),
        "rows are left out, since the prompt alone fills the length": len(encoded.refused),
        "prompts are cut to fit the length": len(encoded.cut_prompts),
        "completions are cut to fit the length": encoded.truncated,
    }
    for what, number in lost.items():
        if number:
            say(f"{where}: {number} of {len(rows)} {what}")
    return encoded


def trained_counts(encoded: Encoded) -> dict[str, int]:
    """Numbers of rows for the manifest of a training: those trained on, and what was lost as they were tokenised."""
    return {
        "trained": len(encoded),
        "long_prompts_left_out": len(encoded.refused),
        "truncated": encoded.truncated,
        "lost_eos": encoded.lost_eos,
        "cut_prompts": len(encoded.cut_prompts),
    }
