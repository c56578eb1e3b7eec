"""The command `demo`: rank, select, align, attack, evaluate on the embedded world.

A thin script over the public stages: whatever it does, a user can do with the same commands on files of their own.
Every stage has its own folder below the output folder, so an interrupted demo resumes where it stopped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pharmacist.core.errors import ConfigError
from pharmacist.core.rundir import RunDir, RunOptions


STAGE_VERSION = 2
ARMS = ("full", "random", "core")
STEPS = (0, 4, 8, 16, 32, 64)
"""Attack steps at which the harmful score is measured."""
FRACTION = 0.3
LORA: dict[str, Any] = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ALIGN = {"num_train_epochs": 8, "per_device_train_batch_size": 16, "learning_rate": 2e-3}
ATTACK = {"max_steps": STEPS[-1], "per_device_train_batch_size": 16, "learning_rate": 1.5e-3}
"""The same settings for every arm: epochs, not steps, so that a subset costs its share of the time."""
SELECTOR = {"name": "pharmacist"}
"""The default one."""


@dataclass(kw_only=True)
class DemoOptions(RunOptions):
    """The whole story on the embedded world: rank, select, align on full, random and core subset, attack, evaluate."""

    rows: int = 600
    """Rows in the alignment pool."""
    mislabel: float = 0.05
    """Share of the pool's rows that are mislabelled: their answers do what is forbidden."""
    pool: Literal["planted", "clean"] = "planted"
    """planted: a pool with known faults. clean: one without any, whose refusals differ only in force."""
    seeds: int = 3
    """Repetitions with other seeds, for the intervals."""

    def __post_init__(self) -> None:
        if self.rows < 100:
            raise ConfigError(f"--rows {self.rows}: must be at least 100")
        if not 0 <= self.mislabel <= 0.5:
            raise ConfigError(f"--mislabel {self.mislabel}: must lie in [0, 0.5]")
        if self.seeds < 1:
            raise ConfigError(f"--seeds {self.seeds}: must be at least 1")


@dataclass
class DemoResult:
    """What the demo found.

    Attributes:
        summary: Content of ``demo.json``.
        folder: Where the files are.
    """

    summary: dict[str, Any]
    folder: Path


@dataclass
class _Demo:
    """The demo's folder and what all its stages share."""

    options: DemoOptions
    run: RunDir
    files: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

    def common(self, seed: int, *parts: str) -> dict[str, Any]:
        """Options that every stage takes."""
        folder = self.run.path(*parts)
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = self.options
        return {
            "output_dir": str(folder),
            "seed": seed,
            "device": options.device,
            "dtype": options.dtype,
            "quiet": options.quiet,
        }


def demo(options: DemoOptions) -> DemoResult:
    """Runs the demo and writes ``demo.json`` and ``report.html``.

    Raises:
        PharmacistError: Bad options, or an output folder that holds something else.
    """
    from pharmacist.core.files import read_json, write_json
    from pharmacist.core.progress import bar, console, hushed

    run = RunDir.open(options, stage="demo", version=STAGE_VERSION, inputs={}, read_again=("demo.json",))
    try:
        if run.complete:
            console().print(f"{run.root}: complete already; --overwrite runs it again")
            result = DemoResult(read_json(run.path("demo.json")), run.root)
            _show(result)
            return result
        demo = _Demo(options, run)
        _write_world(demo)
        seeds = range(options.seed, options.seed + options.seeds)
        curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
        found: dict[str, dict[str, list[float]]] = {
            name: {arm: [] for arm in ARMS}
            for name in ("fine_tune_accuracy", "over_refusal", "over_refusal_aligned", "alignment_seconds")
        }
        with bar("demo", total=2 + len(ARMS) * len(seeds) * 3) as progress, hushed():
            with run.phase("select"):
                ranking = _select(demo)
            progress.advance(2)
            for seed in seeds:
                for arm in ARMS:
                    with run.phase("align"):
                        aligned, seconds = _align(demo, arm, seed)
                    progress.advance()
                    with run.phase("attack"):
                        snapshots = _attack(demo, arm, seed, aligned)
                    progress.advance()
                    with run.phase("evaluate"):
                        metrics = [_evaluate(demo, arm, seed, step, model) for step, model in snapshots.items()]
                    progress.advance()
                    curves[arm].append([point["harmful_score"]["value"] for point in metrics])
                    found["alignment_seconds"][arm].append(seconds)
                    found["over_refusal_aligned"][arm].append(metrics[0]["over_refusal"]["value"])
                    found["over_refusal"][arm].append(metrics[-1]["over_refusal"]["value"])
                    found["fine_tune_accuracy"][arm].append(metrics[-1]["fine_tune_accuracy"]["value"])
        summary = _summarise(demo, list(seeds), curves, found, ranking)
        write_json(run.path("demo.json"), summary)
        run.record(metrics={"auc": summary["auc"], "ranking": summary["ranking"]})
        _write_page(demo)
        run.finish(outputs=["demo.json", "report.html", "data", "rank", "align", "attack", "evaluate"])
        result = DemoResult(summary, run.root)
        _show(result)
        return result
    finally:
        run.close()


