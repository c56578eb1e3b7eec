"""The stage `repair`: restore safety that a user's fine-tuning has cost, without training."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pharmacist.core.env import process_index
from pharmacist.core.errors import CompatibilityError, ConfigError
from pharmacist.core.files import write_json, write_text
from pharmacist.core.progress import print_table
from pharmacist.core.rundir import RunDir
from pharmacist.data.formats import Source, open_source
from pharmacist.nn.lowrank import Factors, adapter_factors, factorise
from pharmacist.nn.merge import merge_adapter
from pharmacist.nn.models import base_of, model_fingerprint, trained_on
from pharmacist.pipeline.rows import load, name_unused, read, tokenise
from pharmacist.pipeline.stages.repair import REPAIR, RepairOptions
from pharmacist.repairs import REPAIRS
from pharmacist.repairs.base import Change, Form, ModelWeights, References, Repair, apply
from pharmacist.training.saving import Card, ModelResult, finish, say_done


def repair(options: RepairOptions) -> ModelResult:
    """Repairs a model and writes adapter (or model), ``repair.json``, card and manifest into the output folder.

    Raises:
        PharmacistError: Bad options or input, models that do not belong together, or nothing to repair.
    """
    chosen = REPAIRS.build_from(options.method)
    _check_given(chosen, options)
    rows = sorted({"harmful", "safe"} & chosen.needs)
    sources = {name: open_source(getattr(options, name), name=f"--{name}") for name in rows}
    models = {name: getattr(options, name) for name in ("model", "aligned", "base")}
    fingerprints = {name: model_fingerprint(model) for name, model in models.items() if model is not None}
    form, continued = _relation(options, fingerprints)
    chosen.check(form, continued=continued)
    inputs = {name: source.fingerprint() for name, source in sources.items()} | fingerprints
    with REPAIR.open(options, inputs=inputs, methods={"method": chosen}) as run:
        return ModelResult.of(run, None if run.complete else _repair(sources, chosen, form, continued, options, run))


def _check_given(chosen: Repair, options: RepairOptions) -> None:
    name = options.method["name"]
    for needed in sorted(chosen.needs - {"base"}):
        if getattr(options, needed) is None:
            raise ConfigError(f"--method {name} needs --{needed} {'MODEL' if needed == 'aligned' else 'FILE'}")
    if "base" in chosen.needs and options.base is None and base_of(options.aligned or "") is None:
        raise ConfigError(f"--method {name}: {options.aligned} is no adapter that names its base; give --base MODEL")


def _relation(options: RepairOptions, fingerprints: Mapping[str, str]) -> tuple[Form, bool]:
    """The form that is repaired, and whether the fine-tuned adapter was continued from the aligned one."""
    if fingerprints.get("aligned") == fingerprints["model"]:
        raise ConfigError(f"--aligned {options.aligned}: is the fine-tuned model; give the one that was fine-tuned")
    base = base_of(options.model)
    if options.form == "weights" or (options.form == "auto" and base is None):
        return "weights", False
    if base is None:
        raise ConfigError(f"--form adapter: {options.model} holds no adapter; use --form weights")
    if options.aligned is None:
        return "adapter", False
    start = trained_on(options.model)
    if start == fingerprints["aligned"]:
        return "adapter", False
    if start == trained_on(options.aligned):
        return "adapter", True
    raise CompatibilityError(
        f"--model: its adapter was trained on {base}, which is neither --aligned {options.aligned} nor the base model "
        "of that"
    )


def _repair(
    sources: Mapping[str, Source], chosen: Repair, form: Form, continued: bool, options: RepairOptions, run: RunDir
) -> Any:
    name = options.method["name"]
    name_unused(options, ["base", "harmful", "safe"], chosen.needs, f"method '{name}'")
    with run.phase("load"):
        loaded = load(options.model, options, merge=form == "weights")
        tuned = ModelWeights(loaded.model.eval(), form)
        references = References(seed=options.seed)
        if "aligned" in chosen.needs:
            references.aligned, references.update = _aligned(tuned, options)
        for which, source in sources.items():
            records = read(source, options, run.work("data", which), harmful=which == "harmful")
            records.announce()
            encoded = tokenise(records.dataset, f"{which}-ids", loaded, options, run, where=source.where)
            setattr(references, which, encoded)
    with run.phase("repair"):
        plan = chosen.plan(tuned, references)
        changes = apply(tuned, plan)
    metrics = _metrics(changes)
    if process_index() != 0:
        return loaded.model
    found = {"method": name, "form": form, "continued": continued, "findings": plan.findings}
    write_json(run.path("repair.json"), found | {"changes": [asdict(change) for change in changes]})
    write_text(run.path("log.jsonl"), json.dumps({"step": 1, **metrics}) + "\n")  # a repair is a single step
    card = Card(
        title=f"repaired with {name}",
        what=f"{options.model} after the repair {chosen.cited(name)}, which restores safety that fine-tuning has "
        "cost.",
        tags=[name, "safety-repair"],
        facts={
            "aligned model": options.aligned or "not used",
            "tensors changed": f"{metrics['tensors_changed']} of {metrics['tensors']}",
            "entries changed": f"{100 * metrics['share_changed']:.2f} %",
            "seed": options.seed,
        },
        intended_use="Research on harmful fine-tuning. Measure it (`pharmacist evaluate`) before relying on it.",
        settings={"method": {"name": name, **vars(chosen.config)}, "form": form},
    )
    finish(
        run,
        options,
        loaded,
        card,
        trained_on=trained_on(options.model) or "",
        outputs=["repair.json", "log.jsonl"],
        metrics=metrics,
        extra={"form": form},
    )
    if run.temporary is None:
        _show(changes, metrics, name)
        say_done(run, f"repaired: {run.root}")
    return loaded.model


def _aligned(tuned: ModelWeights, options: RepairOptions) -> tuple[ModelWeights, dict[str, Factors]]:
    """The aligned model in the form of the fine-tuned one, and the update of its base model by the alignment."""
    options = replace(options, template="auto")  # no prompt is rendered for these
    assert options.aligned is not None
    is_adapter = base_of(options.aligned) is not None and options.base is None
    model: Any = load(options.aligned, options, merge=not is_adapter).model
    if is_adapter:
        update = {
            name: replace(own, A=own.A.detach().clone(), B=own.B.detach().clone())
            for name, own in adapter_factors(model).items()
        }
        if tuned.form == "weights":
            model = merge_adapter(model.eval(), options.aligned)
        aligned = ModelWeights(model.eval(), tuned.form)
    else:
        assert options.base is not None
        aligned = ModelWeights(model.eval(), "weights")
        base = ModelWeights(load(options.base, options).model, "weights").tensors()
        _check_shapes("--base", base, aligned.tensors())
        update = {name: factorise(weight, base[name]) for name, weight in aligned.tensors().items()}
    if tuned.form == "weights":
        _check_shapes("--aligned", aligned.tensors(), tuned.tensors())
    return aligned, update


def _check_shapes(option: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses tensors of the model of an option that lack one of the expected, or have another shape."""
    for name, tensor in expected.items():
        if name not in found:
            raise CompatibilityError(f"{option}: has no layer {name}, which --model has; give the model it came from")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)} and not {tuple(tensor.shape)}"
            raise CompatibilityError(f"{option}: {name} has the shape {shapes}; give the model it came from")


