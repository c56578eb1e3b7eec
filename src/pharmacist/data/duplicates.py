"""Exact and near duplicates in a pool of any size, in flat memory.

Rows are sets of word shingles, those of the prompt kept apart from those of the completion; system prompts, which many
rows may have in common, do not count. Two rows are near-duplicates if the Jaccard similarity of their sets reaches the
threshold and that of prompts and of completions reaches half of it: a stock refusal under another prompt, or another
answer to the same long prompt, is no duplicate.

Candidates come from MinHash signatures cut into bands (Broder 1997; Leskovec et al., Mining of Massive Datasets,
chapter 3), are sifted by the similarity that the signatures estimate, and confirmed by the exact one. What grows with
the pool is a few numbers per row; signatures and band keys lie on disk, and one band is in memory at a time.
Signatures are datasketch's, but not the bands: its MinHashLSH takes 7 kB of memory a row (136 MB for 20 000 rows).
"""

import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasketch import MinHash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pharmacist.core.progress import bar, track
from pharmacist.data.arrays import BoolArray, IntArray, KeyArray
from pharmacist.data.conversations import without_system
from pharmacist.data.normalise import normalised_prompt, text_key, visible


SHINGLE = 3
"""Words per shingle."""
PERMUTATIONS = 128
"""Of MinHash; more find pairs at the threshold more surely."""

_RECALL = 0.995
_BATCH = 2048
# Words, single characters of scripts without spaces, and signs that change a sum; punctuation does not count.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s.,;:!?'\"()\[\]{}…–—-]")
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_SALT = np.array([0x27D4EB2F165667C5, 0x85EBCA77C2B2AE63], dtype=np.uint64)


def find_duplicates(
    rows: datasets.Dataset, *, threshold: float = 0.8, work_dir: str | os.PathLike[str] | None = None
) -> IntArray:
    """Finds rows that say the same; a chain of near-duplicates is one cluster.

    `rows` are canonical rows (`data.records`), and `threshold` is the least Jaccard similarity of near-duplicates, in
    (0, 1]. Signatures (about 300 bytes a row) lie in `work_dir`, by default in a temporary folder, until the end.

    Returns:
        Per row the smallest position in its cluster, shape [rows]; for a row without duplicates its position.
    """
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    if work_dir is not None:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="duplicates-", dir=work_dir) as folder:
        return _Finder(rows, threshold, Path(folder)).run()


class _Finder:
    def __init__(self, rows: datasets.Dataset, threshold: float, folder: Path) -> None:
        self.rows = rows.select_columns(["prompt", "turns", "completion"]).with_format("arrow")
        self.threshold, self.folder = threshold, folder
        self.bands, self.band_rows = choose_bands(threshold, PERMUTATIONS)

    def run(self) -> IntArray:
        n = len(self.rows)
        keys = self.sign()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        original = first[inverse].astype(np.int64)  # of the exact duplicates, the first row
        distinct = np.unique(first).astype(np.int64)
        cluster = np.arange(n, dtype=np.int64)
        rejected = np.empty(0, dtype=np.int64)
        pairs = np.empty((2, 0), dtype=np.int64)
        for band in track(range(self.bands), "near-duplicates"):
            for a, b in self.candidates(band, distinct, keys[distinct]):
                unknown = (cluster[a] != cluster[b]) & ~np.isin(a * n + b, rejected)
                a, b = a[unknown], b[unknown]
                same = self.confirm(a, b)
                rejected = np.union1d(rejected, (a * n + b)[~same])
                if same.any():
                    pairs = np.concatenate([pairs, [a[same], b[same]]], axis=1)
                    cluster = _components(n, pairs)
        return cluster[original]

    def sign(self) -> KeyArray:
        """Writes signatures and band keys; returns a hash of each row's normalised text, shape [rows]."""
        keys = np.empty(len(self.rows), dtype=np.uint64)
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        odd = np.random.default_rng(0).integers(1, 2**63, self.band_rows, dtype=np.uint64) | np.uint64(1)
        at = 0
        with ExitStack() as stack, bar("sign rows", len(keys)) as progress:
            signatures = stack.enter_context((self.folder / "signatures").open("wb"))
            bands = [stack.enter_context((self.folder / f"band{i}").open("wb")) for i in range(self.bands)]
            for table in self.rows.iter(_BATCH):
                prompts, completions = _texts(table)
                batch = np.empty((len(prompts), PERMUTATIONS), dtype=np.uint32)
                shingles, ends = _shingles(prompts, completions)
                numbers = (shingles & np.uint64(0xFFFFFFFF)).tolist()
                for i, (start, end) in enumerate(itertools.pairwise([0, *ends[1::2].tolist()])):
                    sketch.clear()
                    sketch.update_batch(numbers[start:end])
                    batch[i] = sketch.hashvalues
                    keys[at + i] = text_key(f"{normalised_prompt(prompts[i])}\0{normalised_prompt(completions[i])}")
                # The low byte is enough to compare two signatures, and keeps the file at one byte a permutation.
                # (Not numpy's tofile, which drops what a full disk does not take without a word.)
                signatures.write((batch & np.uint32(0xFF)).astype(np.uint8).data)
                used = batch[:, : self.bands * self.band_rows].astype(np.uint64)
                mixed = (used.reshape(len(batch), self.bands, self.band_rows) * odd).sum(axis=2)
                for i, file in enumerate(bands):
                    file.write(np.ascontiguousarray(mixed[:, i]).data)
                at += len(prompts)
                progress.advance(len(prompts))
        return keys

    def candidates(self, band: int, distinct: IntArray, contents: KeyArray) -> Iterator[tuple[IntArray, IntArray]]:
        """Pairs of rows with the same band key: each with the first of its bucket, then with the one before it.

        Linear in the rows, however large a bucket is. Buckets are ordered by content, so that the order of the pool
        decides nothing.
        """
        keys = np.fromfile(self.folder / f"band{band}", dtype=np.uint64)[distinct]
        order = np.lexsort((contents, keys))
        keys, members = keys[order], distinct[order]
        starts = np.concatenate([[True], keys[1:] != keys[:-1]])
        first = members[np.maximum.accumulate(np.where(starts, np.arange(len(members)), 0))]
        yield first[~starts], members[~starts]
        inner = ~starts
        inner[1:] &= ~starts[:-1]  # the second of a bucket has met the first already
        positions = np.flatnonzero(inner)
        yield members[positions - 1], members[positions]

    def confirm(self, a: IntArray, b: IntArray) -> BoolArray:
        """Whether the rows of each pair are near-duplicates."""
        same = np.zeros(len(a), dtype=np.bool_)
        # Three standard errors below the threshold, so that a pair at it is hardly ever lost to the estimate.
        least = self.threshold - 3 * np.sqrt(self.threshold * (1 - self.threshold) / PERMUTATIONS)
        for start in range(0, len(a), _BATCH):
            # Mapped anew for each portion, so that pages that were read do not pile up.
            signatures = np.memmap(self.folder / "signatures", np.uint8, "r").reshape(-1, PERMUTATIONS)
            part = slice(start, start + _BATCH)
            likely = start + np.flatnonzero((signatures[a[part]] == signatures[b[part]]).mean(axis=1) >= least)
            if len(likely):
                same[likely] = self.compare(a[likely], b[likely])
        return same

    def compare(self, a: IntArray, b: IntArray) -> BoolArray:
        """The exact test."""
        needed, where = np.unique(np.concatenate([a, b]), return_inverse=True)
        table = self.rows[needed]
        shingles, ends = _shingles(*_texts(table))
        sets = [np.unique(part) for part in np.split(shingles, ends[:-1])]
        pairs = zip(2 * where[: len(a)], 2 * where[len(a) :], strict=True)
        same = [_similar(sets[i : i + 2], sets[j : j + 2], self.threshold) for i, j in pairs]
        return np.array(same, dtype=np.bool_)


