"""Opens, reads and checks pool, references, labels and models before `curate` does any work."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import concatenate_datasets

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import is_whole_tensors, read_json
from pharmacist.core.hashing import sha256_content
from pharmacist.core.manifest import check_unchanged
from pharmacist.data.formats import open_source
from pharmacist.data.mixing import shared_prompts
from pharmacist.data.records import Records
from pharmacist.data.tokenize import rendered_rows
from pharmacist.data.where import conditions_of
from pharmacist.evaluation.prompts import category_names
from pharmacist.nn.devices import resolve_device
from pharmacist.nn.models import model_fingerprint
from pharmacist.pipeline.choosing import number_of
from pharmacist.pipeline.rows import numbered, open_references, read, texts, usual_names
from pharmacist.pipeline.stages.curate import REFERENCES, SPREAD, CurateOptions
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.base import FEWEST_REFERENCES, SelectionContext, Selector
from pharmacist.selectors.embeddings import check_room, check_sentence_encoder
from pharmacist.selectors.labels import labels_fingerprint, read_labels


class CurateInputs:
    """What the options name: pool, references, labels and selector.

    Attributes:
        selector: Ranks the pool.
        sources: Rows by input: ``pool``; the references of a kind are ``safe``, ``safe 2`` and so on.
        records: The rows of each input, once `read` has read them.
        left_out: Number of references left out, by input, since the pool has their prompts too.
        groups: Each row's value of the column to balance by; None without such a column.
    """

    def __init__(self, options: CurateOptions) -> None:
        self.options = options
        self.sources = {"pool": open_source(options.pool, name="--pool"), **open_references(options)}
        self.selector: Selector = SELECTORS.build_from(options.selector)
        self.records: dict[str, Records] = {}
        self.left_out: dict[str, int] = {}
        self.groups: npt.NDArray[np.str_] | None = None

    def fingerprints(self) -> dict[str, str]:
        """Input -> fingerprint of its content."""
        hashes: dict[str, Callable[[Any], str]] = {
            "model": model_fingerprint,
            "embedder": lambda name: sha256_content(name) if Path(name).is_dir() else f"hub:{name}",
            "labels": labels_fingerprint,
            "resume_selector": sha256_content,
        }
        named = {name: getattr(self.options, name) for name in hashes if getattr(self.options, name) is not None}
        found = {name: source.fingerprint() for name, source in self.sources.items()}
        return found | {name: hashes[name](what) for name, what in named.items()}

    def read(self, work: Path) -> None:
        """Reads and checks pool and references, with all options that depend on them; a second call does nothing."""
        if self.records:
            return
        options, selector, folder = self.options, self.selector, Path(self.options.output_dir)
        resolve_device(options.device)
        _check_models(selector, options)
        self._read_rows(work)
        n = len(self.records["pool"])
        if options.resume_selector is None:
            for need in sorted(selector.needs & set(REFERENCES)):
                if need not in self.records:
                    raise ConfigError(
                        f"selector '{options.selector['name']}' needs {need} references; give --{need} FILE"
                    )
                left = sum(len(found) for name, found in self.records.items() if name.split()[0] == need)
                if left < FEWEST_REFERENCES:
                    raise DataError(f"--{need}: {left} rows are left, at least {FEWEST_REFERENCES} are needed")
            selector.notice(self.records.keys())
        selector.check_room(n, folder)
        if options.diversity in SPREAD:
            check_room(n, folder)
        if options.balance is not None:
            self.groups = _groups(self.records["pool"], options.balance)
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Checks that the pool has the rows to select, and room for every value of the column to balance by."""
        options, n = self.options, len(self.records["pool"])
        if options.top_k is not None and options.top_k > n:
            raise ConfigError(f"--top-k {options.top_k}: the pool has {n} rows to rank; give at most that number")
        if self.groups is not None:
            k, values = number_of(options, n), len(set(self.groups.tolist()))
            if values > k:
                many = f"{k} rows cannot hold one of each of {values} values"
                remedy = "select more rows, or balance by a coarser column"
                raise ConfigError(f"--balance {options.balance}: {many}; {remedy}")

    def _read_rows(self, work: Path) -> None:
        """Reads all rows; references whose prompt occurs in the pool are left out, and counted."""
        conditions = conditions_of(self.options.where, self.sources)
        by_usual_names = usual_names(self.sources.values(), self.options)

        def rows_of(name: str, role: str) -> Records:
            return read(
                self.sources[name],
                self.options,
                work / role,
                harmful=role.split()[0] == "harmful",
                usual_names=by_usual_names,
                where=conditions[name],
                keep=name == "pool",
            )

        records = {name: rows_of(name, name) for name in self.sources}
        if "harmful" not in records:
            pairs = [name for name in records if name.split()[0] == "safe" and records[name].layout == "preference"]
            records |= {role: rows_of(name, role) for role, name in numbered("harmful", pairs).items()}
        for one, other in combinations([kind for kind in REFERENCES if kind in records], 2):
            if texts(records[one]) == texts(records[other]):
                raise DataError(
                    f"--{one} and --{other} hold the same rows, so they cannot be distinguished; check the two files"
                )
        for name in [name for name in records if name != "pool"]:
            shared = shared_prompts(records["pool"].dataset, records[name].dataset)
            if len(shared) == len(records[name]):
                raise DataError(
                    f"--{name}: every prompt also occurs in --pool; give references that are not to be ranked"
                )
            if len(shared):
                records[name] = records[name].without(shared)
            self.left_out[name] = len(shared)
        self.records = records

    def labels(self) -> dict[int, str]:
        """Position in the pool -> reason that a person gave the row."""
        if self.options.labels is None:
            return {}
        pool = self.records["pool"]
        return read_labels(self.options.labels, pool.source.fingerprint(), pool.row_numbers)

    def references(self) -> tuple[dict[str, Records], dict[str, npt.NDArray[np.int64]]]:
        """The references of each kind, and the number of each row's file."""
        found, files = dict[str, Records](), dict[str, npt.NDArray[np.int64]]()
        for kind in REFERENCES:
            parts = [part for name, part in self.records.items() if name.split()[0] == kind]
            if parts:
                rows = [part.dataset for part in parts]
                found[kind] = replace(parts[0], dataset=concatenate_datasets(rows) if len(rows) > 1 else rows[0])
                files[kind] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return found, files

    def render(self, context: SelectionContext) -> None:
        """Leaves out the rows of pool and references that the model's chat template refuses.

        Raises:
            PharmacistError: Too few rows are left, or none.
        """
        before, loaded = context.pool.row_numbers, context.model
        how = (loaded.tokenizer, loaded.template, self.options.on_bad_row)
        self.records = {name: rendered_rows(rows, *how) for name, rows in self.records.items()}
        context.pool, (context.references, context.sources) = self.records["pool"], self.references()
        if self.groups is not None:
            self.groups = self.groups[np.isin(before, context.pool.row_numbers)]
        self._check_numbers()