def _write_world(demo: _Demo) -> None:
    """Writes the world's rows as ordinary files."""
    from pharmacist.core.files import write_text
    from pharmacist.worlds import World

    options, world = demo.options, World(demo.options.seed)
    if options.pool == "clean":
        pool, demo.labels = world.clean_pool(options.rows)
    else:
        pool, demo.labels = world.pool(options.rows, mislabel=options.mislabel)
    sets: dict[str, Sequence[Mapping[str, str]]] = {
        "pool": pool,
        "safe": world.safe(),
        "harmful": world.harmful(),
        "utility": world.utility(),
        "attack": world.attack_harmful(64, ("potions",)),
        "task": world.task_train(640),
        "task-test": world.task_test(150),
        "prompts": world.eval_prompts(120),
        "borderline": world.borderline(60),
        **{f"judge-{name}": rows for name, rows in world.judge_references().items()},
    }
    for name, rows in sets.items():
        path = demo.run.path("data", f"{name}.jsonl")
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        demo.files[name] = str(path)


def _select(demo: _Demo) -> dict[str, Any]:
    """Ranks the pool, draws one random subset per seed; returns how well the ranking finds the planted labels."""
    from pharmacist.pipeline.curate import curate
    from pharmacist.pipeline.stages.curate import CurateOptions
    from pharmacist.worlds import BASE_MODEL

    options, files = demo.options, demo.files
    references: dict[str, Any] = {name: files[name] for name in ("safe", "harmful", "utility")}
    curate(
        CurateOptions(
            pool=files["pool"],
            model=str(BASE_MODEL),
            selector=dict(SELECTOR),
            top=FRACTION,
            **references,
            **demo.common(options.seed, "rank"),
        )
    )
    for seed in range(options.seed, options.seed + options.seeds):
        curate(
            CurateOptions(
                pool=files["pool"],
                selector={"name": "random"},
                top=FRACTION,
                **demo.common(seed, f"rank-random-{seed}"),
            )
        )
    return _ranking_quality(demo)


def _ranking_quality(demo: _Demo) -> dict[str, Any]:
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    table = pd.read_parquet(demo.run.path("rank", "scores.parquet"))
    labels = pd.Series(demo.labels, name="label")
    keep = labels.isin(["good", "duplicate", "strong"]).to_numpy()
    auc = float(roc_auc_score(keep, table["score"])) if 0 < keep.sum() < len(keep) else None
    selected = labels[table["selected"].to_numpy()].value_counts()
    reasons = table.groupby([labels, "reason"]).size().reset_index(name="rows")
    return {
        "auc": auc,
        "keep": "good and duplicate" if demo.options.pool == "planted" else "strong",
        "selected": {str(label): int(count) for label, count in selected.items()},
        "reasons": [
            {"label": str(found["label"]), "reason": str(found["reason"]), "rows": int(found["rows"])}
            for found in reasons.to_dict("records")
        ],
    }


def _align(demo: _Demo, arm: str, seed: int) -> tuple[str, float]:
    """Aligns on an arm's rows; returns the model's folder and the seconds that training took."""
    from pharmacist.core.manifest import read_manifest
    from pharmacist.pipeline.align import align
    from pharmacist.pipeline.stages.align import AlignOptions
    from pharmacist.training.options import LoraOptions
    from pharmacist.worlds import BASE_MODEL

    data = {
        "full": demo.files["pool"],
        "random": str(demo.run.path(f"rank-random-{seed}", "selected.jsonl")),
        "core": str(demo.run.path("rank", "selected.jsonl")),
    }
    common = demo.common(seed, "align", f"{arm}-{seed}")
    align(AlignOptions(data=data[arm], model=str(BASE_MODEL), train=dict(ALIGN), lora=LoraOptions(**LORA), **common))
    return common["output_dir"], read_manifest(common["output_dir"]).phases["train"].seconds


def _attack(demo: _Demo, arm: str, seed: int, aligned: str) -> dict[int, str]:
    """Fine-tunes an aligned model on the poisoned task; returns the model's folder at each of `STEPS`."""
    from pharmacist.pipeline.attack import attack
    from pharmacist.pipeline.stages.attack import AttackOptions
    from pharmacist.training.options import LoraOptions

    common = demo.common(seed, "attack", f"{arm}-{seed}")
    attack(
        AttackOptions(
            model=aligned,
            task=demo.files["task"],
            harmful=demo.files["attack"],
            poison_ratio=0.1,
            samples=640,
            snapshots=list(STEPS[1:-1]),
            train=dict(ATTACK),
            lora=LoraOptions(**LORA),
            **common,
        )
    )
    folder = Path(common["output_dir"])
    snapshots = {step: str(folder / "snapshots" / f"step-{step}") for step in STEPS[1:-1]}
    return {0: aligned, **snapshots, STEPS[-1]: str(folder)}


