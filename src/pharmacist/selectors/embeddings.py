"""Embeddings of rows, by the base model's hidden states or a sentence encoder, and the selector by similarity."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from torch import nn

from pharmacist.core.env import offline
from pharmacist.core.errors import ConfigError, DataError, one_line
from pharmacist.core.files import atomic_path
from pharmacist.core.progress import track
from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast0, Checked
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.batching import Batch
from pharmacist.nn.devices import resolve_device
from pharmacist.nn.libraries import failures_as, silent_library
from pharmacist.nn.losses import precise
from pharmacist.nn.memory import available_memory
from pharmacist.nn.passes import copy_to_equals
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.baselines import text_hashes


Finish = Callable[[FloatArray], FloatArray]

DIMENSION = 256
"""Wider embeddings are projected at random to that many numbers per row where all rows are held at once."""
_POINT = 9 * DIMENSION
"""Bytes that a row's point takes in memory, and again on disk: float64, and an eighth for keys, order and scores."""
_CHUNK = 4096


def mean_states(model: nn.Module, batch: Batch) -> FloatArray:
    """The last hidden state, averaged over all tokens of a row, shape [rows, width]."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    state = precise(output.hidden_states[-1])
    weight = batch.attention_mask.to(state.dtype)[:, :, None]
    return ((state * weight).sum(1) / weight.sum(1)).double().cpu().numpy()


def unit(vectors: FloatArray) -> FloatArray:
    """Vectors of length 1, shape [vectors, dimensions]; zero stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def embed(context: SelectionContext, rows: datasets.Dataset, name: str, finish: Finish) -> FloatArray:
    """Embeds canonical rows, each distinct one once, and keeps what `finish` makes of embeddings [rows, width].

    By the ranking's embedder where there is one, else by its model; the same name means the same of the same rows.
    """
    if context.embedder is not None:
        return _sentences(context, context.embedder, rows, name, finish)
    model = context.model.model
    encoded = context.encoded_pool if rows is context.pool.dataset else context.encode(rows, name)
    return context.read(encoded, lambda batch: {"kept": finish(mean_states(model, batch))}, name)["kept"]


def pool_keys(context: SelectionContext) -> npt.NDArray[np.uint64]:
    """A hash of each row's content: equal rows have equal keys, shape [rows]."""
    return context.encoded_pool.content_keys if context.embedder is None else text_hashes(context.pool.dataset)


def pool_points(context: SelectionContext) -> FloatArray:
    """The pool's rows as points of length 1 seen from its centre; made once, shape [rows, at most `DIMENSION`].

    Hidden states of language models share one large direction, against which rows hardly differ; without it they do.
    """
    if context.points is not None:
        return context.points
    check_room(len(context.pool), context.run.root)

    @cache
    def projection(width: int) -> FloatArray:
        rng = np.random.default_rng(derive(context.seed, "embeddings", "projection"))
        return np.asarray(rng.normal(size=(width, DIMENSION)) / DIMENSION**0.5)

    def narrow(states: FloatArray) -> FloatArray:
        width = states.shape[1]
        return states if width <= DIMENSION else states @ projection(width)

    points = embed(context, context.pool.dataset, "points", narrow)
    # Summed in the order of the keys: sums depend on their order, and scores must not depend on that of the rows.
    distinct = np.unique(pool_keys(context), return_index=True)[1]
    chunks = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
    points -= sum(points[rows].sum(0) for rows in chunks) / len(distinct)
    for start in range(0, len(points), _CHUNK):
        points[start : start + _CHUNK] = unit(points[start : start + _CHUNK])
    context.points = points
    return points


def check_room(rows: int, folder: Path) -> None:
    """Refuses a pool whose points memory, or the disk of the run's folder, cannot hold; as `Selector.check_room`."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed = _POINT * rows
    for free, what in ((available_memory(), "memory"), (shutil.disk_usage(there).free, f"disk space in {there}")):
        if needed > free:
            raise ConfigError(
                f"comparing {rows} rows with each other needs {needed / 2**30:.1f} GiB of {what} and "
                f"{free / 2**30:.1f} are free; rank a smaller pool, or by a selector that reads one row at a time"
            )


def load_sentence_encoder(name: str, device: str = "auto") -> Any:
    """A sentence-transformers model."""
    check_sentence_encoder()
    from sentence_transformers import SentenceTransformer

    what = f"--embedder {name}: sentence-transformers cannot load it"
    with failures_as(DataError, lambda error: f"{what} ({one_line(error)})"), silent_library():
        return SentenceTransformer(name, device=str(resolve_device(device)), local_files_only=offline())


def check_sentence_encoder() -> None:
    """Says how to install what ``--embedder`` needs, where it is missing."""
    if find_spec("sentence_transformers") is None:
        raise ConfigError("--embedder needs sentence-transformers; pip install 'pharmacist[embeddings]'")


def _sentences(
    context: SelectionContext, embedder: str, rows: datasets.Dataset, name: str, finish: Finish
) -> FloatArray:
    """As `embed`, by a sentence encoder; chunks depend on content alone and are saved when done."""
    distinct, inverse = np.unique(text_hashes(rows), return_index=True, return_inverse=True)[1:]
    encoder, found = None, np.empty(0)
    work, columns = context.run.work("read", name), rows.select_columns(["prompt", "completion"])
    work.mkdir(parents=True, exist_ok=True)
    with context.run.phase("score"):
        for start in track(range(0, len(distinct), _CHUNK), f"reading rows ({name})"):
            path = work / f"sentences-{start:012d}.safetensors"
            chosen: IntArray = distinct[start : start + _CHUNK]
            if not path.is_file():
                encoder = encoder or load_sentence_encoder(embedder, context.device)
                batch = columns[chosen.tolist()]
                texts = ["\n".join(pair) for pair in zip(batch["prompt"], batch["completion"], strict=True)]
                states = encoder.encode(texts, show_progress_bar=False, convert_to_numpy=True).astype(np.float64)
                with atomic_path(path) as temporary:
                    save_file({"kept": finish(states)}, temporary)
            kept = load_file(path)["kept"]
            if start == 0:
                found = np.empty((len(rows), *kept.shape[1:]))
            found[chosen] = kept
    copy_to_equals(found, distinct[inverse], np.arange(len(rows)))
    return found


@dataclass
class EmbeddingConfig(Checked):
    """Options of the selector."""

    nearest: AtLeast0 = 0
    """Average the cosine similarity to this many nearest references; 0 uses the similarity to the centroid of all
    references."""


class EmbeddingSelector(Selector):
    """Prefers rows whose embedding is similar to those of the safe references."""

    Config = EmbeddingConfig
    name = "embedding"
    needs = frozenset({"safe", "embedder"})
    paper = "representation-based data selection, as a baseline in Xia et al. 2024, arXiv 2402.04333"

    def rank(self, context: SelectionContext) -> Scores:
        references, nearest = context.reference_rows("safe"), self.config.nearest
        if nearest > len(references):
            raise ConfigError(f"selector.nearest {nearest}: there are {len(references)} safe references")
        known = embed(context, references, "safe-embeddings", unit)
        score = embed(context, context.pool.dataset, "likeness", lambda states: likeness(unit(states), known, nearest))
        return Scores(score)


def likeness(states: FloatArray, references: FloatArray, nearest: int) -> FloatArray:
    """Cosine to the references' centroid, or mean cosine to so many nearest ones; all of length 1; shape [rows]."""
    if nearest == 0:
        return np.asarray(states @ unit(references.mean(0, keepdims=True))[0])
    return np.asarray(np.sort(states @ references.T, axis=1)[:, -nearest:].mean(1))
