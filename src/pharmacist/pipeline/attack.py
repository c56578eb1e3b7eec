"""The stage `attack`: a user's fine-tuning job with harmful rows in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pharmacist.attacks import ATTACKS, Attack
from pharmacist.core.env import process_index
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.core.files import atomic_write
from pharmacist.core.hashing import sha256_text
from pharmacist.core.progress import say, warn
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.formats import Source, open_source
from pharmacist.data.mixing import assert_disjoint, mix_safe, shared_prompts
from pharmacist.data.records import Records, column
from pharmacist.data.tasks import open_task
from pharmacist.data.templates import conversation
from pharmacist.data.where import conditions_of
from pharmacist.defenses import DEFENSES
from pharmacist.nn.models import base_of, model_fingerprint
from pharmacist.pipeline.rows import load, name_unused, read, tokenise, trained_counts, usual_names
from pharmacist.pipeline.stages.attack import ATTACK, AttackOptions
from pharmacist.pipeline.streams import endless_stream
from pharmacist.training.loop import Training, prepare_model
from pharmacist.training.saving import Card, ModelResult, say_done
from pharmacist.training.strategy import GradientStrategy


NOTICE = "attack_set.jsonl may hold harmful text: research material, not advice"


def attack(options: AttackOptions) -> ModelResult:
    """Builds the poisoned set, fine-tunes on it, and writes set, adapter (or model), log, card and manifest.

    Interrupted, it continues from its last checkpoint.

    Raises:
        PharmacistError: Bad options or input.
    """
    strategy, kind = DEFENSES.build_from(options.defense), ATTACKS.build_from(options.kind)
    sources = open_sources(strategy, kind, options)
    inputs = {name: source.fingerprint() for name, source in sources.items()}
    inputs |= {"model": model_fingerprint(options.model)}
    with ATTACK.open(options, inputs=inputs, methods={"defense": strategy, "kind": kind}) as run:
        model = None if run.complete else _attack(sources, strategy, kind, options, run)
        return ModelResult.of(run, model, () if options.build_only else options.snapshots)


def open_sources(strategy: GradientStrategy, kind: Attack, options: AttackOptions) -> dict[str, Source]:
    """Opens the rows of the attack and of the defense, by name, and those that must be disjoint, as ``disjoint:FILE``.

    Raises:
        ConfigError, CompatibilityError: Options that do not fit together.
    """
    defense = options.defense["name"]
    if "finetune" not in strategy.stages:
        raise CompatibilityError(f"--defense {defense}: is not a fine-tuning-stage defense; use it with `align`")
    if options.adapter == "continue" and base_of(options.model) is None:
        raise ConfigError(f"--adapter continue: {options.model} holds no adapter; leave it out for a fresh one")
    needed = {name: f"--kind {options.kind['name']}" for name in sorted(kind.needs, reverse=True)}
    needed |= {"safe": f"--defense {defense}"} if "safe" in strategy.needs else {}
    for name, method in needed.items():
        if getattr(options, name) is None:
            raise ConfigError(f"{method} needs --{name} FILE")
    openers = {"task": open_task}
    sources = {name: openers.get(name, open_source)(getattr(options, name), name=f"--{name}") for name in needed}
    for file in options.disjoint_from:
        source = open_source(file, name="--disjoint-from")
        name, same = f"disjoint:{source.label}", sum(it.label == source.label for it in sources.values())
        sources[f"{name} {same + 1}" if name in sources else name] = source
    return sources


def build_attack_set(
    sources: Mapping[str, Source], kind: Attack, options: AttackOptions, run: RunDir
) -> tuple[datasets.Dataset, Records | None, dict[str, int]]:
    """The user's set, the defender's safe rows if there are any, and numbers of rows for the manifest."""
    records = {name: _read(sources, name, options, run) for name in ("task", "harmful") if name in sources}
    counts = {f"{name}_rows": len(found) for name, found in records.items()}
    if len(records) == 2:
        shared = shared_prompts(records["harmful"].dataset, records["task"].dataset)
        records["task"] = records["task"].without(shared)
        counts["task_rows_left_out"] = len(shared)
        if not len(records["task"]) and options.poison_ratio < 1:
            raise DataError("--task: every prompt also occurs in --harmful; check the two files")
    rows = kind.build(
        {name: found.dataset for name, found in records.items()},
        n=options.samples,
        poison_ratio=options.poison_ratio,
        seed=options.seed,
    )
    for name in sources:
        if name.startswith("disjoint:"):
            other = _read(sources, name, options, run)
            _assert_disjoint(other, rows, records, name.removeprefix("disjoint:"))
    safe = _read(sources, "safe", options, run) if "safe" in sources else None
    if safe is not None:
        _assert_disjoint(safe, rows, records, "--safe")
    harmful = sum(rows["is_harmful"][:])
    if "harmful" in records and options.poison_ratio > 0 and not harmful:
        warn(
            f"a poison ratio of {options.poison_ratio:g} gives no harmful row among {len(rows)} samples, so the "
            "attack set is benign; use more samples"
        )
    return rows, safe, counts | {"samples": len(rows), "harmful": harmful, "benign": len(rows) - harmful}


def _assert_disjoint(other: Records, rows: datasets.Dataset, records: Mapping[str, Records], name: str) -> None:
    """Checks that an attack set shares no prompt with other rows, neither as its kind wrote it nor as it was drawn."""
    flags, numbers = column(rows, "is_harmful"), column(rows, "row")
    drawn = [
        found.dataset.select(
            np.flatnonzero(np.isin(column(found.dataset, "row"), numbers[flags == (of == "harmful")]))
        )
        for of, found in records.items()
    ]
    for part in (rows, *drawn):
        assert_disjoint(other.dataset, part, names=(name, "the attack set"))


def _read(sources: Mapping[str, Source], name: str, options: AttackOptions, run: RunDir) -> Records:
    if name.startswith("disjoint:"):  # of these all prompts count
        work = run.work("data", sha256_text(name)[:16])
        return read(sources[name], options, work, usual_names=True, where=[], prompts_only=True)
    chosen = {other: source for other, source in sources.items() if not other.startswith("disjoint:")}
    records = read(
        sources[name],
        options,
        run.work("data", name),
        harmful=name == "harmful",
        usual_names=usual_names(sources.values(), options),
        where=conditions_of(options.where, chosen)[name],
    )
    records.announce()
    return records


def _attack(
    sources: Mapping[str, Source], strategy: GradientStrategy, kind: Attack, options: AttackOptions, run: RunDir
) -> Any:
    name_unused(options, ["task", "harmful"], kind.needs, f"kind '{options.kind['name']}'")
    name_unused(options, ["safe"], strategy.needs, f"defense '{options.defense['name']}'")
    with run.phase("build"):
        rows, safe, counts = build_attack_set(sources, kind, options, run)
        if process_index() == 0:
            _write_set(run.path("attack_set.jsonl"), rows)
        if safe is not None:
            count, replaces = strategy.mixed_in(len(rows))
            counts |= {"safe_rows": len(safe), "safe_rows_mixed_in": count}
            if count:
                seed = derive(options.seed, "defense")
                rows = mix_safe(rows, safe.dataset, count=count, replace=replaces, seed=seed)
    if options.build_only:
        if process_index() == 0:
            run.finish(outputs=["attack_set.jsonl"], counts=counts, extra={"notice": NOTICE})
            say(f"attack set of {counts['samples']} rows: {run.path('attack_set.jsonl')}")
        return None
    with run.phase("load model"):
        loaded = load(options.model, options, merge=options.adapter == "fresh")
        encoded = tokenise(rows, "tokens-ids", loaded, options, run, where="the attack set")
        counts |= trained_counts(encoded) | {"refused": len(encoded.not_rendered)}
        streams = {}
        if safe is not None:
            tokens = tokenise(safe.dataset, "safe-ids", loaded, options, run, where="--safe")
            streams["safe"] = endless_stream("safe", tokens, loaded, options)
        loaded = prepare_model(loaded, options, "attack")
    name, lost = options.defense["name"], len(rows) - len(encoded)
    card = Card(
        title="after a simulated harmful fine-tuning attack",
        what="The result of a simulated attack, for measuring defenses. It is less safe than its base on purpose.",
        tags=["harmful-fine-tuning", name],
        facts={
            "attack": options.kind["name"],
            "rows": len(rows),
            "harmful rows": counts["harmful"],
            **({"of these rows left out": lost} if lost else {}),
            "fine-tuning-stage defense": name,
        },
        intended_use="Research on defenses against harmful fine-tuning. Do not deploy or distribute it.",
    )
    training = Training(loaded, encoded, strategy, options, run, streams)
    steps = training.fit_and_save(card, counts, snapshots=options.snapshots, outputs=["attack_set.jsonl"])
    left_out = f", less {lost} that were left out" if lost else ""
    set_of = f"{len(rows)} rows, {counts['harmful']} of them harmful{left_out}"
    say_done(run, f"fine-tuned on {set_of}, {steps} steps: {run.root}")
    return loaded.model


def _write_set(path: Path, rows: datasets.Dataset) -> None:
    """The set as `align` and `curate` read it back: one layout, with ``is_harmful`` and each row's source number."""
    messages = any(turns is not None for turns in rows["turns"][:])
    with_input = not messages and any(rows["input"])
    with atomic_write(path) as file:
        for row in rows:
            own: dict[str, Any] = {"prompt": row["prompt"], "completion": row["completion"]}
            if messages:
                own = {"messages": [*conversation(row), {"role": "assistant", "content": row["completion"]}]}
            elif with_input:
                instruction = row["instruction"] if row["input"] else row["prompt"]
                own = {"instruction": instruction, "input": row["input"] or "", "output": row["completion"]}
            own |= {"is_harmful": row["is_harmful"], "source_row": row["row"]}
            file.write(json.dumps(own, ensure_ascii=False) + "\n")
