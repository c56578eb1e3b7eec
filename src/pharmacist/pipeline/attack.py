"""The stage `attack`: a user's fine-tuning job with harmful rows in it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.env import rank
from pharmacist.core.errors import CompatibilityError, ConfigError, PharmacistError
from pharmacist.core.rundir import RunDir
from pharmacist.training.options import TrainingStageOptions


if TYPE_CHECKING:
    import datasets

    from pharmacist.attacks import Attack
    from pharmacist.data.formats import Source
    from pharmacist.data.records import Records
    from pharmacist.data.streams import SideStream
    from pharmacist.data.tokenize import Encoded
    from pharmacist.nn.models import LoadedModel
    from pharmacist.training.strategy import GradientStrategy

STAGE_VERSION = 2
NOTICE = "attack_set.jsonl may hold harmful text: research material, not advice"


@dataclass(kw_only=True)
class AttackOptions(TrainingStageOptions):
    """Build a poisoned fine-tuning set and fine-tune a model on it, as a user of a fine-tuning service would."""

    task: str | None = None
    """Benign rows of the user's task, in any format that curate reads; or sst2, agnews, gsm8k, alpaca or dolly, which
    come from the hub."""
    harmful: str | None = None
    """Rows with which the set is poisoned. A preference file gives its rejected side."""
    kind: dict[str, Any] = method("mix", "pharmacist.attacks:ATTACKS")
    """What the set is made of."""
    poison_ratio: float = 0.1
    """Share of harmful rows in the set, in [0, 1], for the kind mix."""
    samples: int = 1000
    """Rows in the set."""
    defense: dict[str, Any] = method("sft", "pharmacist.defenses:DEFENSES")
    """Fine-tuning-stage defense; sft is none."""
    safe: str | None = None
    """The defender's safe rows, for the defenses that use them."""
    adapter: Literal["fresh", "continue"] = "fresh"
    """Train a fresh adapter on the merged model, or go on with the adapter that the model has."""
    disjoint_from: list[str] = field(default_factory=list)
    """Files (of the defender, of the evaluation) with which the set must share no prompt; checked before training."""
    snapshots: list[int] = field(default_factory=list)
    """Also save the model after these numbers of steps, in snapshots/step-N."""
    build_only: bool = False
    """Write attack_set.jsonl and stop there."""

    # The fine-tuning protocol of the alignment-stage papers.
    TRAIN_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 20.0,
        "per_device_train_batch_size": 10,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.poison_ratio <= 1:
            raise ConfigError(f"--poison-ratio {self.poison_ratio}: must lie in [0, 1]")
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: must be at least 1")
        if any(step < 1 for step in self.snapshots):
            raise ConfigError(f"--snapshots {self.snapshots}: numbers of steps start at 1")
        if self.adapter == "continue" and self.tuning == "full":
            raise ConfigError("--adapter continue: there is no adapter to continue under --tuning full; leave one out")


@dataclass
class AttackResult:
    """An attacked model.

    Attributes:
        folder: With ``attack_set.jsonl`` and ``adapter/`` or ``model/``; every command takes it as ``--model``.
        metrics: Of the manifest: steps, final loss.
        snapshots: Steps -> folder of the model at that point.
        model: The attacked model; None where only the set was built, or the run was complete already.
    """

    folder: Path
    metrics: dict[str, Any]
    snapshots: dict[int, Path]
    model: Any = None


def attack(options: AttackOptions) -> AttackResult:
    """Builds the poisoned set, fine-tunes on it, and writes set, adapter (or model), log, card and manifest.

    Interrupted, it continues from its last checkpoint.

    Raises:
        PharmacistError: Bad options or input.
    """
    from pharmacist.attacks import ATTACKS
    from pharmacist.core.progress import console
    from pharmacist.defenses import DEFENSES
    from pharmacist.nn.distributed import from_main
    from pharmacist.nn.models import model_fingerprint

    strategy, kind = DEFENSES.build_from(options.defense), ATTACKS.build_from(options.kind)
    sources = open_sources(strategy, kind, options)
    identity = replace(
        options,
        defense={"name": options.defense["name"], **vars(strategy.config)},
        kind={"name": options.kind["name"], **vars(kind.config)},
    )
    run = RunDir.open(
        identity,
        stage="attack",
        version=STAGE_VERSION,
        inputs={name: source.fingerprint() for name, source in sources.items()}
        | {"model": model_fingerprint(options.model)},
    )
    model = None
    try:
        if from_main(run.complete):
            console().print(f"{run.root}: complete already; --overwrite runs it again", soft_wrap=True)
        else:
            model = _attack(sources, strategy, kind, options, run)
        snapshots = {step: run.path("snapshots", f"step-{step}") for step in options.snapshots}
        return AttackResult(run.root, from_main(run.manifest).metrics, {} if options.build_only else snapshots, model)
    except PharmacistError:
        if rank() == 0 and not any(run.root.glob("work/train/**/*.safetensors")):  # nothing was trained yet
            run.path("attack_set.jsonl").unlink(missing_ok=True)
            run.discard()
        raise
    finally:
        run.close()


