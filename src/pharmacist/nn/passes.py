"""Forward-only passes over a pool, sorted by length, in chunks that are saved when they are done."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from pharmacist.core.env import process_index, world_size
from pharmacist.core.files import atomic_path, read_json, write_json
from pharmacist.core.progress import bar
from pharmacist.data.arrays import IntArray
from pharmacist.nn.batching import Batch, Sequences, make_batch, plan_pass
from pharmacist.nn.distributed import barrier, my_share
from pharmacist.nn.reading import tokens_per_batch


Measure = Callable[[Batch], dict[str, npt.NDArray[Any]]]
_COPIED = 4096
ROWS_PER_CHUNK = 2048
"""Rows that are saved together, at least."""


def run_pass(
    model: nn.Module,
    sequences: Sequences,
    measure: Measure,
    *,
    work: Path,
    description: str,
    rows: IntArray | None = None,
    backward: bool = False,
    tokens: int | None = None,
) -> dict[str, npt.NDArray[np.float64]]:
    """Measures every row (or `rows`) once.

    The processes of a data-parallel run share the chunks; batches do not depend on their number.

    Args:
        model: Says where batches go, and how large they may be.
        sequences: The rows.
        measure: Batch -> arrays whose first axis is the batch's rows.
        work: Folder for finished chunks of at least `ROWS_PER_CHUNK` rows; shared by all processes.
        description: For the progress bar.
        rows: Row numbers to read, all by default.
        backward: Whether `measure` keeps what a backward pass needs, so that batches must be smaller.
        tokens: Padded tokens per batch, halved until the longest batch fits; by default as the model allows.

    Returns:
        One array per measurement, first axis in row order over the whole pool; NaN outside of `rows`.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    if tokens is None:
        tokens = tokens_per_batch(model, device)
        tokens = max(256, tokens // 8) if backward else tokens
    plan = plan_pass(sequences, _fitting(sequences, measure, work, device, tokens, rows), rows)
    chunks, size = list[list[IntArray]](), ROWS_PER_CHUNK
    for batch in plan.batches:
        if size >= ROWS_PER_CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(batch)
        size += len(batch)
    paths = [work / f"{number:06d}.safetensors" for number in range(len(chunks))]
    with bar(description, sum(map(len, plan.batches))) as progress, torch.no_grad():
        for path, chunk in my_share(list(zip(paths, chunks, strict=True))):
            if not path.is_file():
                parts = [measure(make_batch(sequences, batch, device)) for batch in chunk]
                arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
                with atomic_path(path) as temporary:
                    save_file(arrays | {"rows": np.concatenate(chunk)}, temporary)
            progress.advance(sum(map(len, chunk)) * world_size())
    barrier()
    everything = np.arange(len(sequences.lengths))
    result: dict[str, npt.NDArray[np.float64]] = {}
    for path in paths:
        arrays = load_file(path)
        where = arrays.pop("rows")
        for key, values in arrays.items():
            if key not in result:
                result[key] = np.full((len(everything), *values.shape[1:]), np.nan, dtype=values.dtype)
            result[key][where] = values
    for values in result.values():
        copy_to_equals(values, plan.representative, everything if rows is None else rows)
    return result


def copy_to_equals(values: npt.NDArray[Any], representative: IntArray, rows: IntArray) -> None:
    """Copies measurements, in place, from the rows that were read to those of `rows` that equal them.

    The first axis of `values` is all rows; no second array of that size is made. For `representative` see `PassPlan`.
    """
    copies = rows[representative[rows] != rows]
    for start in range(0, len(copies), _COPIED):
        some = copies[start : start + _COPIED]
        values[some] = values[representative[some]]


def _fitting(
    sequences: Sequences, measure: Measure, work: Path, device: torch.device, tokens: int, rows: IntArray | None
) -> int:
    """Largest tokens per batch, by halving, at which the longest batch fits; fixed for all resumes and ranks.

    Chunks of other rows are deleted. Where even the longest row alone does not fit, the error says so.
    """
    path = work / "plan.json"
    own = hashlib.sha256(sequences.content_keys.tobytes() + (b"" if rows is None else rows.tobytes())).hexdigest()
    if process_index() == 0 and not (path.is_file() and read_json(path).get("rows") == own):
        for chunk in work.glob("*.safetensors"):
            chunk.unlink()
        while device.type == "cuda":
            torch.cuda.empty_cache()
            longest = plan_pass(sequences, tokens, rows).batches[0]
            try:
                with torch.no_grad():
                    measure(make_batch(sequences, longest, device))
                break
            except torch.OutOfMemoryError:
                if len(longest) == 1:
                    raise
                tokens //= 2
        write_json(path, {"tokens_per_batch": tokens, "rows": own})
    barrier()
    return int(read_json(path)["tokens_per_batch"])
