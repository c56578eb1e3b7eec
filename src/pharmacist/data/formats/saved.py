"""Rows that were saved by `datasets`, lie on the hub, or are in memory."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from pharmacist.core.env import offline
from pharmacist.core.errors import DataError, one_line
from pharmacist.core.files import read_json
from pharmacist.core.hashing import sha256_content
from pharmacist.data.formats.base import FORMATS, Row, Source
from pharmacist.data.formats.parquet import BATCH, check_names


IN_MEMORY = "rows in memory>"
"""End of the name of rows that are neither in a file nor on the Hub."""


class SavedDataset(Source):
    """A `datasets.Dataset`: saved, from the hub, or in memory."""

    def __init__(self, spec: Any, label: str, name: str, format: str, data: datasets.Dataset) -> None:
        super().__init__(spec, label, name)
        self.format, self._data, self.schema = format, data.with_format(None), data.features.arrow_schema
        self._features = datasets.Features(_undecoded(data.features))

    def _content_hash(self) -> str:
        return sha256_content(str(self.spec)) if self.format == "arrow" else super()._content_hash()

    def scan(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        names = [name for name in self._data.column_names if columns is None or name in columns]
        if not names:  # a dataset without columns has no rows either
            yield from (Row(number, None, {}) for number in range(len(self._data)))
            return
        number = 0
        try:
            for table in self._data.select_columns(names).with_format("arrow").iter(BATCH):
                batch = self._features.decode_batch(table.to_pydict())
                for values in zip(*(batch[name] for name in names), strict=True):
                    yield Row(number, None, dict(zip(names, values, strict=True)))
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.where}: damaged Arrow data after row {number} ({one_line(error)}); save it again"
            ) from error

    def pick(self, numbers: Iterable[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        if numbers is None:
            return self.scan(columns)
        chosen = [int(number) for number in numbers]
        if chosen and chosen[-1] >= len(self._data):
            raise self._no_row(chosen[-1])
        picked = SavedDataset(self.spec, self.label, self.name, self.format, self._data.select(chosen))
        return (row._replace(number=chosen[row.number]) for row in picked.scan(columns))

    def dataset(self, numbers: Iterable[int]) -> datasets.Dataset:
        return self._data.select([int(number) for number in numbers])


def _undecoded(kind: Any) -> Any:
    """A type of `datasets`, or several by column, in which images, sound and the like stay bytes."""
    if isinstance(kind, dict):
        return {name: _undecoded(inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [_undecoded(inner) for inner in kind]
    if hasattr(kind, "feature"):
        return replace(kind, feature=_undecoded(kind.feature))
    media = hasattr(kind, "decode") and not isinstance(kind, datasets.Json)
    return replace(kind, decode=False) if media else kind


class Mappings(Source):
    """A sequence of mappings."""

    format = "memory"

    def scan(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        for number, value in enumerate(self.spec):
            if isinstance(value, Mapping):
                read = value if columns is None else columns
                own = {name: _of_python(cell) if name in read else cell for name, cell in value.items()}
                yield Row(number, None, own)
            else:
                yield Row(number, None, None, f"is not a mapping of column names to values but {type(value).__name__}")


def _of_python(cell: Any) -> Any:
    """A cell with Python's own types: messages may be in a tuple, or in an array, as pandas reads them."""
    if isinstance(cell, np.ndarray | np.number | np.bool_):
        cell, whole = cell.tolist(), cell.dtype != object
        if whole:
            return cell
    if isinstance(cell, dict):
        return {name: _of_python(inner) for name, inner in cell.items()}
    return list(map(_of_python, cell)) if isinstance(cell, list | tuple) else cell


def open_memory(spec: Any, name: str) -> Source:
    """Rows in memory; a DataError where they are neither a dataset, a data frame nor a sequence."""
    if isinstance(spec, pd.DataFrame):
        try:
            spec = datasets.Dataset.from_pandas(spec, preserve_index=False)
        except (pa.ArrowException, ValueError, TypeError) as error:  # columns of several types, or of the same name
            raise DataError(
                f"{name}: the DataFrame cannot be read ({one_line(error)}); give a list of mappings"
            ) from error
    if isinstance(spec, datasets.Dataset):
        return SavedDataset(spec, f"<{len(spec)} {IN_MEMORY}", name, "memory", spec)
    if isinstance(spec, Mapping) or not isinstance(spec, Sequence):
        hint = "choose one split of it" if isinstance(spec, datasets.DatasetDict) else "give a list of mappings"
        raise DataError(
            f"{name}: cannot read rows from {type(spec).__name__}; {hint}, a datasets.Dataset, a path or a Hub id"
        )
    return Mappings(spec, f"<{len(spec)} {IN_MEMORY}", name)


def open_folder(path: Path, split: str | None, label: str, name: str) -> Source:
    """A folder that `datasets` has saved; a DataError where it is none, is damaged, or a split must be named."""
    where = f"{name} {label}"
    if (path / "dataset_dict.json").is_file():
        try:
            splits = [str(name) for name in read_json(path / "dataset_dict.json")["splits"]]
        except (DataError, OSError, KeyError, TypeError) as error:
            raise DataError(f"{where}: dataset_dict.json is damaged and names no splits; save it again") from error
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise DataError(f"{where}: is a folder of splits; write {path}:SPLIT with one of {', '.join(splits)}")
        path = path / str(split)
    elif split is not None:
        raise DataError(f"{where}: the folder has no splits; leave ':{split}' out")
    if not (path / "state.json").is_file():
        raise DataError(
            f"{where}: is a directory without a saved dataset; give a file or a folder written by Dataset.save_to_disk"
        )
    try:
        data = datasets.load_from_disk(str(path))
        # Offsets that lead astray would end the process when they are followed.
        data.data.table.validate(full=True)
    except Exception as error:  # whatever is wrong with the folder, the caller has to replace it
        raise DataError(f"{where}: the saved dataset cannot be opened ({one_line(error)}); save it again") from error
    check_names(data.data.table.schema, where)
    return SavedDataset(path, label, name, "arrow", data)


def open_hub(text: str, name: str) -> Source:
    """A dataset on the hub, ``name[:config][:split]``; a DataError where it cannot be had."""
    identifier, *parts = text.split(":")
    where = f"{name} {text}"
    try:
        data = _loaded(identifier, *parts)
    except Exception as error:  # network, authentication, unknown names: the library's message says which
        if offline():
            raise DataError(
                f"{where}: no such file or folder, and HF_HUB_OFFLINE forbids downloads; "
                f"download it and give a file ({FORMATS}) or a folder saved by datasets"
            ) from error
        raise DataError(
            f"{where}: no such file or folder, and it cannot be loaded from the Hub ({one_line(error)}); "
            "check the name, or give a local file"
        ) from error
    if isinstance(data, dict):
        splits = list(data)
        if len(splits) > 1 and "train" not in splits:
            raise DataError(f"{where}: has several splits; write {text}:SPLIT with one of {', '.join(splits)}")
        data = data["train" if "train" in splits else splits[0]]
    return SavedDataset(text, text, name, "hub", data)


def _loaded(identifier: str, *parts: str) -> Any:
    if len(parts) == 2:
        return datasets.load_dataset(identifier, parts[0], split=parts[1])
    if parts:
        try:
            datasets.load_dataset_builder(identifier, parts[0])
        except ValueError:  # no configuration is called so: it is a split
            return datasets.load_dataset(identifier, split=parts[0])
    return datasets.load_dataset(identifier, *parts)