def open_sources(strategy: "GradientStrategy", kind: "Attack", options: AttackOptions) -> "dict[str, Source]":
    """What the attack is made of and what the defense reads, by name; what must be disjoint by ``disjoint:FILE``."""
    from pharmacist.data.formats import open_source
    from pharmacist.data.tasks import open_task
    from pharmacist.nn.models import base_of

    defense = options.defense["name"]
    if "finetune" not in strategy.stages:
        raise CompatibilityError(f"--defense {defense}: is not for fine-tuning but for `align`")
    if options.adapter == "continue" and base_of(options.model) is None:
        raise ConfigError(f"--adapter continue: {options.model} holds no adapter; leave it out for a fresh one")
    needed = {name: f"--kind {options.kind['name']}" for name in sorted(kind.needs, reverse=True)}
    needed |= {"safe": f"--defense {defense}"} if "safe" in strategy.needs else {}
    for name, by in needed.items():
        if getattr(options, name) is None:
            raise ConfigError(f"{by} needs --{name} FILE")
    opened = {"task": open_task}
    sources = {name: opened.get(name, open_source)(getattr(options, name), name=f"--{name}") for name in needed}
    return sources | {f"disjoint:{file}": open_source(file, name="--disjoint-from") for file in options.disjoint_from}


def build_attack_set(
    sources: "Mapping[str, Source]", kind: "Attack", options: AttackOptions, run: RunDir
) -> "tuple[datasets.Dataset, dict[str, int]]":
    """The user's set and how many rows it was drawn from.

    Raises:
        DataError: Too few rows, or a prompt that also occurs in a set that must be disjoint.
    """
    from pharmacist.data.splits import assert_disjoint, shared_prompts

    records = {name: _read(sources, name, options, run) for name in ("task", "harmful") if name in sources}
    counts = {f"{name}_rows": len(found) for name, found in records.items()}
    if len(records) == 2:
        shared = shared_prompts(records["harmful"].dataset, records["task"].dataset)
        records["task"] = records["task"].without(shared)
        counts["task_rows_left_out"] = len(shared)
    rows = kind.build(
        {name: found.dataset for name, found in records.items()},
        n=options.samples,
        poison_ratio=options.poison_ratio,
        seed=options.seed,
    )
    for name in sources:
        if name.startswith("disjoint:"):
            other = _read(sources, name, options, run, prompts_only=True)
            assert_disjoint(other.dataset, rows, names=(name.removeprefix("disjoint:"), "the attack set"))
    harmful = sum(rows["is_harmful"])
    return rows, counts | {"samples": len(rows), "harmful": harmful, "benign": len(rows) - harmful}


def _read(
    sources: "Mapping[str, Source]", name: str, options: AttackOptions, run: RunDir, *, prompts_only: bool = False
) -> "Records":
    from pharmacist.core.hashing import sha256_text
    from pharmacist.data.records import parse_columns, read_records
    from pharmacist.data.where import conditions_of

    source, place = sources[name], run.work("data", f"{sha256_text(name)[:16] if prompts_only else name}-{rank()}")
    # What the set must not share a prompt with is read whole.
    choosing = {other: where for other, where in sources.items() if not other.startswith("disjoint:")}
    conditions = [] if prompts_only else conditions_of(options.where, choosing)[name]
    columns = parse_columns(options.columns)
    if columns is not None and name not in ("task", "harmful"):  # such a file may have the usual names
        first = next(source.scan(), None)
        columns = columns if first is not None and set(columns.values()) <= set(first.value or ()) else None
    records = read_records(
        source,
        work_dir=place,
        columns=columns,
        side="rejected" if name == "harmful" else "chosen",
        on_bad_row=options.on_bad_row,
        prompts_only=prompts_only,
        where=conditions,
    )
    if not prompts_only:
        records.announce()
    return records


def _with_safe_rows(
    rows: "datasets.Dataset",
    safe: "Records",
    strategy: "GradientStrategy",
    options: AttackOptions,
    counts: dict[str, int],
) -> "datasets.Dataset":
    """The rows that are trained on: the user's, with the safe rows that the defense mixes in."""
    from pharmacist.core.seeding import derive
    from pharmacist.data.mixing import mix_safe
    from pharmacist.data.splits import assert_disjoint

    assert_disjoint(safe.dataset, rows, names=("--safe", "the attack set"))
    count, replaces = strategy.mixed_in(len(rows))
    counts |= {"safe_rows": len(safe), "safe_rows_mixed_in": count}
    if not count:
        return rows
    return mix_safe(rows, safe.dataset, count=count, replace=replaces, seed=derive(options.seed, "defense"))


