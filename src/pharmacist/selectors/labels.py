"""A person's labels of rows of the pool: which rows to ask for, and the file ``labels.json`` that holds them."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pharmacist.core.errors import DataError
from pharmacist.core.files import check_ordinary, read_json, write_json
from pharmacist.core.hashing import sha256_file
from pharmacist.core.progress import warn
from pharmacist.core.typed import cut
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.selectors.base import CRITICAL


if TYPE_CHECKING:
    from pharmacist.data.formats import Source

REASON_OF = {
    "good": CRITICAL,
    "harmful": "teaches_compliance",
    "over_refusal": "over_refusal",
    "not_safety_critical": "not_safety_critical",
    "low_quality": "low_quality",
}
"""Label that a person may give a row -> reason that the row is ranked by."""


def read_labels(path: "str | Path | Source", pool: str, rows: Sequence[int] | IntArray) -> dict[int, str]:
    """Labels of a pool's rows (`read_entries`): position in `rows` -> reason; a DataError too where there is none."""
    where = f"--labels {path}"
    labels = read_entries(path, pool, rows, where=where)
    if not labels:
        raise DataError(f"{where}: holds no labels; label some rows of to_label.jsonl first")
    position_of = {int(row): position for position, row in enumerate(rows)}
    return {position_of[row]: REASON_OF[label] for row, label in labels.items()}


def labels_fingerprint(path: "str | Path | Source") -> str:
    """The content of a file of labels, or of labels in memory; a DataError where it cannot be read."""
    if not isinstance(path, str | Path):
        return path.fingerprint()
    try:
        return sha256_file(path)
    except OSError as error:
        raise _unreadable(f"--labels {path}", error) from error


def _unreadable(where: str, error: OSError) -> DataError:
    return DataError(f"{where}: cannot be read ({error.strerror}); give the file that was saved")


def read_entries(
    path: "str | Path | Source", pool: str, rows: Sequence[int] | IntArray, *, where: str
) -> dict[int, str]:
    """Row number -> label, from ``{"pool": fingerprint, "labels": [{"row": 12, "label": "good"}, ...]}`` in a file.

    The bare list is read too, with a warning, since nothing then tells which pool it is about, unless it is in memory.
    Messages begin with `where`; the pool's fingerprint is ``inputs.pool`` of the manifest, and `rows` are the numbers
    of its usable rows. A DataError where it is no such file, belongs to another pool, or has an entry that cannot be,
    which is named.
    """
    entries = _entries(path, pool, where) if isinstance(path, str | Path) else [entry for _, entry in path.rows()]
    usable = set(np.asarray(rows).tolist())
    found: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where}: entry {number}: {cut(repr(entry))} is no object with row and label")
        row, label = entry.get("row"), entry.get("label")
        if isinstance(row, bool) or not isinstance(row, Integral) or row not in usable:
            raise DataError(f"{where}: entry {number}: the pool has no usable row {row!r}; delete the entry")
        if not isinstance(label, str) or label not in REASON_OF:
            raise DataError(f"{where}: entry {number}, row {row}: label {label!r} is none of {', '.join(REASON_OF)}")
        if row in found:
            raise DataError(f"{where}: row {row} has two labels; keep one of them")
        found[int(row)] = label
    return found


def _entries(path: str | Path, pool: str, where: str) -> list[Any]:
    """The entries of a file."""
    form = 'write it as {"pool": ..., "labels": [{"row": 0, "label": "good"}, ...]}'
    check_ordinary(path, where)
    try:
        content = read_json(path)
    except OSError as error:
        raise _unreadable(where, error) from error
    except DataError as error:
        raise DataError(f"{where}: contains no JSON, or more than one value; {form}") from error
    entries = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{where}: {form}")
    if isinstance(content, list):
        warn(f"{where}: names no pool, so it cannot be checked whether the labels belong to this pool")
    elif content.get("pool") != pool:
        raise DataError(
            f"{where}: was made for another pool than --pool, whose fingerprint is {pool}; label the rows of this one"
        )
    return entries


def labels_of(scores: pd.DataFrame) -> dict[int, str]:
    """Row number -> label, of the labels that a ranking was made with (column ``label`` of ``scores.parquet``)."""
    if "label" not in scores:
        return {}
    label_of = {reason: label for label, reason in REASON_OF.items()}
    known = scores[scores["label"].isin(label_of)]
    return {int(row): label_of[reason] for row, reason in zip(known["row"], known["label"], strict=True)}


def write_labels(path: Path, pool: str, labels: Mapping[int, str]) -> None:
    """Writes ``labels.json`` in whole or not at all: row number -> label, in order of the rows."""
    write_json(path, {"pool": pool, "labels": [{"row": row, "label": labels[row]} for row in sorted(labels)]})


def rows_to_label(
    informativeness: FloatArray, reasons: Sequence[str], prompts: Iterable[Any], clusters: IntArray, n: int
) -> IntArray:
    """The rows whose label would teach most: the least certain of each reason in turn, none like one before it or like
    one that has a label.

    `informativeness` is negative where a row has a label; rows of one prompt share an entry of `prompts`,
    near-duplicates a number in `clusters`. Returns at most `n` positions, the most informative of the first reason
    first.
    """
    prompts = list(prompts)

    def marks(position: int) -> set[Any]:
        return {("prompt", prompts[position]), ("cluster", int(clusters[position]))}

    seen = {mark for position in np.flatnonzero(informativeness < 0).tolist() for mark in marks(position)}
    queues: dict[str, list[int]] = {}
    for position in np.argsort(-informativeness, kind="stable").tolist():
        if informativeness[position] >= 0:
            queues.setdefault(str(reasons[position]), []).append(position)
    chosen: list[int] = []
    pending = [iter(queues[reason]) for reason in sorted(queues)]
    while pending and len(chosen) < n:
        for queue in pending.copy():
            position = next((p for p in queue if not marks(p) & seen), None)
            if position is None:
                pending.remove(queue)
            elif len(chosen) < n:
                chosen.append(position)
                seen |= marks(position)
    return np.array(chosen, dtype=np.int64)
