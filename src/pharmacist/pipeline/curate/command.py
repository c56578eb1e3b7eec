"""The stage `curate`: rank an alignment pool, write scores, core subset and page."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pharmacist.core.env import rank as process
from pharmacist.core.errors import DataError
from pharmacist.core.files import remove, write_text
from pharmacist.core.progress import console, warn
from pharmacist.core.rundir import RunDir
from pharmacist.data.duplicates import find_duplicates
from pharmacist.data.formats import Source, write_rows
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.choosing import balance_counts, changed_by_labels, fraction_of, ranked_table, shortfall
from pharmacist.pipeline.curate.printing import show
from pharmacist.pipeline.curate.reading import (
    Inputs,
    fingerprints,
    joined,
    labels_of_pool,
    open_sources,
    read_inputs,
    rendered,
)
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stages.curate import CURATE, RANK, REFERENCES, SPREAD, CurateOptions
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.base import SelectionContext, Selector
from pharmacist.selectors.embeddings import pool_keys, pool_points
from pharmacist.selectors.labels import rows_to_label


def curate(options: CurateOptions) -> Ranking | None:
    """Ranks a pool and writes everything that the contract names into the output folder.

    Returns:
        The ranking; None where the folder holds this very run, complete, or on other processes than the first.

    Raises:
        PharmacistError: Bad options or input.
    """
    sources = open_sources(options.pool, {name: getattr(options, name) for name in REFERENCES}, option="--{}")
    selector = SELECTORS.build_from(options.selector)
    if not _keeps_format(sources["pool"], options):
        sources["pool"].check_json_lines()  # not when all is ranked
    early = scratch = None
    if options.overwrite or options.labels is not None:
        # What an earlier run left is touched only when the new input is known to be usable.
        scratch = tempfile.TemporaryDirectory(prefix="pharmacist-")
        early = read_inputs(sources, selector, options, Path(scratch.name))
        labels_of_pool(early[0]["pool"], options)
    inputs = fingerprints(sources, options)
    with CURATE.open(
        options, inputs=inputs, methods={"selector": selector}, reopens=options.labels is not None
    ) as run:
        if run.complete:
            return None
        ranking = _rank(sources, selector, options, run, early)
        ranking._scratch = scratch
        barrier()  # the first process removes the partial state that the others still read
        if process() != 0:
            return None
        selected = ranking.table["row"].to_numpy()[ranking.table["selected"].to_numpy()]
        form = ranking.source.format if _keeps_format(ranking.source, options) else "jsonl"
        name = f"selected.{form}"
        write_rows(ranking.source, selected.tolist(), run.path(name), format=form)
        ranking.to_parquet(run.path("scores.parquet"))
        outputs = ["scores.parquet", name, "report.html"]
        if len(ranking.to_label):
            write_text(run.path("to_label.jsonl"), "".join(json.dumps(row) + "\n" for row in ranking.asked()))
            outputs.append("to_label.jsonl")
        if ranking.records.refused:
            refused = ({"row": one.number, "line": one.line, "reason": one.reason} for one in ranking.records.refused)
            write_text(run.path("refused.jsonl"), "".join(json.dumps(one) + "\n" for one in refused))
            outputs.append("refused.jsonl")
        remove(run.path("selector"))  # a link there would lead elsewhere; what it kept was read into work/
        if selector.save(run.path("selector")):
            outputs.append("selector")
        ranking.manifest = run.manifest.model_dump(mode="json")
        ranking.report(run.path("report.html"))
        run.finish(outputs=outputs)
        ranking.manifest = run.manifest.model_dump(mode="json")
        show(ranking, run, name)
        return ranking


def rank(options: CurateOptions) -> Ranking:
    """Ranks a pool; nothing is written but partial state.

    Raises:
        PharmacistError: Bad options or input.
    """
    sources = open_sources(options.pool, {name: getattr(options, name) for name in REFERENCES})
    selector = SELECTORS.build_from(options.selector)
    with RANK.open(options, inputs=fingerprints(sources, options), methods={"selector": selector}) as run:
        ranking = _rank(sources, selector, options, run)
        ranking._scratch, run.temporary = run.temporary, None  # its rows lie there
    ranking.manifest = run.manifest.model_dump(mode="json")
    return ranking


def _rank(
    sources: Mapping[str, Source], selector: Selector, options: CurateOptions, run: RunDir, early: Inputs | None = None
) -> Ranking:
    """Ranks the pool; `early` is what was read before the run began."""
    barrier()
    with run.phase("read"):
        records, left_out, groups = early or read_inputs(sources, selector, options, run.work("data"))
        records, of_source = joined(records)
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
        fraction=fraction_of(options, len(pool)),
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
        pool, groups = rendered(context, groups, options)
    with run.phase("find duplicates"):
        clusters = find_duplicates(
            pool.dataset, threshold=options.duplicate_threshold, work_dir=run.work("duplicates")
        )
    context.labels = labels_of_pool(pool, options)
    points = None
    if options.diversity in SPREAD:  # before the ranking, which may put adapters on the model
        points = pool_points(context), pool_keys(context)
    scores = selector.rank(context)
    if not np.isfinite(scores.score).all():
        bad = int(pool.dataset[int(np.flatnonzero(~np.isfinite(scores.score))[0])]["row"])
        raise DataError(f"row {bad} got a score that is not finite; try --dtype float32")
    table = ranked_table(pool, scores, clusters, options, groups, points, context.labels)
    if options.labels is not None:
        scores.report |= {"changed": changed_by_labels(table, options)}
    warnings = [*scores.warnings, *shortfall(table, options)]
    for warning in warnings:
        warn(warning)
    extra: dict[str, Any] = {"selector_report": scores.report}
    if groups is not None:
        extra["balance"] = balance_counts(table, options)
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
        extra |= loaded.facts
    run.record(counts=counts, device=device, extra=extra, warnings=warnings)
    to_label = np.zeros(0, np.int64)
    if scores.telling is not None:
        keys = pool.dataset["prompt_key"]
        to_label = rows_to_label(scores.telling, table["reason"].tolist(), keys, clusters, options.to_label)
    return Ranking(
        pool.source, table, about=scores.report, to_label=to_label, folder=str(run.root), _records=pool, _points=points
    )


def _keeps_format(pool: Source, options: CurateOptions) -> bool:
    """Whether the selected rows are written in the pool's own format, and not as JSON lines."""
    return options.format == "input" and pool.format in {"json", "csv", "parquet"}