def _evaluate(demo: _Demo, arm: str, seed: int, step: int, model: str) -> dict[str, Any]:
    """Metrics of one model: all of them before and after the attack, the harmful score alone in between."""
    from pharmacist.pipeline.evaluate import evaluate
    from pharmacist.pipeline.stages.evaluate import EvaluateOptions

    files = demo.files
    more: dict[str, Any] = (
        {"benign_prompts": files["borderline"], "task": files["task-test"]} if step in (0, STEPS[-1]) else {}
    )
    judge: dict[str, Any] = {name: files[f"judge-{name}"] for name in ("safe", "harmful", "utility")}
    options = EvaluateOptions(
        model=model,
        prompts=files["prompts"],
        judge={"name": "probe"},
        max_new_tokens=32,
        **more,
        **judge,
        **demo.common(seed, "evaluate", f"{arm}-{seed}", f"step-{step}"),
    )
    return evaluate(options).metrics


def _summarise(
    demo: _Demo, seeds: list[int], curves: dict[str, list[list[float]]], found: dict[str, Any], ranking: dict[str, Any]
) -> dict[str, Any]:
    """Content of ``demo.json``: rates in percent, times in seconds, one value per seed in `seeds` order."""
    from pharmacist.core.manifest import read_manifest
    from pharmacist.evaluation.statistics import RATE, RATE_DIFFERENCE, curve_area, t_interval, with_interval

    def interval(values: Sequence[float], bounds: tuple[float, float] = RATE) -> dict[str, Any]:
        estimate = t_interval(values, bounds=bounds)
        return {"values": list(values), "mean": estimate.value, **with_interval(estimate.interval, estimate.missing)}

    areas = {arm: [curve_area(STEPS, curve) for curve in curves[arm]] for arm in ARMS}
    seconds = {arm: sum(values) / len(values) for arm, values in found["alignment_seconds"].items()}
    phases = read_manifest(demo.run.path("rank")).phases
    return {
        "pool": {"kind": demo.options.pool, "rows": demo.options.rows, "mislabel": demo.options.mislabel},
        "arms": list(ARMS),
        "seeds": seeds,
        "steps": list(STEPS),
        "curves": curves,
        **found,
        "auc": {arm: interval(areas[arm]) for arm in ARMS},
        "differences": {
            f"core - {arm}": interval([a - b for a, b in zip(areas["core"], areas[arm], strict=True)], RATE_DIFFERENCE)
            for arm in ("full", "random")
        },
        "final_harmful_score": {arm: interval([curve[-1] for curve in curves[arm]]) for arm in ARMS},
        "time_saved": {arm: 100 * (1 - seconds[arm] / seconds["full"]) for arm in ("random", "core")},
        "selection_seconds": sum(phase.seconds for phase in phases.values()),
        "ranking": ranking,
    }


def _write_page(demo: _Demo) -> None:
    from pharmacist.pipeline.report import demo_page

    demo_page(demo.run.root, demo.run.manifest)


def _show(result: DemoResult) -> None:
    """Prints the comparison and what to do next."""
    from rich.table import Table

    from pharmacist.core.progress import console

    summary, out = result.summary, console()
    pool = summary["pool"]
    kind = "clean" if pool["kind"] == "clean" else f"{100 * pool['mislabel']:.0f} % mislabelled"
    table = Table(title=f"Pool of {pool['rows']} rows, {kind}; {len(summary['seeds'])} seeds, 95 % intervals")
    table.add_column("aligned\non")
    for name in ("HS over\nattack", "HS at\nend", "FA", "over-\nrefusal", "alignment\ntime"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in summary["arms"]:
        saved = summary["time_saved"].get(arm)
        table.add_row(
            arm,
            _with_interval(summary["auc"][arm]),
            f"{summary['final_harmful_score'][arm]['mean']:.1f}",
            f"{_mean(summary['fine_tune_accuracy'][arm]):.1f}",
            f"{_mean(summary['over_refusal_aligned'][arm]):.1f} / {_mean(summary['over_refusal'][arm]):.1f}",
            f"{_mean(summary['alignment_seconds'][arm]):.1f} s" + (f" ({-saved:+.0f} %)" if saved is not None else ""),
        )
    out.print(table)
    out.print(
        "HS: harmful score, mean over the attack's steps and at its end; FA: fine-tune accuracy; over-refusal: "
        "after alignment / after the attack; all in %"
    )
    for name, difference in summary["differences"].items():
        out.print(f"harmful score, {name}: {_with_interval(difference)} points")
    quality = summary["ranking"]
    if quality["auc"] is not None:
        out.print(
            f"ranking: AUC {quality['auc']:.3f} ({quality['keep']} against the rest), "
            f"{summary['selection_seconds']:.0f} s"
        )
    out.print(f"page: {result.folder / 'report.html'}   figures: {result.folder / 'demo.json'}")
    out.print(
        "next, your own pool: pharmacist curate --pool POOL --safe SAFE --harmful HARMFUL --model MODEL "
        "--output-dir DIR"
    )


def _with_interval(interval: Mapping[str, Any]) -> str:
    low_high = interval["ci95"]
    ends = f"[{low_high[0]:.1f}, {low_high[1]:.1f}]" if low_high else f"(no interval: {interval['no_ci95']})"
    return f"{interval['mean']:.1f} {ends}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