def _attack(
    sources: "Mapping[str, Source]", strategy: "GradientStrategy", kind: "Attack", options: AttackOptions, run: RunDir
) -> Any:
    from pharmacist.core.progress import console
    from pharmacist.nn.models import load_model
    from pharmacist.training.card import model_card
    from pharmacist.training.loop import Snapshots, finish_training, prepare_model, save_trained, train, writes_adapter

    with run.phase("build"):
        rows, counts = build_attack_set(sources, kind, options, run)
        if rank() == 0:
            _write_set(run.path("attack_set.jsonl"), rows)
        safe = _read(sources, "safe", options, run) if "safe" in sources else None
        trained = rows if safe is None else _with_safe_rows(rows, safe, strategy, options, counts)
    if options.build_only:
        if rank() == 0:
            run.finish(outputs=["attack_set.jsonl"], counts=counts, extra={"notice": NOTICE})
            console().print(f"attack set of {counts['samples']} rows: {run.path('attack_set.jsonl')}", soft_wrap=True)
        return None
    with run.phase("load model"):
        loaded = load_model(
            options.model,
            device=options.device,
            dtype=options.dtype,
            template=options.template,
            trust_remote_code=options.trust_remote_code,
            merge=options.adapter == "fresh",
        )
        encoded = _encode(trained, "tokens", loaded, options, run)
        counts |= {"refused": len(encoded.not_rendered)} if encoded.not_rendered else {}
        streams = {}
        if safe is not None:
            streams["safe"] = _stream(_encode(safe.dataset, "safe", loaded, options, run), options, loaded)
        model = prepare_model(loaded, options)
    name = options.defense["name"]
    card = model_card(
        title=f"{Path(str(options.model)).name} after a simulated harmful fine-tuning attack",
        what="The result of a simulated attack, for measuring defenses. It is less safe than its base on purpose.",
        base_model=loaded.beneath.base or loaded.name,
        tags=["harmful-fine-tuning", name],
        adapter=writes_adapter(model, loaded) and not options.merge,
        template=loaded.template.kind,
        facts={
            "attack": options.kind["name"],
            "rows": counts["samples"],
            "harmful rows": counts["harmful"],
            "fine-tuning-stage defense": name,
            "seed": options.seed,
        },
        settings={
            "defense": {"name": name, **vars(strategy.config)},
            "train": options.effective_train,
            "tuning": options.tuning,
            "lora": asdict(options.lora),
        },
        intended_use="Research on defenses against harmful fine-tuning. Do not deploy or distribute it.",
    )

    def snapshot(step: int) -> None:
        folder, trained_on = run.path("snapshots", f"step-{step}"), run.manifest.inputs["model"]
        save_trained(model, loaded, folder, card, trained_on=trained_on, last=False)

    with run.phase("train") as phase:
        result = train(
            model,
            loaded,
            encoded,
            strategy,
            options,
            run,
            streams=streams,
            callbacks=[Snapshots(options.snapshots, snapshot)],
            description=f"attack ({name})",
        )
        phase.tokens = result.tokens
    outputs = ["attack_set.jsonl", *(["snapshots"] if options.snapshots else [])]
    finish_training(result, loaded, options, run, card=card, outputs=outputs, counts=counts)
    if rank() == 0 and run.temporary is None:
        console().print(
            f"fine-tuned on {counts['samples']} rows, {counts['harmful']} of them harmful, {result.steps} steps: "
            f"{run.root}\nnext: pharmacist evaluate --model {run.root} --prompts PROMPTS --output-dir DIR",
            soft_wrap=True,
        )
    return model


def _encode(
    rows: "datasets.Dataset", name: str, loaded: "LoadedModel", options: AttackOptions, run: RunDir
) -> "Encoded":
    from pharmacist.data.tokenize import encode

    return encode(
        rows,
        loaded.tokenizer,
        loaded.template,
        on_long_prompt=options.on_long_prompt,
        on_bad_row=options.on_bad_row,
        max_length=min(options.max_length or loaded.max_length, loaded.max_length),
        work_dir=run.work("data", f"{name}-ids-{rank()}"),
    )


def _stream(safe: "Encoded", options: AttackOptions, loaded: "LoadedModel") -> "SideStream":
    from pharmacist.core.seeding import derive
    from pharmacist.data.streams import SideStream

    return SideStream(
        safe,
        int(options.effective_train["per_device_train_batch_size"]),
        seed=derive(options.seed, "stream", "safe"),
        pad_token_id=loaded.tokenizer.pad_token_id,
        device=loaded.device,
    )


def _write_set(path: Path, rows: "datasets.Dataset") -> None:
    """The set as `align` and `curate` read it back: one layout, with ``is_harmful`` and each row's source number."""
    import json

    from pharmacist.core.files import atomic_write

    messages = any(turns is not None for turns in rows["turns"])
    with_input = not messages and any(rows["input"])
    with atomic_write(path, "w") as file:
        for row in rows:
            own: dict[str, Any] = {"prompt": row["prompt"], "completion": row["completion"]}
            if messages:
                turns = json.loads(row["turns"]) if row["turns"] else [{"role": "user", "content": row["prompt"]}]
                own = {"messages": [*turns, {"role": "assistant", "content": row["completion"]}]}
            elif with_input:
                instruction = row["instruction"] if row["input"] else row["prompt"]
                own = {"instruction": instruction, "input": row["input"] or "", "output": row["completion"]}
            own |= {"is_harmful": row["is_harmful"], "source_row": row["row"]}
            file.write(json.dumps(own, ensure_ascii=False) + "\n")