def _metrics(changes: list[Change]) -> dict[str, Any]:
    entries, changed = sum(c.entries for c in changes), sum(c.changed for c in changes)
    return {
        "tensors": len(changes),
        "tensors_changed": sum(bool(c.changed) for c in changes),
        "entries": entries,
        "entries_changed": changed,
        "share_changed": changed / entries,
        "norm_before": sum(c.norm_before**2 for c in changes) ** 0.5,
        "norm_after": sum(c.norm_after**2 for c in changes) ** 0.5,
    }


def _show(changes: list[Change], metrics: Mapping[str, Any], name: str) -> None:
    """Prints the changes, summed over the layers."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        parts = change.tensor.split(".")
        groups.setdefault(".".join(parts[-2:] if parts[-1].startswith("lora_") else parts[-1:]), []).append(change)
    rows = []
    for group, members in groups.items():
        own = _metrics(members)
        changed = f"{own['tensors_changed']} of {own['tensors']}", f"{100 * own['share_changed']:.1f} %"
        rows.append([group, *changed, f"{own['norm_before']:.4g}", f"{own['norm_after']:.4g}"])
    title = f"{name}: {metrics['tensors_changed']} of {metrics['tensors']} tensors changed"
    print_table(title, ["tensors", "changed", "entries", "norm before", "norm after"], rows)
