"""The stage `align`: train a model on an alignment set with an alignment-stage defense."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.errors import CompatibilityError, ConfigError, PharmacistError
from pharmacist.core.rundir import RunDir
from pharmacist.pipeline.side_data import SideData
from pharmacist.pipeline.weights import row_weights, weights_fingerprint
from pharmacist.training.options import TrainingStageOptions


if TYPE_CHECKING:
    from pharmacist.data.formats import Source
    from pharmacist.training.strategy import GradientStrategy

STAGE_VERSION = 2


@dataclass(kw_only=True)
class AlignOptions(TrainingStageOptions):
    """Train a model on an alignment set with an alignment-stage defense."""

    data: str
    """Alignment set: selected.jsonl of a curate run, or rows in any format that curate reads."""
    defense: dict[str, Any] = method("sft", "pharmacist.defenses:DEFENSES")
    """How the model is trained."""
    harmful: str | None = None
    """Harmful rows for the defenses that use them: harmful prompt, harmful answer. A preference file gives its
    rejected side; where --data is one, so does it."""
    harmful_batch_size: int = 0
    """Harmful rows per pass; 0 means as many as alignment rows."""
    weights: str | None = None
    """Weights of the rows' losses: scores.parquet of the curate run that wrote --data, or a Parquet file with a column
    weight and a line per row. They count relative to each other: their mean over the rows is set to 1."""
    pair_by: Literal["prompt", "row"] = "prompt"
    """How repnoise finds the harmful row of an alignment row: equal prompts, or equal row numbers."""

    # The protocol of the alignment-stage papers (T-Vaccine's and Booster's batch of 10 and 20 epochs).
    TRAIN_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 20.0,
        "per_device_train_batch_size": 10,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.harmful_batch_size < 0:
            raise ConfigError(f"--harmful-batch-size {self.harmful_batch_size}: must not be negative")


@dataclass
class AlignResult:
    """An aligned model.

    Attributes:
        folder: With ``adapter/`` or ``model/``; every command takes it as ``--model``.
        metrics: Of the manifest: steps, final loss.
        seconds: Wall time of the training alone, over all resumes.
        model: The trained model; None where the run was complete already.
    """

    folder: Path
    metrics: dict[str, Any]
    seconds: float
    model: Any = None


def align(options: AlignOptions) -> AlignResult:
    """Trains a model and writes adapter (or model), log, model card and manifest into the output folder.

    Interrupted, it continues from its last checkpoint.

    Raises:
        PharmacistError: Bad options or input.
    """
    from pharmacist.core.progress import console
    from pharmacist.data.formats import open_source
    from pharmacist.defenses import DEFENSES
    from pharmacist.nn.distributed import from_main
    from pharmacist.nn.models import model_fingerprint

    strategy = DEFENSES.build_from(options.defense)
    if "align" not in strategy.stages:
        raise CompatibilityError(f"--defense {options.defense['name']}: is not for alignment but for `attack`")
    sources = {"data": open_source(options.data, name="--data")}
    if options.harmful is not None:
        sources["harmful"] = open_source(options.harmful, name="--harmful")
    # The defense's options identify a run, whether given or left at their defaults.
    identity = replace(options, defense={"name": options.defense["name"], **vars(strategy.config)})
    run = RunDir.open(
        identity,
        stage="align",
        version=STAGE_VERSION,
        inputs={name: source.fingerprint() for name, source in sources.items()}
        | {"model": model_fingerprint(options.model)}
        | weights_fingerprint(options.weights),
    )
    model = None
    try:
        if from_main(run.complete):
            console().print(f"{run.root}: complete already; --overwrite trains again", soft_wrap=True)
        else:
            model = _align(sources, strategy, options, run)
        manifest = from_main(run.manifest)
        return AlignResult(run.root, manifest.metrics, manifest.phases["train"].seconds, model)
    except PharmacistError:
        if not any(run.root.glob("work/train/**/*.safetensors")):  # nothing was trained yet
            run.discard()
        raise
    finally:
        run.close()


def _align(sources: "Mapping[str, Source]", strategy: "GradientStrategy", options: AlignOptions, run: RunDir) -> Any:
    from pharmacist.core.env import rank
    from pharmacist.core.progress import console
    from pharmacist.data.records import parse_columns, read_records
    from pharmacist.data.tokenize import encode
    from pharmacist.data.where import conditions_of
    from pharmacist.nn.memory import PeakMemory
    from pharmacist.nn.models import load_model
    from pharmacist.training.card import model_card
    from pharmacist.training.loop import finish_training, prepare_model, train, writes_adapter

    conditions = conditions_of(options.where, sources)
    with run.phase("read"):
        records = read_records(
            sources["data"],
            work_dir=run.work("data", f"rows-{rank()}"),
            columns=parse_columns(options.columns),
            on_bad_row=options.on_bad_row,
            where=conditions["data"],
        )
        records.announce()
        side = SideData.read(sources, records, strategy, options, run)
        weights = None
        if options.weights is not None:
            weights = row_weights(options.weights, sources["data"], len(records) + len(records.refused))
    with run.phase("load model"):
        loaded = load_model(
            options.model,
            device=options.device,
            dtype=options.dtype,
            template=options.template,
            trust_remote_code=options.trust_remote_code,
        )
        encoded = encode(
            records.dataset,
            loaded.tokenizer,
            loaded.template,
            on_long_prompt=options.on_long_prompt,
            on_bad_row=options.on_bad_row,
            max_length=min(options.max_length or loaded.max_length, loaded.max_length),
            work_dir=run.work("data", f"tokens-{rank()}"),
            name=records.source.where,
        )
        streams = side.streams(encoded, loaded, run)
        model = prepare_model(loaded, options)
    if encoded.truncated:
        console().print(f"--data: {encoded.truncated} of {len(encoded)} completions were cut to fit the length")
    with run.phase("train") as phase:
        what, memory = f"align ({options.defense['name']})", PeakMemory(loaded.device)
        result = train(
            model, loaded, encoded, strategy, options, run, streams=streams, weights=weights, description=what
        )
        phase.tokens = result.tokens
        phase.extra["peak_memory"] = max(memory.megabytes(), phase.extra.get("peak_memory", 0.0))
    counts = {
        **records.counts,
        "refused": len(records.refused) + len(encoded.not_rendered),
        "trained": len(encoded),
        "long_prompts_left_out": len(encoded.refused),
        "truncated": encoded.truncated,
        "lost_eos": encoded.lost_eos,
        "cut_prompts": len(encoded.cut_prompts),
        **side.counts,
    }
    name = options.defense["name"]
    card = model_card(
        title=f"{Path(str(options.model)).name} aligned with {name}",
        what=f"{options.model} was trained on {len(encoded)} alignment rows with the defense `{name}` "
        f"({strategy.paper}), so that later fine-tuning undoes its safety less easily.",
        base_model=loaded.beneath.base or loaded.name,
        tags=[name, "safety-alignment"],
        adapter=writes_adapter(model, loaded) and not options.merge,
        template=loaded.template.kind,
        facts={
            "data": f"{options.data} ({run.manifest.inputs['data'][:19]})",
            "rows": len(encoded),
            **({"row weights": options.weights} if options.weights else {}),
            **{key.replace("_", " "): value for key, value in side.counts.items()},
            "defense": name,
            "steps": result.steps,
            "seed": options.seed,
            "final training loss": f"{result.log[-1]['loss']:.4f}" if result.log else "not logged",
        },
        settings={
            "defense": {"name": name, **vars(strategy.config)},
            "train": options.effective_train,
            "tuning": options.tuning,
            "lora": asdict(options.lora),
        },
        intended_use="Research on harmful fine-tuning, and as a starting point for fine-tuning services. Measure it "
        "(`pharmacist evaluate`) before relying on it; no alignment withstands every attack.",
    )
    finish_training(result, loaded, options, run, card=card, counts=counts)
    if rank() == 0 and run.temporary is None:
        where = run.path("adapter" if writes_adapter(model, loaded) else "model")
        console().print(
            f"aligned on {len(encoded)} rows, {result.steps} steps: {where}\n"
            f"next: pharmacist evaluate --model {run.root} --prompts PROMPTS --output-dir DIR",
            soft_wrap=True,
        )
    return model