def _similar(one: list[KeyArray], other: list[KeyArray], threshold: float) -> bool:
    """Whether two rows, each with the shingles of its prompt and of its completion, are near-duplicates."""
    shared = total = 0
    for mine, its in zip(one, other, strict=True):
        common = len(np.intersect1d(mine, its, assume_unique=True))
        union = len(mine) + len(its) - common
        if common < threshold / 2 * union:
            return False
        shared, total = shared + common, total + union
    return shared >= threshold * total


def _texts(rows: pa.Table) -> tuple[list[str], list[str]]:
    """Prompts, without system prompts, and completions."""
    prompts, turns, completions = (rows.column(name).to_pylist() for name in ("prompt", "turns", "completion"))
    return list(map(without_system, prompts, turns)), completions


_word = lru_cache(1 << 17)(text_key)


def _shingles(prompts: list[str], completions: list[str]) -> tuple[KeyArray, IntArray]:
    """Hashed shingles of the words of all rows, and where each text (prompt, completion, prompt, ...) ends."""
    hashes: list[int] = []
    ends = []
    for pair in zip(prompts, completions, strict=True):
        for text in pair:
            found = list(map(_word, _TOKEN.findall(visible(text).casefold()) or [text.strip()]))
            hashes += found + [0] * (SHINGLE - len(found))  # a text shorter than a shingle is one shingle
            ends.append(len(hashes))
    words = np.array(hashes, dtype=np.uint64)
    texts = np.array(ends, dtype=np.int64)
    lengths = np.diff(texts, prepend=0)
    mixed = words * _MIX[0]
    mixed[:-1] += words[1:] * _MIX[1]
    mixed[:-2] += words[2:] * _MIX[2]
    mixed ^= np.repeat(np.resize(_SALT, len(texts)), lengths)
    mixed *= _MIX[0]
    mixed ^= mixed >> np.uint64(32)
    inside = np.ones(len(words), dtype=np.bool_)
    for back in range(1, SHINGLE):
        inside[texts - back] = False  # these would reach into the next text
    return mixed[inside], np.cumsum(lengths - (SHINGLE - 1))


def choose_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Number of bands and signature rows per band: the longest bands that still find a pair at the threshold.

    A pair of similarity s agrees in some band with probability ``1 - (1 - s**rows) ** bands``.

    >>> choose_bands(0.8, 128)
    (21, 6)
    """
    for rows in range(min(num_perm, 32), 0, -1):
        bands = num_perm // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return num_perm, 1


def _components(n: int, pairs: IntArray) -> IntArray:
    """Smallest row of each row's connected component; `pairs` of rows that are connected, shape [2, pairs]."""
    graph: Any = coo_array((np.ones(pairs.shape[1], dtype=np.bool_), tuple(pairs)), shape=(n, n))
    _, labels = connected_components(graph, directed=False)
    _, smallest = np.unique(labels, return_index=True)
    clusters: IntArray = smallest[labels]
    return clusters
