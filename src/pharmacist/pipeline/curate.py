"""The stage `curate`: rank an alignment pool, write scores, core subset and page."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.console import plain
from pharmacist.core.errors import ConfigError, DataError, PharmacistError
from pharmacist.core.rundir import RunDir, RunOptions


if TYPE_CHECKING:
    import datasets
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from pharmacist.data.formats import Source
    from pharmacist.data.records import Records
    from pharmacist.selectors.base import Scores, SelectionContext, Selector

STAGE_VERSION = 4
REFERENCES = ("safe", "harmful", "utility")
Diversity = Literal["none", "near-duplicates", "k-center", "facility-location"]
SPREAD = frozenset({"k-center", "facility-location"})
"""Diversities that need to know how near rows are."""
_LATE = frozenset(
    {"min_score", "diversity", "diversity_margin", "balance", "balance_share", "format", "fill", "labels", "to_label"}
)


@dataclass(kw_only=True)
class CurateOptions(RunOptions):
    """Rank an alignment pool and write its core subset."""

    pool: str
    """Rows to rank: .jsonl, .json, .csv (each also .gz, .zst) or .parquet, a folder saved by datasets, or a hub id."""
    safe: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Safe references: harmful prompt, refusal. A preference file gives its chosen side. Several files count as
    several sources, of which one at a time is held out where every kind of references has several."""
    harmful: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Harmful references: harmful prompt, harmful answer. A preference file gives its rejected side."""
    utility: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Utility references: benign prompt, helpful answer. Guards against over-refusal."""
    labels: str | None = None
    """A person's labels of some rows of the pool (labels.json), from the page or `pharmacist label`: the selector
    learns from them, and no row labelled bad is selected. A finished ranking is made again in seconds."""
    to_label: int = 40
    """Rows to write to to_label.jsonl, those whose label would teach most; 0 writes none."""
    model: str | None = None
    """Model that reads the pool: local folder or hub id; it need not be the one that is aligned later."""
    selector: dict[str, Any] = method("pharmacist", "pharmacist.selectors:SELECTORS")
    """How rows are ranked; several, a+b, rank by the mean of their ranks."""
    resume_selector: str | None = None
    """Folder of an earlier curate whose trained selector scores this pool, without training."""
    top: float | None = None
    """Share of the ranked rows to select, in (0, 1]; 0.3 where neither this nor --top-k nor --min-score is given."""
    top_k: int | None = None
    """Number of rows to select."""
    min_score: float | None = None
    """Select the rows with at least this score."""
    fill: bool = False
    """Fill --top or --top-k with rows whose own reason speaks against them, where too few others are left."""
    diversity: Diversity = "none"
    """near-duplicates: never select a near-duplicate of a higher-ranked row; k-center, facility-location: select rows
    that cover the best-ranked ones, instead of the very best."""
    diversity_margin: float = 1.5
    """k-center and facility-location take their rows from that many times as many best-ranked ones."""
    balance: str | None = None
    """Column of the pool, such as category or source, of which no value may vanish from the core subset."""
    balance_share: float = 0.5
    """Each value of the column keeps at least this share, in (0, 1], of the rows that it would have in a proportional
    draw, and one; 1 is a stratified selection."""
    duplicate_threshold: float = 0.8
    """Jaccard similarity of word shingles from which two rows are near-duplicates."""
    columns: str | None = None
    """The pool's own column names, as prompt=question,completion=answer; references that have them too are read so."""
    where: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Only rows with these values, as --where label=true kind=advice: of each file that has the column, or of one, as
    harmful:is_safe=false."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """skip: write unreadable rows to refused.jsonl and go on."""
    format: Literal["jsonl", "input"] = "jsonl"
    """Format of the selected rows: JSON lines, or the input's own (JSON lines where that is no file)."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt template; auto is the model's own where it has one, else Alpaca."""
    max_length: int = 0
    """Longest row in tokens; 0 means the model's own limit."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    embedder: str | None = None
    """Folder or hub id of a sentence-transformers model that says how near rows are to each other, where a selector or
    --diversity asks; without it the hidden states of --model do. Needs the extra embeddings."""

    NO_PLACES: ClassVar[frozenset[str]] = RunOptions.NO_PLACES | {"columns", "balance"}

    def __post_init__(self) -> None:
        for name in REFERENCES:  # one file may be given as a text, as in a grid or from Python
            if not isinstance(value := getattr(self, name), list):
                setattr(self, name, [] if value is None else [value])
        if self.to_label < 0:
            raise ConfigError(f"--to-label {self.to_label}: must not be negative")
        given = [name for name in ("top", "top_k", "min_score") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
        if self.top is not None and not 0 < self.top <= 1:
            raise ConfigError(f"--top {self.top}: must be a share of the pool in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k}: must be at least 1")
        if not 0 < self.duplicate_threshold <= 1:
            raise ConfigError(f"--duplicate-threshold {self.duplicate_threshold}: must lie in (0, 1]")
        if self.diversity_margin < 1:
            raise ConfigError(f"--diversity-margin {self.diversity_margin}: must be at least 1")
        if not 0 < self.balance_share <= 1:
            raise ConfigError(f"--balance-share {self.balance_share}: must lie in (0, 1]")
        if self.min_score is not None and (self.balance is not None or self.diversity in SPREAD):
            option = "--balance" if self.balance is not None else f"--diversity {self.diversity}"
            raise ConfigError(
                f"--min-score takes every row that has it, so {option} has no say; give --top or --top-k"
            )
        if self.max_length < 0:
            raise ConfigError(f"--max-length {self.max_length}: must not be negative")

    @property
    def column_map(self) -> dict[str, str] | None:
        """`columns` as a mapping."""
        from pharmacist.data.records import parse_columns

        return parse_columns(self.columns)


@dataclass
class Ranking:
    """A ranked pool.

    Attributes:
        records: The rows, with their source.
        table: The content of ``scores.parquet``: row, score, rank, selected, reason and the selector's signals.
        about: What the selector says about itself, such as its quality on held-out references.
        to_label: Positions of the rows whose label would teach most.
        manifest: Manifest of the run, as JSON.
    """

    records: "Records"
    table: "pd.DataFrame"
    about: dict[str, Any]
    to_label: "npt.NDArray[np.int64]"
    manifest: dict[str, Any] = field(default_factory=dict)
    _keep_alive: Any = None
    _points: "tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]] | None" = None

    def select(
        self,
        fraction: float | None = None,
        *,
        k: int | None = None,
        min_score: float | None = None,
        diversity: Diversity = "none",
        diversity_margin: float = 1.5,
        balance_share: float = 0.0,
        fill: bool = False,
    ) -> "datasets.Dataset":
        """The core subset with all input columns, in input order.

        Args:
            fraction: Share of the ranked rows, in (0, 1].
            k: Or their number.
            min_score: Or the least score.
            diversity: ``near-duplicates`` leaves out near-duplicates of higher-ranked rows; ``k-center`` and
                ``facility-location`` need a ranking that was made with one of the two.
            diversity_margin: They take their rows from that many times as many best-ranked ones.
            balance_share: Least share of every group, in a ranking that was made with ``balance``; 0 sets none.
            fill: Whether rows whose own reason speaks against them may be taken, to reach the share or number.
        """
        chosen = choose(
            self.table,
            fraction,
            k,
            min_score,
            diversity,
            margin=diversity_margin,
            share=balance_share,
            points=self._points,
            fill=fill,
        )
        rows = self.table["row"].to_numpy()[chosen]
        return self.records.source.dataset(rows)

    def to_parquet(self, path: str | Path) -> None:
        """Writes ``scores.parquet``."""
        from pharmacist.core.files import atomic_path

        with atomic_path(path) as temporary:
            self.table.to_parquet(temporary, index=False)

    def report(self, path: str | Path, labels: list[str] | None = None) -> None:
        """Writes the page.

        Args:
            path: The HTML file.
            labels: Known label per ranked row, where there is one (planted pools).
        """
        from pharmacist.pipeline.report import labelling, pool_categories
        from pharmacist.report.html import render_ranking

        columns = self.records.dataset.select_columns(["prompt", "completion"])
        render_ranking(
            Path(path),
            scores=self.table,
            texts=columns,
            manifest=self.manifest,
            labels=labels,
            categories=pool_categories(self.records),
            labelling=labelling(self.records.source.fingerprint(), self.asked(), self.table),
        )

    def asked(self) -> list[dict[str, Any]]:
        """The rows whose label would teach most: ``row``, ``prompt``, ``completion`` and ``reason`` of each."""
        columns = self.records.dataset.select_columns(["row", "prompt", "completion"])
        reasons = self.table["reason"].to_numpy()
        return [dict(columns[int(at)]) | {"reason": str(reasons[at])} for at in self.to_label]


def curate(options: CurateOptions) -> Ranking | None:
    """Ranks a pool and writes everything that the contract names into the output folder.

    Returns:
        The ranking; None where the folder holds this very run, complete, or on other processes than the first.

    Raises:
        PharmacistError: Bad options or input.
    """
    import json

    from pharmacist.core.files import remove, write_text
    from pharmacist.core.progress import console
    from pharmacist.data.formats import open_source, write_rows
    from pharmacist.nn.distributed import barrier, from_main

    sources = {"pool": open_source(options.pool, name="--pool")}
    for name in REFERENCES:
        for number, file in enumerate(getattr(options, name), start=1):
            sources[_source_name(name, number)] = open_source(file, name=f"--{name}")
    selector, options = _selector(options)
    if not _keeps_format(sources["pool"], options):
        sources["pool"].check_json_lines()  # not when all is ranked
    early = scratch = None
    if (
        options.overwrite or options.labels is not None
    ):  # the folder is touched only when the input is known to be good
        scratch = tempfile.TemporaryDirectory(prefix="pharmacist-")
        early = _input(sources, selector, options, Path(scratch.name))
        _labels(early[0]["pool"], options)
    run = RunDir.open(
        options,
        stage="curate",
        version=STAGE_VERSION,
        inputs=_fingerprints(sources, options),
        late=_LATE,
        late_inputs=frozenset({"labels"}),
        reopen=options.labels is not None,
    )
    try:
        if from_main(run.complete):
            console().print(f"{run.root}: complete already; --overwrite ranks again", soft_wrap=True)
            return None
        ranking = _rank(sources, selector, options, run, early)
        ranking._keep_alive = scratch
        barrier()  # the first process removes the partial state that the others still read
        if not _is_main():
            return None
        selected = ranking.table["row"].to_numpy()[ranking.table["selected"].to_numpy()]
        source = ranking.records.source
        own = _keeps_format(source, options)
        name = f"selected.{source.format if own else 'jsonl'}"
        write_rows(source, selected.tolist(), run.path(name), format=source.format if own else "jsonl")
        ranking.to_parquet(run.path("scores.parquet"))
        outputs = ["scores.parquet", name, "report.html"]
        if len(ranking.to_label):
            write_text(run.path("to_label.jsonl"), "".join(json.dumps(row) + "\n" for row in ranking.asked()))
            outputs.append("to_label.jsonl")
        if ranking.records.refused:
            _write_refused(run.path("refused.jsonl"), ranking.records)
            outputs.append("refused.jsonl")
        remove(run.path("selector"))  # a link there would lead elsewhere; what it kept was read into work/
        if selector.save(run.path("selector")):
            outputs.append("selector")
        ranking.manifest = run.manifest.model_dump(mode="json")
        ranking.report(run.path("report.html"))
        run.finish(outputs=outputs)
        ranking.manifest = run.manifest.model_dump(mode="json")
        _summarise(ranking, run, name)
        return ranking
    except PharmacistError:
        if not any(run.root.glob("work/**/*.safetensors")):  # nothing was trained or measured yet
            run.discard()
        raise
    finally:
        run.close()


def rank(
    pool: Any,
    *,
    safe: Any = None,
    harmful: Any = None,
    utility: Any = None,
    model: str | None = None,
    selector: str | Mapping[str, Any] = "pharmacist",
    columns: Mapping[str, str] | None = None,
    output_dir: str | None = None,
    **options: Any,
) -> Ranking:
    """Ranks a pool in one call; nothing is written unless asked for.

    Args:
        pool: Rows to rank: a path, a hub id, a ``datasets.Dataset`` or a list of dicts.
        safe: Safe references, likewise.
        harmful: Harmful references, likewise.
        utility: Utility references, likewise.
        model: Folder or hub id of the model that reads the pool.
        selector: Name, or ``{"name": ..., **options}``.
        columns: Other column names, ``{"prompt": "question"}``.
        output_dir: Where partial state lies, so that an interrupted ranking resumes; a temporary folder by default.
        **options: Further fields of `CurateOptions`, such as ``seed`` or ``device``.

    Returns:
        The ranking; `Ranking.select` gives the core subset.
    """
    from pharmacist.data.formats import open_source

    sources = {"pool": open_source(pool, name="pool")}
    for name, given in {"safe": safe, "harmful": harmful, "utility": utility}.items():
        # A list of rows is one source, a list of files or datasets as many.
        several = isinstance(given, list | tuple) and not all(isinstance(item, Mapping) for item in given)
        for number, value in enumerate(given if several else [] if given is None else [given], start=1):
            sources[_source_name(name, number)] = open_source(value, name=name)
    choice = {"name": selector} if isinstance(selector, str) else dict(selector)
    keep_alive = None if output_dir else tempfile.TemporaryDirectory(prefix="pharmacist-")
    named: dict[str, Any] = {"pool": sources["pool"].label}
    for name in REFERENCES:
        named[name] = [source.label for key, source in sources.items() if key.split()[0] == name]
    settings = CurateOptions(
        output_dir=output_dir or keep_alive.name,  # type: ignore[union-attr]
        model=model,
        selector=choice,
        columns=",".join(f"{k}={v}" for k, v in columns.items()) if columns else None,
        **named,
        **options,
    )
    chosen, settings = _selector(settings)
    run = RunDir.open(
        settings, stage="rank", version=STAGE_VERSION, inputs=_fingerprints(sources, settings), late=_LATE
    )
    try:
        ranking = _rank(sources, chosen, settings, run)
    except PharmacistError:
        if not any(run.root.glob("work/**/*.safetensors")):
            run.discard()
        raise
    finally:
        run.close()
    ranking.manifest = run.manifest.model_dump(mode="json")
    ranking._keep_alive = keep_alive  # the rows are memory-mapped from there
    return ranking


def _source_name(kind: str, number: int) -> str:
    """The name of the n-th file of a kind of references; the first has that of the kind."""
    return kind if number == 1 else f"{kind} {number}"


def _labels(pool: "Records", options: CurateOptions) -> dict[int, str]:
    """Position in the pool -> reason that a person gave the row."""
    from pharmacist.selectors.labels import read_labels

    if options.labels is None:
        return {}
    return read_labels(options.labels, pool.source.fingerprint(), pool.row_numbers)


def _selector(options: CurateOptions) -> "tuple[Selector, CurateOptions]":
    """The selector, and the options with all of its own, those left at their defaults too: they identify the run."""
    from pharmacist.selectors import SELECTORS

    selector = SELECTORS.build_from(options.selector)
    return selector, replace(options, selector={"name": options.selector["name"], **asdict(selector.config)})


def _keeps_format(pool: "Source", options: CurateOptions) -> bool:
    """Whether the selected rows are written in the pool's own format, and not as JSON lines."""
    return options.format == "input" and pool.format in {"json", "csv", "parquet"}


def _is_main() -> bool:
    from pharmacist.core.env import rank as process

    return process() == 0


def _fingerprints(sources: "Mapping[str, Source]", options: CurateOptions) -> dict[str, str]:
    from pharmacist.core.hashing import sha256_content, sha256_file
    from pharmacist.nn.models import model_fingerprint

    found = {name: source.fingerprint() for name, source in sources.items()}
    if options.model is not None:
        found["model"] = model_fingerprint(options.model)
    if options.embedder is not None:
        local = Path(options.embedder).is_dir()
        found["embedder"] = sha256_content(options.embedder) if local else f"hub:{options.embedder}"
    if options.labels is not None:
        found["labels"] = sha256_file(options.labels)
    if options.resume_selector is not None:
        found["resume_selector"] = sha256_content(options.resume_selector)
    return found


def _rank(
    sources: "Mapping[str, Source]",
    selector: "Selector",
    options: CurateOptions,
    run: RunDir,
    early: "tuple[dict[str, Records], dict[str, int], npt.NDArray[np.str_] | None] | None" = None,
) -> Ranking:
    """Ranks the pool; `early` is the input where it was read before the run began."""
    import numpy as np

    from pharmacist.core.progress import console, warn
    from pharmacist.data.duplicates import find_duplicates
    from pharmacist.nn.distributed import barrier
    from pharmacist.selectors.base import SelectionContext
    from pharmacist.selectors.labels import rows_to_label

    barrier()
    with run.phase("read"):
        records, left_out, groups = early or _input(sources, selector, options, run.work("data"))
        records, of_source = _joined(records)
    for read in records.values():
        read.announce()
    pool = records.pop("pool")
    for name, number in left_out.items():
        run.record(counts={f"references_{name.replace(' ', '_')}_left_out": number})
        if number:
            said = f"{number} rows share a prompt with --pool and are left out"
            console().print(f"--{name}: {said}", soft_wrap=True)
    notice = selector.notice(records.keys()) if options.resume_selector is None else None
    if notice is not None:
        console().print(f"selector '{options.selector['name']}': {notice}", soft_wrap=True, markup=False)
    context = SelectionContext(
        run=run,
        pool=pool,
        references=records,
        model_name=options.model,
        seed=options.seed,
        fraction=_fraction(options, len(pool)),
        device=options.device,
        dtype=options.dtype,
        template=options.template,
        max_length=options.max_length,
        resume_from=Path(options.resume_selector) if options.resume_selector else None,
        trust_remote_code=options.trust_remote_code,
        checkpoint_seconds=options.checkpoint_seconds,
        embedder=options.embedder,
        sources=of_source,
    )
    if selector.needs & {"model", "embedder"} or options.diversity in SPREAD:
        pool, groups = _rendered(context, groups, options)
    with run.phase("find duplicates"):
        clusters = find_duplicates(
            pool.dataset, threshold=options.duplicate_threshold, work_dir=run.work("duplicates")
        )
    context.labels = _labels(pool, options)
    points = None
    if options.diversity in SPREAD:  # before the ranking, which may put adapters on the model
        from pharmacist.selectors.embeddings import pool_keys

        points = context.points, pool_keys(context)
    scores = selector.rank(context)
    if not np.isfinite(scores.score).all():
        bad = int(pool.dataset[int(np.flatnonzero(~np.isfinite(scores.score))[0])]["row"])
        raise DataError(f"row {bad} got a score that is not finite; try --dtype float32")
    table = _table(pool, scores, clusters, options, groups, points, context.labels)
    if options.labels is not None:
        scores.report |= {"changed": _changed(table, options)}
    warnings = [*scores.warnings, *_shortfall(table, options)]
    for warning in warnings:
        warn(warning)
    extra: dict[str, Any] = {"selector_report": scores.report}
    if groups is not None:
        extra["balance"] = _balance(table, options)
    counts = {
        **pool.counts,
        "ranked": len(pool),
        "selected": int(table["selected"].sum()),
        "near_duplicates": int((table["duplicate_of"] >= 0).sum()),
        **{f"references_{name}": len(value) for name, value in records.items()},
    }
    if "pool" in context.encoded:
        encoded = context.encoded["pool"]
        counts |= {
            "truncated": encoded.truncated,
            "lost_eos": encoded.lost_eos,
            "cut_prompts": len(encoded.cut_prompts),
        }
    device = "cpu"
    if "model" in context.__dict__:
        loaded = context.model
        device = str(loaded.device)
        extra |= {"template": loaded.template.to_json(), "template_origin": loaded.template_origin}
    run.record(counts=counts, device=device, extra=extra, warnings=warnings)
    to_label = np.zeros(0, np.int64)
    if scores.telling is not None:
        keys = pool.dataset["prompt_key"]
        to_label = rows_to_label(scores.telling, table["reason"].tolist(), keys, clusters, options.to_label)
    return Ranking(records=pool, table=table, about=scores.report, to_label=to_label, _points=points)


def _joined(records: "dict[str, Records]") -> "tuple[dict[str, Records], dict[str, npt.NDArray[np.int64]]]":
    """References of one kind as one, and for each kind that came in several files the number of each row's file."""
    import datasets
    import numpy as np

    found: dict[str, Records] = {}
    of_source: dict[str, npt.NDArray[np.int64]] = {}
    for kind in ("pool", *REFERENCES):
        parts = [part for name, part in records.items() if name.split()[0] == kind and len(part)]
        if not parts:
            continue
        found[kind] = parts[0]
        if kind != "pool":
            of_source[kind] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        if len(parts) > 1:
            for part in parts[1:]:
                part.announce()
            found[kind] = replace(parts[0], dataset=datasets.concatenate_datasets([part.dataset for part in parts]))
    return found, of_source


def _changed(table: "pd.DataFrame", options: CurateOptions) -> dict[str, int]:
    """How many rows the labels brought into the selection and out of it, against the ranking before them."""
    import pandas as pd

    for folder in (options.output_dir, options.resume_selector):
        path = None if folder is None else Path(folder) / "scores.parquet"
        if path is not None and path.is_file():
            before = pd.read_parquet(path, columns=["row", "selected"])
            old, new = (set(found.loc[found["selected"], "row"].tolist()) for found in (before, table))
            return {"entered": len(new - old), "left": len(old - new)}
    return {}


def _shortfall(table: "pd.DataFrame", options: CurateOptions) -> list[str]:
    """What is to be said where the cut could not be filled, or was filled with rows that should not be in it."""
    from pharmacist.selectors.base import GOOD_REASONS

    if options.min_score is not None:
        return []
    k, selected = options.top_k or _rows_of(_fraction(options, len(table)), len(table)), int(table["selected"].sum())
    chosen = table["reason"][table["selected"]]
    bad = chosen[~chosen.isin(GOOD_REASONS)].value_counts()
    named = ", ".join(f"{n} {reason}" for reason, n in bad.items())
    if len(bad):
        return [f"{int(bad.sum())} of the {selected} selected rows are so only to fill the quota: {named}"]
    if selected < k and not options.fill and options.diversity != "near-duplicates":
        few = f"{selected} rows are selected, not {k}: no others look worth keeping"
        return [f"{few}; --fill takes the next best all the same"]
    return []


def _input(
    sources: "Mapping[str, Source]", selector: "Selector", options: CurateOptions, work: Path
) -> "tuple[dict[str, Records], dict[str, int], npt.NDArray[np.str_] | None]":
    """Pool and references, how many references were left out, and each row's group.

    All that can be wrong with them and with the options is told here, before the work starts.
    """
    from pharmacist.nn.models import resolve_device
    from pharmacist.selectors.base import FEWEST_REFERENCES

    resolve_device(options.device)
    _check_models(selector, options)
    records, left_out = _read(sources, options, work)
    n = len(records["pool"])
    for need in sorted(selector.needs & set(REFERENCES)) if options.resume_selector is None else ():
        if need not in records:
            raise ConfigError(f"selector '{options.selector['name']}' needs {need} references; give --{need} FILE")
        if len(records[need]) < FEWEST_REFERENCES:
            number = f"{len(records[need])} rows are left, at least {FEWEST_REFERENCES} are needed"
            raise DataError(f"--{need}: {number}")
    if options.resume_selector is None:
        selector.notice(records.keys())
    if options.top_k is not None and options.top_k > n:
        raise ConfigError(f"--top-k {options.top_k}: the pool has {n} rows to rank; give at most that number")
    selector.check_room(n, Path(options.output_dir))
    if options.diversity in SPREAD:
        from pharmacist.selectors.embeddings import check_room

        check_room(n, Path(options.output_dir))
    groups = None if options.balance is None else _groups(records["pool"], options.balance)
    if groups is not None:
        k, values = options.top_k or _rows_of(_fraction(options, n), n), len(set(groups.tolist()))
        if values > k:
            remedy = "select more rows, or balance by a coarser column"
            raise ConfigError(
                f"--balance {options.balance}: {k} rows cannot hold one of each of {values} values; {remedy}"
            )
    return records, left_out, groups


def _rendered(
    context: "SelectionContext", groups: "npt.NDArray[np.str_] | None", options: CurateOptions
) -> "tuple[Records, npt.NDArray[np.str_] | None]":
    """Leaves out what the model's chat template refuses, and gives the pool and its groups that remain."""
    import numpy as np

    from pharmacist.data.tokenize import rendered_rows

    if options.model is None:
        return context.pool, groups
    before, loaded = context.pool.row_numbers, context.model
    how = (loaded.tokenizer, loaded.template, options.on_bad_row)
    context.pool = rendered_rows(context.pool, *how)
    context.references = {name: rendered_rows(rows, *how) for name, rows in context.references.items()}
    if any(len(numbers) != len(context.references[kind]) for kind, numbers in context.sources.items()):
        context.sources = {}  # what was left out is not told by source; folds are made by prompt
    kept = np.isin(before, context.pool.row_numbers)
    return context.pool, None if groups is None else groups[kept]


def _check_models(selector: "Selector", options: CurateOptions) -> None:
    """Says which model is missing before anything is read."""
    from pharmacist.core.manifest import check_unchanged

    if "model" in selector.needs and options.model is None:
        raise ConfigError(f"selector '{options.selector['name']}' reads the pool with a model; give --model")
    if "embedder" in selector.needs and options.model is None and options.embedder is None:
        asks = f"selector '{options.selector['name']}' compares rows by a model"
        raise ConfigError(f"{asks}; give --model, or --embedder")
    if options.diversity in SPREAD and options.selector["name"] in {"full", *SPREAD}:
        name = options.selector["name"]
        does = "ranks nothing" if name == "full" else "covers the pool by itself"
        raise ConfigError(f"--diversity {options.diversity}: selector '{name}' {does}; leave one of the two out")
    if options.diversity in SPREAD and options.model is None and options.embedder is None:
        raise ConfigError(f"--diversity {options.diversity} compares rows by a model; give --model, or --embedder")
    if options.resume_selector is not None and not _learns(selector):
        name = options.selector["name"]
        raise ConfigError(f"--resume-selector: '{name}' keeps nothing that it learns; leave the option out")
    if options.resume_selector is not None:
        saved = Path(options.resume_selector)
        check_unchanged(saved, "selector")
        check_unchanged(saved.parent, saved.name)
        _check_saved_files(saved / "selector" if (saved / "selector").is_dir() else saved)
        selector.check_saved(saved, options.model)
    if options.embedder is not None:
        from pharmacist.selectors.embeddings import check_sentence_encoder

        check_sentence_encoder()


def _check_saved_files(folder: Path) -> None:
    """Refuses a saved selector with a damaged file, also where no manifest lies beside it that tells."""
    from pharmacist.core.files import is_whole_tensors, read_json

    for path in sorted(folder.rglob("*.json")):
        read_json(path)
    for path in sorted(folder.rglob("*.safetensors")):
        if not is_whole_tensors(path):
            raise DataError(f"{path}: is damaged; put it back as it was, or train the selector again")


def _learns(selector: "Selector") -> bool:
    """Whether a selector saves what it learns, so that a later run can go on from it."""
    from pharmacist.selectors.base import Selector

    return type(selector).save is not Selector.save


def _groups(pool: "Records", column: str) -> "npt.NDArray[np.str_]":
    """Each row's value of a column; of several the one that is rarest in the pool, so that it keeps its rows."""
    from collections import Counter

    import numpy as np

    from pharmacist.evaluation.prompts import category_names

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


def _balance(table: "pd.DataFrame", options: CurateOptions) -> dict[str, dict[str, int]]:
    """Per group how many rows there are, are selected, and would be by rank alone; says where that matters."""
    from pharmacist.core.progress import console

    best = table.nsmallest(int(table["selected"].sum()), "rank")["group"].value_counts()
    counts = {
        str(group): {"rows": len(rows), "selected": int(rows["selected"].sum()), "by_rank": int(best.get(group, 0))}
        for group, rows in table.groupby("group", observed=True)
    }
    for group, n in counts.items():
        message = None
        if n["selected"] == 0:
            message = f"none of its {n['rows']} rows is selected, since none is judged worth keeping"
        elif n["selected"] > n["by_rank"]:
            message = f"{n['selected']} of {n['rows']} rows are selected; by rank alone it would be {n['by_rank']}"
        if message is not None:
            console().print(f"--balance {options.balance}: {plain(group)}: {message}", soft_wrap=True, markup=False)
    return counts


def _read(
    sources: "Mapping[str, Source]", options: CurateOptions, work: Path
) -> "tuple[dict[str, Records], dict[str, int]]":
    """Reads pool and references; references whose prompt occurs in the pool are left out, and counted."""
    from pharmacist.core.env import rank as process
    from pharmacist.data.records import read_records
    from pharmacist.data.splits import shared_prompts
    from pharmacist.data.where import conditions_for, conditions_of

    first = {name: source for name, source in sources.items() if " " not in name}
    conditions = conditions_of(options.where, first)
    conditions |= {
        name: conditions_for(options.where, name.split()[0], source) for name, source in sources.items() if " " in name
    }

    def read(name: str, role: str) -> "Records":
        source, columns = sources[name], options.column_map
        if name != "pool" and columns is not None:
            first = next(source.scan(), None)
            if first is None or not set(columns.values()) <= set(first.value or ()):
                columns = None
        return read_records(
            source,
            work_dir=work / f"{role}-{process()}",
            columns=columns,
            side="rejected" if role.split()[0] == "harmful" else "chosen",
            on_bad_row=options.on_bad_row,
            where=conditions[name],
            keep=name == "pool",
        )

    records = {name: read(name, name) for name in sources}
    if "harmful" not in records and "safe" in records and records["safe"].layout == "preference":
        records["harmful"] = read("safe", "harmful")
    if {"safe", "harmful"} <= set(records) and _rows(records["safe"]) == _rows(records["harmful"]):
        raise DataError("--safe and --harmful hold the same rows, so nothing tells them apart; check the two files")
    left_out = {}
    for name in records:
        if name == "pool":
            continue
        shared = shared_prompts(records["pool"].dataset, records[name].dataset)
        if len(shared) == len(records[name]):
            raise DataError(f"--{name}: every prompt also occurs in --pool; give references that are not to be ranked")
        if len(shared):
            records[name] = records[name].without(shared)
        left_out[name] = len(shared)
    return records, left_out


def _rows(records: "Records") -> set[tuple[str, str]]:
    return set(zip(records.dataset["prompt"], records.dataset["completion"], strict=True))


def _fraction(options: CurateOptions, n: int) -> float:
    if options.top_k is not None:
        return min(1.0, options.top_k / n)
    return options.top if options.top is not None else 0.3


def _rows_of(fraction: float, n: int) -> int:
    return max(1, int(fraction * n + 0.5))


def _table(
    pool: "Records",
    scores: "Scores",
    clusters: "npt.NDArray[np.int64]",
    options: CurateOptions,
    groups: "npt.NDArray[np.str_] | None",
    points: "tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]] | None",
    labels: "Mapping[int, str]",
) -> "pd.DataFrame":
    import numpy as np
    import pandas as pd

    from pharmacist.selectors.base import CRITICAL, scaled_to_mean_1

    rows = np.asarray(pool.dataset["row"], dtype=np.int64)
    order = np.lexsort((rows, -scores.score))
    position = np.empty(len(rows), dtype=np.int64)
    position[order] = np.arange(1, len(rows) + 1)
    # The best-ranked row of each cluster; the others of it are its duplicates.
    best = np.zeros(len(rows), dtype=np.int64)
    best[clusters[order[::-1]]] = order[::-1]
    leader = best[clusters]
    duplicate = leader != np.arange(len(rows))
    reason = np.where(duplicate & (scores.reason == CRITICAL), "duplicate", scores.reason)
    table = pd.DataFrame(
        {
            "row": rows,
            "score": scores.score.astype(np.float64),
            "rank": position,
            "selected": False,
            "reason": reason.astype(object),
            "duplicate_of": np.where(duplicate, rows[leader], -1),
            **scores.signals,
        }
    )
    if labels:  # whatever the selector makes of them, they hold, for copies of a labelled row too
        texts = list(zip(pool.dataset["prompt"], pool.dataset["completion"], strict=True))
        told = {texts[position]: reason for position, reason in labels.items()}
        table["label"] = [told.get(text, "") for text in texts]
    if groups is not None:
        table["group"] = groups.astype(object)
    top = _fraction(options, len(rows)) if options.top_k is None and options.min_score is None else None
    chosen = choose(
        table,
        top,
        options.top_k,
        options.min_score,
        options.diversity,
        margin=options.diversity_margin,
        share=options.balance_share if groups is not None else 0.0,
        points=points,
        fill=options.fill,
    )
    table.loc[chosen, "selected"] = True
    if scores.weight is not None:
        table["weight"] = scaled_to_mean_1(scores.weight, table["selected"].to_numpy())
    return table


def choose(
    table: "pd.DataFrame",
    fraction: float | None,
    k: int | None,
    min_score: float | None,
    diversity: str,
    *,
    margin: float = 1.5,
    share: float = 0.0,
    points: "tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]] | None" = None,
    fill: bool = False,
) -> "npt.NDArray[np.int64]":
    """Positions in `table` of the rows to select, ascending.

    A share or number is not filled up with rows whose own reason speaks against them, unless `fill` says so; a row
    that a person labelled bad is never selected.
    """
    import numpy as np
    import pandas as pd

    from pharmacist.selectors.base import CRITICAL, GOOD_REASONS, RANKED
    from pharmacist.selectors.subset import Spread, core_rows

    if share and "group" not in table:
        raise ConfigError("balance_share: the pool was ranked without --balance, so there are no groups")
    if diversity in SPREAD and points is None:
        raise ConfigError(f"diversity {diversity}: rank the pool with it first, which says how near rows are")
    if sum(value is not None for value in (fraction, k, min_score)) != 1:
        raise ConfigError("give exactly one of fraction, k and min_score")
    candidates = table[table["duplicate_of"] < 0] if diversity == "near-duplicates" else table
    if "label" in table:
        candidates = candidates[candidates["label"].isin(("", CRITICAL))]
    if min_score is not None:
        chosen = candidates.index[candidates["score"] >= min_score]
        if not len(chosen):
            best = table["score"].max()
            raise ConfigError(f"min score {min_score:g}: no row has it, the best has {best:.4g}; ask for less")
    else:
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise ConfigError(f"fraction {fraction}: must lie in (0, 1]")
            k = _rows_of(fraction, len(table))
        if k is None or k < 1:
            raise ConfigError(f"k {k}: must be at least 1")
        if k > len(table):
            raise ConfigError(f"k {k}: only {len(table)} rows were ranked")
        if not fill:
            candidates = candidates[candidates["reason"].isin(GOOD_REASONS)]
        order = candidates.sort_values("rank").index.to_numpy()
        groups = pd.factorize(table["group"], sort=True)[0] if share else np.zeros(len(table), dtype=np.int64)
        good = table["reason"].isin((CRITICAL, RANKED)).to_numpy()
        spread = Spread(diversity, margin, *points) if diversity in SPREAD and points is not None else None
        if not len(order):
            return np.zeros(0, dtype=np.int64)
        chosen = pd.Index(core_rows(order, min(k, len(order)), good, groups, share, spread))
    return np.sort(chosen.to_numpy())


def _write_refused(path: Path, records: "Records") -> None:
    import json

    from pharmacist.core.files import write_text

    write_text(path, "".join(json.dumps(asdict(refused), ensure_ascii=True) + "\n" for refused in records.refused))


def _summarise(ranking: Ranking, run: RunDir, selected: str) -> None:
    from rich.table import Table

    from pharmacist.core.progress import console

    counts = ranking.table.groupby(["reason", "selected"], observed=True).size().unstack(fill_value=0)
    table = Table(title=f"{len(ranking.table)} rows ranked, {int(ranking.table['selected'].sum())} selected")
    for column in ("reason", "selected", "left out"):
        table.add_column(column, justify="left" if column == "reason" else "right")
    for reason, row in counts.iterrows():
        table.add_row(str(reason), str(int(row.get(True, 0))), str(int(row.get(False, 0))))
    console().print(table)
    lines = []
    if "template_origin" in run.manifest.extra:
        lines.append(f"prompts are rendered by {run.manifest.extra['template_origin']}")
    if questions := ranking.about.get("questions"):
        told = ", ".join(f"{name} {quality['combined']['auc']:.3f}" for name, quality in questions.items())
        lines.append(f"AUC on held-out references, by question: {told}")
    if labels := ranking.about.get("labels"):
        if labels["auc_after"] is not None:
            lines.append(
                f"AUC on {labels['labels']} labelled rows: {labels['auc_before']:.3f} without labels, "
                f"{labels['auc_after']:.3f} with those of other prompts (standard error "
                f"{labels['standard_error']:.3f})"
            )
        lines.append(f"labels: {labels['advice']}")
    if changed := ranking.about.get("changed"):
        lines.append(f"labels: {changed['entered']} rows entered the selection, {changed['left']} left it")
    if len(ranking.to_label) and "labels" not in ranking.about:
        lines.append(
            f"{len(ranking.to_label)} labels would help most: pharmacist label {run.root}, or label them on the page; "
            "then the same command with --labels labels.json"
        )
    lines += [f"without more references it cannot see: {reason}" for reason in ranking.about.get("cannot_see", [])]
    lines += [f"scores {run.path('scores.parquet')}", f"core subset {run.path(selected)}"]
    lines += [f"page {run.path('report.html')}"]
    lines += [f"next: pharmacist align --data {run.path(selected)} --model MODEL --output-dir DIR"]
    for line in lines:
        console().print(line, soft_wrap=True, markup=False)
