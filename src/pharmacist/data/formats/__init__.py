"""Reading and writing rows in every supported format, as a stream; nothing else knows about files.

| format | file | rows |
|---|---|---|
| ``jsonl`` | ``.jsonl``, or ``.json`` with one row per line; also ``.gz``, ``.zst`` | one JSON object per line |
| ``json`` | ``.json``; also ``.gz``, ``.zst`` | the elements of one JSON array, parsed one by one |
| ``csv`` | ``.csv``; also ``.gz``, ``.zst`` | comma-separated, first line names the columns |
| ``parquet`` | ``.parquet`` | batches of a file |
| ``arrow`` | a folder written by ``Dataset.save_to_disk`` (``folder:split`` for a ``DatasetDict``) | memory-mapped |
| ``hub`` | ``name[:config][:split]`` | memory-mapped in the cache of ``datasets`` |
| ``memory`` | a ``datasets.Dataset``, a pandas ``DataFrame`` or a sequence of mappings | as they are |

Rows are numbered from 0 in input order; blank lines are no rows. A row of a text format may have at most
`MAX_ROW_BYTES`, so that one broken line cannot fill the memory.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path, check_ordinary
from pharmacist.data.compression import SUFFIXES, check_magic, open_bytes, split_suffix
from pharmacist.data.formats.base import FORMATS, MAX_ROW_BYTES, Row, Source
from pharmacist.data.formats.json_array import JsonArray
from pharmacist.data.formats.json_text import kind_of, spelled
from pharmacist.data.formats.parquet import Parquet
from pharmacist.data.formats.saved import IN_MEMORY, open_folder, open_hub, open_memory
from pharmacist.data.formats.text import BOM, Csv, JsonLines


__all__ = ["IN_MEMORY", "MAX_ROW_BYTES", "Row", "Source", "kind_of", "open_source", "spelled", "write_rows"]


def open_source(spec: Any, *, name: str = "pool") -> Source:
    """Opens a source of rows for streaming; a DataError where `spec` names nothing that can be read.

    `spec` is a path, a Hub id ``name[:config][:split]``, a ``datasets.Dataset``, a pandas ``DataFrame`` or a sequence
    of mappings; `name` says in messages what the rows are for.
    """
    if isinstance(spec, Source):
        return spec
    if not isinstance(spec, str | os.PathLike):
        return open_memory(spec, name)
    text = os.fspath(spec)
    path = Path(os.path.expanduser(text))
    if not text.strip():
        raise DataError(f"{name}: an empty path; give a file, a folder saved by datasets or a Hub id")
    # Unlike the methods of Path, these raise no error for names that no file system accepts.
    if os.path.isdir(path):
        return open_folder(path, None, text, name)
    if os.path.exists(path):
        return _open_file(path, text, name)
    folder, _, split = text.rpartition(":")
    if folder and os.path.isdir(os.path.expanduser(folder)):
        return open_folder(Path(os.path.expanduser(folder)), split, text, name)
    known = split_suffix(path)[0] in _READERS or path.suffix.lower() in SUFFIXES
    if isinstance(spec, os.PathLike) or known or not HUB_ID.fullmatch(text):
        raise DataError(f"{name} {text}: no such file; check the path")
    return open_hub(text, name)


def write_rows(source: Source, rows: Sequence[int], path: str | os.PathLike[str], format: str | None = None) -> None:
    """Writes the rows of a source with these numbers (ascending): every column unchanged, whole or not at all.

    JSON lines, JSON and CSV rows are copied byte by byte; Parquet keeps its schema. The name's suffix ``.gz`` or
    ``.zst`` compresses. `format` is ``jsonl``, or the source's own (the default; ``jsonl`` where it has no file
    format). JSON has no NaN, so that one in a Parquet or in-memory column becomes null in JSON lines.
    """
    target = Path(path)
    chosen = format or source.native
    if chosen not in {"jsonl", source.native}:
        known = "jsonl" if source.native == "jsonl" else f"{source.native} or jsonl"
        raise DataError(f"{source.where}: rows of a {source.format} source can be written as {known}, not {chosen}")
    with atomic_path(target) as temporary:
        source.write([int(row) for row in rows], chosen, temporary, target)


def _open_json(path: Path, label: str, name: str) -> Source:
    """One array of rows, or one row per line, whatever the file is called."""
    with open_bytes(path, f"{name} {label}") as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    if start.startswith(b"[") and (split_suffix(path)[0] == ".json" or _ARRAY.match(start)):
        return JsonArray(path, label, name)
    if _SPREAD_OBJECT.match(start):
        key = re.search(rb'"([A-Za-z_]+)"\s*:\s*\[\s*\{', start)
        rows = f" under '{key[1].decode()}'" if key is not None else ""
        raise DataError(
            f"{name} {label}: is one JSON object over several lines, not one row per line; save its list of "
            f"rows{rows} by itself, as a JSON array or one row per line"
        )
    return JsonLines(path, label, name)


_ARRAY = re.compile(rb"\[\s*(?:[{\]]|\Z)")
# An object over several lines, told from a damaged first row by how its second line begins.
_SPREAD_OBJECT = re.compile(
    rb'\{[ \t]*(?:\r?\n\s*["}]|"\w+"[ \t]*:[ \t]*\[[ \t]*\{?[ \t]*\r?\n\s*["{\[\]]|[^\n]*,[ \t]*\r?\n\s*"\w+"\s*:)'
)
_READERS: dict[str, Callable[[Path, str, str], Source]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _open_json),
    ".csv": Csv,
    ".parquet": Parquet,
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}")
"""What names a dataset on the Hub: ``name[:config][:split]``."""


def _open_file(path: Path, label: str, name: str) -> Source:
    where = f"{name} {label}"
    check_ordinary(path, where)
    suffix, compression = split_suffix(path)
    if suffix not in _READERS:
        raise DataError(f"{where}: unknown kind of file '{path.suffix}'; known are {FORMATS}")
    if suffix == ".parquet" and compression is not None:
        raise DataError(f"{where}: Parquet compresses by itself; unpack the file and give the .parquet inside")
    try:
        check_magic(path, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be opened ({error.strerror}); check its permissions") from error
    return _READERS[suffix](path, label, name)