def _check_models(selector: Selector, options: CurateOptions) -> None:
    """Checks that the selector and the options have the models that they need."""
    name, spread = f"selector '{options.selector['name']}'", f"--diversity {options.diversity}"
    without_embedder = options.model is None and options.embedder is None
    if "model" in selector.needs and options.model is None:
        raise ConfigError(f"{name} reads the pool with a model; give --model")
    if "embedder" in selector.needs and without_embedder:
        raise ConfigError(f"{name} compares rows by a model; give --model, or --embedder")
    if options.diversity in SPREAD and (selector.keeps_all or selector.covers):
        does = "ranks nothing" if selector.keeps_all else "covers the pool by itself"
        raise ConfigError(f"{spread}: {name} {does}; leave one of the two out")
    if options.diversity in SPREAD and without_embedder:
        raise ConfigError(f"{spread} compares rows by a model; give --model, or --embedder")
    if options.resume_selector is not None:
        if type(selector).save is Selector.save:
            own = options.selector["name"]
            raise ConfigError(f"--resume-selector: '{own}' stores nothing that it learns; leave the option out")
        saved = Path(options.resume_selector)
        check_unchanged(saved, "selector")
        check_unchanged(saved.parent, saved.name)
        # Damaged files are refused also without a manifest that lists their hashes.
        folder = saved / "selector" if (saved / "selector").is_dir() else saved
        for path in sorted(folder.rglob("*.json")):
            read_json(path)
        for path in sorted(folder.rglob("*.safetensors")):
            if not is_whole_tensors(path):
                raise DataError(f"{path}: is damaged; restore it, or train the selector again")
        selector.check_saved(saved, options.model)
    if options.embedder is not None:
        check_sentence_encoder()


def _groups(pool: Records, column: str) -> npt.NDArray[np.str_]:
    """Each row's value of a column; of several values the rarest one in the pool, so that it keeps its rows."""
    columns, found = dict.fromkeys(pool.source.columns or ()), list[list[str]]()
    try:
        for row in pool.originals({column}) if column in columns or not columns else ():
            columns |= dict.fromkeys(row)
            value = row.get(column)
            plain = isinstance(value, bool | int | float)
            found.append([str(value)] if plain else category_names(row, (column,)))
    except (ValueError, OverflowError) as error:  # a date that Python cannot hold, say
        raise DataError(f"--balance {column}: the column cannot be read ({error}); balance by another one") from error
    if column not in columns:
        raise DataError(f"--balance {column}: the pool has no such column; it has {', '.join(columns)}")
    counts = Counter(name for names in found for name in names)
    if not counts:
        raise DataError(f"--balance {column}: the column holds neither texts, lists of texts nor numbers")
    return np.array([min(names, key=lambda name: (counts[name], name)) if names else "(none)" for names in found])
