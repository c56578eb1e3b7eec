"""The stage `align`: train a model on an alignment set with an alignment-stage defense."""

from collections.abc import Mapping
from typing import Any

from pharmacist.core.errors import CompatibilityError
from pharmacist.core.rundir import RunDir
from pharmacist.data.formats import Source, open_source
from pharmacist.data.where import conditions_of
from pharmacist.defenses import DEFENSES
from pharmacist.nn.models import model_fingerprint
from pharmacist.pipeline.rows import load, read, tokenise, trained_counts, usual_names
from pharmacist.pipeline.stages.align import ALIGN, AlignOptions
from pharmacist.pipeline.streams import alignment_streams, read_harmful_rows
from pharmacist.pipeline.weights import row_weights, scaled, weights_fingerprint
from pharmacist.training.loop import Training, prepare_model
from pharmacist.training.saving import Card, ModelResult, say_done, writes_adapter
from pharmacist.training.strategy import GradientStrategy


def align(options: AlignOptions) -> ModelResult:
    """Trains a model and writes adapter (or model), log, model card and manifest into the output folder.

    Interrupted, it continues from its last checkpoint.

    Raises:
        PharmacistError: Bad options or input.
    """
    strategy = DEFENSES.build_from(options.defense)
    if "align" not in strategy.stages:
        raise CompatibilityError(
            f"--defense {options.defense['name']}: is not an alignment-stage defense; use it with `attack`"
        )
    sources = {"data": open_source(options.data, name="--data")}
    if options.harmful is not None:
        sources["harmful"] = open_source(options.harmful, name="--harmful")
    inputs = {name: source.fingerprint() for name, source in sources.items()}
    inputs |= {"model": model_fingerprint(options.model)} | weights_fingerprint(options.weights)
    with ALIGN.open(options, inputs=inputs, methods={"defense": strategy}) as run:
        return ModelResult.of(run, None if run.complete else _align(sources, strategy, options, run))


def _align(sources: Mapping[str, Source], strategy: GradientStrategy, options: AlignOptions, run: RunDir) -> Any:
    conditions, weights = conditions_of(options.where, sources), None
    with run.phase("read"):
        records = read(
            sources["data"],
            options,
            run.work("data", "rows"),
            usual_names=usual_names(sources.values(), options),
            where=conditions["data"],
        )
        records.announce()
        harmful = read_harmful_rows(sources, records, strategy, options, run)
        if options.weights is not None:
            weights = row_weights(options.weights, sources["data"], records.counts["in"])
    with run.phase("load model"):
        loaded = load(options.model, options)
        encoded = tokenise(records.dataset, "tokens", loaded, options, run, where=records.source.where)
        if weights is not None:
            weights = scaled(weights, encoded.dataset["row"][:], options.weights or "")
        streams, stream_counts = alignment_streams(strategy, records, encoded, harmful, loaded, options, run)
        loaded = prepare_model(loaded, options)
    name = options.defense["name"]
    card = Card(
        title=f"aligned with {name}",
        what=f"{options.model} was trained on {len(encoded)} alignment rows with the defense {strategy.cited(name)}, "
        "so that later fine-tuning undoes its safety less easily.",
        tags=[name, "safety-alignment"],
        facts={
            "data": f"{options.data} ({run.manifest.inputs['data'][:19]})",
            "rows": len(encoded),
            **({"row weights": options.weights} if options.weights else {}),
            **{key.replace("_", " "): value for key, value in stream_counts.items()},
            "defense": name,
        },
        intended_use="Research on harmful fine-tuning, and as a starting point for fine-tuning services. Measure it "
        "(`pharmacist evaluate`) before relying on it; no alignment withstands every attack.",
    )
    counts = {
        **records.counts,
        "refused": len(records.refused) + len(encoded.not_rendered),
        **trained_counts(encoded),
        **stream_counts,
    }
    folder = run.path("adapter" if writes_adapter(loaded) else "model")
    steps = Training(loaded, encoded, strategy, options, run, streams, weights).fit_and_save(card, counts)
    say_done(run, f"aligned on {len(encoded)} rows, {steps} steps: {folder}")
    return loaded.model
