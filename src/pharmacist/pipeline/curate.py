"""The stages of a ranking: rank an alignment pool, write scores, core subset and page; select another share later."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from shlex import join, quote
from typing import Any

import numpy as np
import pandas as pd

from pharmacist.core.console import named
from pharmacist.core.env import process_index
from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.files import atomic_path, remove, write_text
from pharmacist.core.hashing import sha256_file
from pharmacist.core.progress import hushed, print_table, say, warn
from pharmacist.core.rundir import RunDir
from pharmacist.data.duplicates import find_duplicates
from pharmacist.data.formats import write_rows
from pharmacist.data.records import own_columns, parse_columns
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.choosing import balance_counts, changed_by_labels, chosen_rows, ranked_table, shortfall
from pharmacist.pipeline.curate_inputs import CurateInputs
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stages.curate import CURATE, RANK, SELECT, SPREAD, CurateOptions, SelectOptions
from pharmacist.selectors.base import Scores, SelectionContext, scaled_to_mean_1
from pharmacist.selectors.embeddings import pool_keys, pool_points
from pharmacist.selectors.labels import rows_to_label


WEIGHTS = "weights.parquet"
"""File with the weights of the rows that `select` chose, if the ranking has weights."""
_NOT_ALWAYS = frozenset(
    "to_label.jsonl refused.jsonl selected.jsonl selected.json selected.csv selected.parquet".split()
)
"""Outputs that some rankings have."""
_OF_CONTEXT = "seed device dtype template max_length trust_remote_code checkpoint_seconds embedder".split()


def curate(options: CurateOptions) -> Ranking | None:
    """Ranks a pool and writes scores, core subset, page and manifest into the output folder.

    Returns:
        The ranking; None if the folder holds the same run already, and on all processes but the first.

    Raises:
        PharmacistError: Bad options or input.
    """
    inputs = CurateInputs(options)
    pool = inputs.sources["pool"]
    form = pool.format if options.format == "input" and pool.format in {"json", "csv", "parquet"} else "jsonl"
    if form == "jsonl":
        pool.check_json_lines()  # before the work
    scratch = None
    if options.overwrite or options.labels is not None:
        # The results of an earlier run are touched only when the new input is known to be usable.
        scratch = tempfile.TemporaryDirectory(prefix="pharmacist-")
        inputs.read(Path(scratch.name))
        with hushed():  # the ranking reads them again, and says what there is to say
            inputs.labels()
    stage = replace(CURATE, reopens=options.labels is not None)
    with stage.open(options, inputs=inputs.fingerprints(), methods={"selector": inputs.selector}) as run:
        if run.complete:
            return None
        ranking = _rank(inputs, run)
        ranking._scratch = scratch
        barrier()  # the first process removes the partial state that the others still read
        if process_index() != 0:
            return None
        name = f"selected.{form}"
        selected = ranking.table["row"][ranking.table["selected"]].tolist()
        write_rows(ranking.source, selected, run.path(name), format=form)
        ranking.to_parquet(run.path("scores.parquet"))
        outputs = ["scores.parquet", name, "report.html"]
        refused = [{"row": it.number, "line": it.line, "reason": it.reason} for it in ranking.records.refused]
        for file, rows in {"to_label.jsonl": ranking.rows_to_label(), "refused.jsonl": refused}.items():
            if rows:
                write_text(run.path(file), "".join(json.dumps(row) + "\n" for row in rows))
                outputs.append(file)
        remove(run.path("selector"))  # a link there would lead elsewhere; what it kept was read into work/
        if inputs.selector.save(run.path("selector")):
            outputs.append("selector")
        for file in _NOT_ALWAYS.intersection(run.manifest.outputs).difference(outputs):
            remove(run.path(file))  # of the ranking before this one; other files of such names stay
        ranking.manifest = run.manifest.model_dump(mode="json")
        ranking.report(run.path("report.html"))
        run.finish(outputs=outputs)
        ranking.manifest = run.manifest.model_dump(mode="json")
        _show(ranking, run, name)
        return ranking


def rank(options: CurateOptions) -> Ranking:
    """Ranks a pool, and writes what `curate` writes if there is an output folder; a finished ranking is loaded."""
    if options.output_dir:
        made = curate(options)
        barrier()
        return made or Ranking.load(options.output_dir, options.pool)
    inputs = CurateInputs(options)
    with RANK.open(options, inputs=inputs.fingerprints(), methods={"selector": inputs.selector}) as run:
        ranking = _rank(inputs, run)
        ranking._scratch, run.temporary = run.temporary, None  # its rows lie there
    ranking.manifest = run.manifest.model_dump(mode="json")
    return ranking


def select(options: SelectOptions) -> Path:
    """Writes ``selected.jsonl``, the ranking's best rows unchanged and in input order; returns that file.

    Diversity and balance are those of the ranking. If the ranking has weights, those of the selected rows are written
    to `WEIGHTS`, with mean 1.

    Raises:
        DataError: The folder holds no finished ranking, or its pool has changed.
        ConfigError: The ranking's diversity needs distances between rows, which a folder does not hold.
    """
    ranking = Ranking.load(options.ranking)
    table, manifest = ranking.table, ranking.manifest
    scores = sha256_file(Path(options.ranking) / "scores.parquet")
    with SELECT.open(options, inputs={"ranking": scores, "pool": manifest["inputs"]["pool"]}) as run:
        path = run.path("selected.jsonl")
        if process_index() == 0 and not run.complete:
            with run.phase("select"):
                chosen = chosen_rows(table, manifest["config"], options)
                rows = table["row"].to_numpy()[chosen]
                write_rows(ranking.source, rows.tolist(), path, format="jsonl")
                if "weight" in table:
                    own = scaled_to_mean_1(table["weight"].to_numpy()[chosen], np.ones(len(chosen), dtype=bool))
                    with atomic_path(run.path(WEIGHTS)) as temporary:
                        pd.DataFrame({"row": rows, "weight": own}).to_parquet(temporary, index=False)
            outputs = [path.name, *([WEIGHTS] if "weight" in table else [])]
            run.finish(outputs=outputs, counts={"ranked": len(table), "selected": len(rows)})
        barrier()
        return path


def _rank(inputs: CurateInputs, run: RunDir) -> Ranking:
    options, selector = inputs.options, inputs.selector
    barrier()
    with run.phase("read"):
        inputs.read(run.work("data"))
        references, files = inputs.references()
    for rows in inputs.records.values():
        rows.announce()
    for name, number in inputs.left_out.items():
        run.record(counts={f"references_{name.replace(' ', '_')}_left_out": number})
        if number:
            say(f"--{name}: {number} rows share a prompt with --pool and are left out")
    notice = selector.notice(references.keys()) if options.resume_selector is None else None
    if notice is not None:
        say(f"selector '{options.selector['name']}': {notice}")
    if options.labels is not None and not selector.learns_from_labels():
        text = "does not learn from them; they only keep rows labelled bad out of the selection"
        say(f"--labels: selector '{selector.name}' {text}")
    context = SelectionContext(
        run=run,
        pool=inputs.records["pool"],
        references=references,
        model_name=options.model,
        resume_from=Path(options.resume_selector) if options.resume_selector else None,
        sources=files,
        **{name: getattr(options, name) for name in _OF_CONTEXT},
    )
    if options.model is not None and (selector.needs & {"model", "embedder"} or options.diversity in SPREAD):
        inputs.render(context)
    pool, groups, threshold = context.pool, inputs.groups, options.duplicate_threshold
    with run.phase("find duplicates"):
        clusters = find_duplicates(pool.dataset, threshold=threshold, work_dir=run.work("duplicates"))
    context.labels = inputs.labels()
    # Before the ranking, which may add adapters to the model.
    points = (pool_points(context), pool_keys(context)) if options.diversity in SPREAD else None
    scores = selector.rank(context)
    if not isinstance(scores, Scores):
        raise CompatibilityError(f"selector '{selector.name}': rank must return Scores, not {type(scores).__name__}")
    scores.check(selector.name, len(pool))
    if len(bad := np.flatnonzero(~np.isfinite(scores.score))):
        raise DataError(f"{named(pool.row_numbers[bad].tolist())}: the score is not finite; try --dtype float32")
    table = ranked_table(pool, scores, clusters, options, groups, points, context.labels)
    if options.labels is not None:
        scores.report |= {"changed": changed_by_labels(table, options, points, run.manifest.inputs["pool"])}
    for warning in (*scores.warnings, *shortfall(table, options)):
        warn(warning)
    counts = {
        **pool.counts,
        "ranked": len(pool),
        "selected": int(table["selected"].sum()),
        "near_duplicates": int((table["duplicate_of"] >= 0).sum()),
        **{f"references_{name}": len(rows) for name, rows in context.references.items()},
    }
    if "pool" in context.encoded:
        own = context.encoded["pool"]
        counts |= {"truncated": own.truncated, "lost_eos": own.lost_eos, "cut_prompts": len(own.cut_prompts)}
    extra: dict[str, Any] = {"selector_report": scores.report}
    run.manifest.extra.pop("balance", None)  # of a ranking before this one
    if groups is not None:
        extra["balance"] = balance_counts(table, options)
    loaded = context.model if "model" in context.__dict__ else None
    if loaded is not None:
        extra |= loaded.facts
    device = "cpu" if loaded is None else str(loaded.device)
    run.record(counts=counts, device=device, extra=extra)
    folder = run.root if run.temporary is None else None
    ranking = Ranking(pool.source, table, about=scores.report, folder=folder, _records=pool, _points=points)
    if scores.informativeness is not None:
        keys, reasons = pool.dataset["prompt_key"][:], table["reason"].tolist()
        ranking.to_label = rows_to_label(scores.informativeness, reasons, keys, clusters, options.to_label)
    return ranking


def _show(ranking: Ranking, run: RunDir, selected: str) -> None:
    """Prints counts by reason, the selector's own report, the files of the run and the next command."""
    title = f"{len(ranking.table)} rows ranked, {int(ranking.table['selected'].sum())} selected"
    rows = [[str(cell) for cell in row] for row in ranking.counts().itertuples()]
    print_table(title, ["reason", "selected", "left out"], rows)
    lines, about = [], ranking.about
    if "template_origin" in run.manifest.extra:
        lines.append(f"prompts are rendered by {run.manifest.extra['template_origin']}")
    if questions := about.get("questions"):
        aucs = ", ".join(f"{name} {quality['combined']['auc']:.3f}" for name, quality in questions.items())
        lines.append(f"AUC on held-out references, by question: {aucs}")
    if labels := about.get("labels"):
        if labels["auc_after"] is not None:
            lines.append(
                f"AUC on {labels['labels']} labelled rows: {labels['auc_before']:.3f} without labels, "
                f"{labels['auc_after']:.3f} with those of other prompts (standard error "
                f"{labels['standard_error']:.3f})"
            )
        lines.append(f"labels: {labels['advice']}")
    if changed := about.get("changed"):
        lines.append(f"labels: {changed['entered']} rows entered the selection, {changed['left']} left it")
    if len(ranking.to_label) and "labels" not in about:
        lines.append(
            f"labels of {len(ranking.to_label)} rows would help most: label them in report.html or with pharmacist "
            f"label {quote(str(run.root))}, then rank the pool again with --labels FILE"
        )
    lines += [f"no reference shows {reason}: such rows may pass for others" for reason in about.get("cannot_see", [])]
    files = {"scores": "scores.parquet", "core subset": selected, "report": "report.html"}
    lines += [f"{what} {run.path(file)}" for what, file in files.items()]
    if ranking.table["selected"].any():
        words = ["--data", str(run.path(selected))]
        if columns := own_columns(ranking.source, parse_columns(run.manifest.config["columns"]) or {}):
            words += ["--columns", ",".join(f"{column}={name}" for column, name in columns.items())]
        lines.append(f"next: pharmacist align {join(words)} --model MODEL --output-dir DIR")
    say("\n".join(lines))
