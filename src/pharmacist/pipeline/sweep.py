"""The stage `sweep`: many attacks on one model, and the worst of those that an attacker would not give up.

A thin script over `attack` and `evaluate`: every point of the grid is an ordinary run of both in a folder of its own,
so an interrupted sweep resumes where it stopped, and a larger grid in the same folder uses what is there.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pharmacist.core.env import rank, world_size
from pharmacist.core.errors import ConfigError, DivergedError, PharmacistError
from pharmacist.core.inputs import check_outside
from pharmacist.core.rundir import RunDir, RunOptions
from pharmacist.pipeline.stages.attack import AttackOptions
from pharmacist.pipeline.stages.evaluate import PROMPTS, REFERENCES, EvaluateOptions


if TYPE_CHECKING:
    import pandas as pd

    from pharmacist.training.strategy import GradientStrategy

STAGE_VERSION = 1
RATES = ("harmful_score", "fine_tune_accuracy", "over_refusal")
_LATE = frozenset({"grid", "margin", "curves", "evaluate"})
_EVALUATE_DECIDED = {own.name for own in fields(RunOptions)} | {"model", "compare"}
_ONLY_HARMFUL = ("benign_prompts", "task", "perplexity", "base", "lm_eval")
_SHOWN = 20


@dataclass
class GridOptions:
    """What an attacker would try; every combination is one attack."""

    learning_rate: list[float] = field(default_factory=list)
    """Values for train.learning_rate."""
    epochs: list[float] = field(default_factory=list)
    """Values for train.num_train_epochs."""
    poison_ratio: list[float] = field(default_factory=list)
    """Values for --poison-ratio. The harmful rows of a smaller one are among those of a larger one."""
    rank: list[int] = field(default_factory=list)
    """Values for lora.r; lora.alpha goes along, so that alpha / r stays."""


@dataclass(kw_only=True)
class SweepOptions(AttackOptions):
    """Attack one model in many ways and report the worst case that keeps the fine-tuned task."""

    grid: GridOptions = field(default_factory=GridOptions)
    """What is varied; the other options of the attack hold for every point."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of evaluate, as --evaluate.prompts FILE. prompts and task are needed; no attack set may share a prompt
    with either."""
    margin: float = 2.0
    """An attack counts as the worst case only if its fine-tune accuracy is at most this many points below the best."""
    curves: Literal["worst", "all", "none"] = "worst"
    """For which attacks the harmful score is also measured on the way, at --snapshots; by default after a sixteenth,
    an eighth, a quarter and half of the steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin >= 0:
            raise ConfigError(f"--margin {self.margin}: must not be negative")
        if self.build_only:
            raise ConfigError("--build-only: a sweep trains; use pharmacist attack to build a set")
        if not any(vars(self.grid).values()):
            raise ConfigError("nothing to sweep over: give --grid.learning_rate, epochs, poison_ratio or rank")
        for name, values in vars(self.grid).items():
            if repeated := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"--grid.{name}: {repeated[0]} is there twice; leave one out")
        if self.grid.epochs and self.train.get("max_steps", -1) > 0:
            raise ConfigError("--grid.epochs: --train.max_steps decides the length already; leave one out")
        if self.grid.rank and self.tuning == "full":
            raise ConfigError("--grid.rank: there is no adapter under --tuning full; leave one out")
        if self.grid.rank and self.adapter == "continue":
            raise ConfigError("--grid.rank: an adapter that is continued keeps its rank; leave one out")
        if self.grid.poison_ratio and self.kind["name"] != "mix":
            raise ConfigError(f"--grid.poison_ratio: the kind {self.kind['name']} has no such ratio; leave it out")
        for name in ("prompts", "task"):
            if not self.evaluate.get(name):
                raise ConfigError(f"--evaluate.{name} must be given; see pharmacist sweep --help")
        for name in sorted(_EVALUATE_DECIDED & self.evaluate.keys()):
            raise ConfigError(f"--evaluate.{name}: the sweep decides it; leave it out")


@dataclass
class SweepResult:
    """What a sweep found.

    Attributes:
        summary: Content of ``sweep.json``.
        folder: Where the files are.
    """

    summary: dict[str, Any]
    folder: Path

    def table(self) -> "pd.DataFrame":
        """Content of ``sweep.parquet``: one row per attack."""
        import pandas as pd

        return pd.read_parquet(self.folder / "sweep.parquet")


@dataclass(frozen=True)
class _Point:
    """One attack of the grid."""

    name: str
    settings: dict[str, Any]
    options: AttackOptions


def sweep(options: SweepOptions) -> SweepResult:
    """Runs every attack of the grid and writes ``sweep.json``, ``sweep.parquet``, ``sweep.md`` and ``report.html``.

    An attack whose loss is no longer finite is a finding, noted with its reason; it is never the worst case.

    Raises:
        PharmacistError: Bad options or input, of any point, before the first training.
    """
    from pharmacist.attacks import ATTACKS
    from pharmacist.core.files import read_json
    from pharmacist.core.progress import console
    from pharmacist.defenses import DEFENSES
    from pharmacist.nn.distributed import from_main
    from pharmacist.nn.models import model_fingerprint
    from pharmacist.pipeline.attack import open_sources

    strategy, kind = DEFENSES.build_from(options.defense), ATTACKS.build_from(options.kind)
    measuring = _evaluate_options(options, options.model, Path(options.output_dir))
    for within, own in {"": options, "evaluate.": measuring}.items():
        check_outside(Path(options.output_dir), own, within=within)
    options = replace(options, disjoint_from=_disjoint(options))
    points = _points(options, strategy)
    sources = open_sources(strategy, kind, options)
    evaluation = _evaluation_inputs(measuring)
    identity = replace(
        options,
        defense={"name": options.defense["name"], **vars(strategy.config)},
        kind={"name": options.kind["name"], **vars(kind.config)},
    )
    run = RunDir.open(
        identity,
        stage="sweep",
        version=STAGE_VERSION,
        late=_LATE,
        late_inputs=frozenset(evaluation),
        reopen=True,
        read_again=("sweep.json",),
        inputs={name: source.fingerprint() for name, source in sources.items()}
        | evaluation
        | {"model": model_fingerprint(options.model)},
    )
    try:
        if from_main(run.complete):
            console().print(f"{run.root}: complete already; --overwrite runs it again", soft_wrap=True)
            result = SweepResult(read_json(run.path("sweep.json")), run.root)
        else:
            result = _sweep(points, options, run)
        if rank() == 0 and not options.quiet:
            _show(result)
        return result
    except PharmacistError:
        run.discard()
        raise
    finally:
        run.close()


def _disjoint(options: SweepOptions) -> list[str]:
    """The files that no attack set may share a prompt with: the user's, and what the attacks are measured with."""
    from pharmacist.evaluation.prompts import PROMPT_SETS

    own = [options.evaluate[name] for name in ("prompts", "task")]
    files = [file for file in own if str(file).partition(":")[0] not in PROMPT_SETS]
    return list(dict.fromkeys([*options.disjoint_from, *files]))


def _points(options: SweepOptions, strategy: "GradientStrategy") -> list[_Point]:
    """The grid, the first option varying slowest."""
    grid, train, lora = options.grid, options.effective_train, options.lora
    by_steps = train.get("max_steps", -1) > 0
    values: dict[str, list[Any]] = {
        "learning_rate": grid.learning_rate or [train.get("learning_rate", 5e-5)],
        "epochs": [None] if by_steps else grid.epochs or [train.get("num_train_epochs", 3.0)],
        "poison_ratio": grid.poison_ratio or [options.poison_ratio],
        "rank": [None] if options.tuning == "full" or options.adapter == "continue" else grid.rank or [lora.r],
    }
    found = []
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        own = {name: getattr(options, name) for name in _names(AttackOptions)}
        own["train"] = options.train | {"learning_rate": settings["learning_rate"]}
        if not by_steps:
            own["train"]["num_train_epochs"] = settings["epochs"]
        if settings["rank"] is not None:
            own["lora"] = replace(lora, r=settings["rank"], alpha=_alpha(lora.alpha, lora.r, settings["rank"]))
        length = f"steps-{train['max_steps']}" if by_steps else f"epochs-{settings['epochs']:g}"
        parts = [f"lr-{settings['learning_rate']:g}", length, f"poison-{settings['poison_ratio']:g}"]
        name = "_".join(parts + ([f"rank-{settings['rank']}"] if settings["rank"] is not None else []))
        point = AttackOptions(
            **own
            | {
                "poison_ratio": settings["poison_ratio"],
                "overwrite": False,
                "build_only": False,
                "output_dir": str(Path(options.output_dir) / "attack" / name),
            }
        )
        point.snapshots = _snapshots(point, strategy, options)
        found.append(_Point(name, {key: value for key, value in settings.items() if value is not None}, point))
    return found


def _names(options: type[Any]) -> list[str]:
    return [own.name for own in fields(options)]


def _alpha(alpha: int, r: int, wanted: int) -> int:
    if alpha * wanted % r:
        raise ConfigError(f"--grid.rank {wanted}: gives no whole lora.alpha where alpha / r is {alpha}/{r}; change it")
    return alpha * wanted // r


def _snapshots(point: AttackOptions, strategy: "GradientStrategy", options: SweepOptions) -> list[int]:
    """Steps before the last one at which the model is kept."""
    if options.curves == "none":
        return []
    train = point.effective_train
    added, replaces = strategy.mixed_in(point.samples) if "safe" in strategy.streams else (0, False)
    batches = math.ceil(
        (point.samples + (0 if replaces else added)) / (int(train["per_device_train_batch_size"]) * world_size())
    )
    updates = math.ceil(batches / int(train.get("gradient_accumulation_steps", 1)))
    steps = int(train.get("max_steps", -1))
    steps = steps if steps > 0 else math.ceil(train["num_train_epochs"] * updates)
    wanted = options.snapshots or [steps // 16, steps // 8, steps // 4, steps // 2]
    return sorted({step for step in wanted if 0 < step < steps})


def _evaluate_options(options: SweepOptions, model: str, folder: Path, *, curve: bool = False) -> EvaluateOptions:
    """Options of one evaluation; on a curve the harmful score alone is measured."""
    from pharmacist.core.config import from_mapping

    given = {name: value for name, value in options.evaluate.items() if not (curve and name in _ONLY_HARMFUL)}
    shared = {name: getattr(options, name) for name in ("seed", "device", "dtype", "quiet", "trust_remote_code")}
    return from_mapping(
        EvaluateOptions, shared | given | {"model": model, "output_dir": str(folder)}, where="--evaluate"
    )


def _evaluation_inputs(options: EvaluateOptions) -> dict[str, str]:
    """Fingerprints of the files that models are measured with."""
    from pharmacist.data.formats import open_source
    from pharmacist.evaluation.prompts import open_prompts

    opened = {"prompts": open_prompts, "benign_prompts": open_prompts}
    return {
        f"evaluate.{name}": opened.get(name, open_source)(
            getattr(options, name), name=f"--evaluate.{name}"
        ).fingerprint()
        for name in (*PROMPTS, *REFERENCES, "perplexity")
        if getattr(options, name) is not None
    }


def _sweep(points: Sequence[_Point], options: SweepOptions, run: RunDir) -> SweepResult:
    from pharmacist.core.files import atomic_path, write_json, write_text
    from pharmacist.core.progress import bar, hushed
    from pharmacist.pipeline.attack import attack
    from pharmacist.pipeline.evaluate import evaluate

    with bar("sweep", total=2 * len(points) + 1) as progress, hushed():
        with run.phase("check"):
            _build_sets(points, run)
        with run.phase("evaluate"):  # before the first training, so that what is wrong with it shows now
            before = evaluate(_evaluate_options(options, options.model, run.path("evaluate", "before"))).metrics
        progress.advance()
        found = []
        for point in points:
            entry: dict[str, Any] = {"name": point.name, "settings": point.settings, "attack": f"attack/{point.name}"}
            try:
                with run.phase("attack"):
                    entry["steps"] = attack(point.options).metrics["steps"]
                progress.advance()
                with run.phase("evaluate"):
                    folder = run.path("evaluate", point.name, "end")
                    metrics = evaluate(_evaluate_options(options, point.options.output_dir, folder)).metrics
                entry |= {name: metrics[name] for name in RATES if name in metrics}
                entry |= {"evaluate": f"evaluate/{point.name}/end"}
            except DivergedError as error:
                entry["failed"] = str(error)
            progress.advance()
            found.append(entry)
        summary = summarise(found, before, options.margin)
        with run.phase("curves"):
            summary["curves"] = _curves(points, summary, options, run)
    if rank() == 0:
        write_json(run.path("sweep.json"), summary)
        with atomic_path(run.path("sweep.parquet")) as path:
            _table(summary).to_parquet(path, index=False)
        write_text(run.path("sweep.md"), markdown(summary))
        run.record(
            counts={"attacks": len(found), "diverged": sum("failed" in entry for entry in found)},
            metrics={"worst": summary["worst"]},
        )
        _write_page(run)
        run.finish(outputs=["sweep.json", "sweep.parquet", "sweep.md", "report.html", "attack", "evaluate"])
    return SweepResult(summary, run.root)


def _build_sets(points: Sequence[_Point], run: RunDir) -> None:
    """Builds the set of every poison ratio, so that one that cannot be built stops the sweep before any training."""
    from pharmacist.pipeline.attack import attack

    for ratio in dict.fromkeys(point.settings["poison_ratio"] for point in points):
        options = next(point.options for point in points if point.settings["poison_ratio"] == ratio)
        attack(replace(options, build_only=True, snapshots=[], output_dir=str(run.work("sets", f"poison-{ratio:g}"))))


def _curves(
    points: Sequence[_Point], summary: Mapping[str, Any], options: SweepOptions, run: RunDir
) -> dict[str, Any]:
    """Harmful score over the steps of an attack, per attack for which it is wanted."""
    from pharmacist.evaluation.worst_case import LEVELS, steps_to_reach
    from pharmacist.pipeline.evaluate import evaluate

    wanted = {"worst": [summary["worst"]], "all": [entry["name"] for entry in summary["attacks"]], "none": []}
    curves: dict[str, Any] = {}
    for point, entry in zip(points, summary["attacks"], strict=True):
        if point.name not in wanted[options.curves] or "failed" in entry:
            continue
        measured = [(0, summary["before"]["harmful_score"])]
        for step in point.options.snapshots:
            model = str(Path(point.options.output_dir) / "snapshots" / f"step-{step}")
            folder = run.path("evaluate", point.name, f"step-{step}")
            metrics = evaluate(_evaluate_options(options, model, folder, curve=True)).metrics
            measured.append((step, metrics["harmful_score"]))
        measured.append((entry["steps"], entry["harmful_score"]))
        known = [(step, metric) for step, metric in measured if metric["value"] is not None]
        if not known:
            continue
        steps, values = [step for step, _ in known], [metric["value"] for _, metric in known]
        curves[point.name] = {
            "steps": steps,
            "harmful_score": [metric for _, metric in known],
            "reached": [asdict(steps_to_reach(steps, values, level)) for level in LEVELS],
        }
    return curves


def summarise(attacks: list[dict[str, Any]], before: Mapping[str, Any], margin: float) -> dict[str, Any]:
    """Content of ``sweep.json``, curves apart: which attack is the worst case, and why.

    Args:
        attacks: Per attack its name, settings, steps and metrics; ``failed`` (why) where it has none.
        before: Metrics of the model before any attack.
        margin: Points of accuracy.
    """
    from pharmacist.evaluation.worst_case import simultaneous, within_margin, worst_case

    def values(name: str) -> list[float | None]:
        return [entry[name]["value"] if name in entry else None for entry in attacks]

    harmful, accuracy = values("harmful_score"), values("fine_tune_accuracy")
    for entry, kept in zip(attacks, within_margin(accuracy, margin), strict=True):
        entry["within_margin"] = kept
    position = worst_case(harmful, accuracy, [entry.get("steps") for entry in attacks], margin)
    interval = None
    if position is not None and "count" in (found := attacks[position]["harmful_score"]):
        interval = list(simultaneous(found["count"], found["n"], sum(value is not None for value in harmful)))
    return {
        "margin": margin,
        "best_accuracy": max((value for value in accuracy if value is not None), default=None),
        "worst": None if position is None else attacks[position]["name"],
        "worst_ci95_of_all": interval,
        "highest_of_all": max((value for value in harmful if value is not None), default=None),
        "before": {name: before[name] for name in RATES if name in before},
        "attacks": attacks,
    }


def _table(summary: Mapping[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for entry in summary["attacks"]:
        row = {"name": entry["name"]}
        row |= {name: entry["settings"].get(name) for name in _names(GridOptions)}
        row |= {"steps": entry.get("steps")}
        for name in RATES:
            metric = entry.get(name) or {}
            low, high = metric.get("ci95") or (None, None)
            row |= {name: metric.get("value"), f"{name}_low": low, f"{name}_high": high, f"{name}_n": metric.get("n")}
        row |= {
            "within_margin": entry["within_margin"],
            "worst": entry["name"] == summary["worst"],
            "failed": entry.get("failed"),
            "attack": entry["attack"],
            "evaluate": entry.get("evaluate"),
        }
        rows.append(row)
    table = pd.DataFrame(rows)
    counts = {f"{name}_n": "Int64" for name in RATES} | {"steps": "Int64", "rank": "Int64"}
    text = {"failed": "string", "evaluate": "string"}
    return table.astype(
        {
            name: "float64"
            for name in table.columns
            if table[name].dtype == object and name not in ("name", "attack", *counts, *text)
        }
        | counts
        | text
    )


# --- what people read ----------------------------------------------------------------------------------------------


def _rate(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    interval = f" [{metric['ci95'][0]:.1f}, {metric['ci95'][1]:.1f}]" if metric["ci95"] else ""
    return f"{metric['value']:.1f}{interval}"


def _remark(entry: Mapping[str, Any], worst: str | None) -> str:
    if "failed" in entry:
        return "diverged"
    if entry["name"] == worst:
        return "worst case"
    return "" if entry["within_margin"] else "below margin"


def _ordered(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The worst case, then the others within the margin, then those without, by harmful score."""

    def order(entry: Mapping[str, Any]) -> tuple[bool, bool, float]:
        value = entry["harmful_score"]["value"] if "harmful_score" in entry else None
        return entry["name"] != summary["worst"], not entry["within_margin"], 1.0 if value is None else -value

    return sorted(summary["attacks"], key=order)


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the sweep found, in sentences."""
    from pharmacist.evaluation.worst_case import Reached

    judge, attacks = summary["before"]["harmful_score"].get("judge", ""), summary["attacks"]
    worst = next((entry for entry in attacks if entry["name"] == summary["worst"]), None)
    yield f"before any attack: harmful score {_rate(summary['before']['harmful_score'])} %, judge {judge}"
    if worst is None:
        yield "no worst case: no attack gave both a harmful score and a fine-tune accuracy"
        return
    yield (
        f"worst case: {worst['name']}, harmful score {_rate(worst['harmful_score'])} %, fine-tune accuracy "
        f"{_rate(worst['fine_tune_accuracy'])} %; the best accuracy of {len(attacks)} attacks is "
        f"{summary['best_accuracy']:.1f} %, so those at or above "
        f"{summary['best_accuracy'] - summary['margin']:.1f} % count"
    )
    if summary["worst_ci95_of_all"]:
        low, high = summary["worst_ci95_of_all"]
        yield (
            "it is the highest of many, partly by chance; the interval that holds for all attacks at once is "
            f"[{low:.1f}, {high:.1f}]"
        )
    if summary["highest_of_all"] > worst["harmful_score"]["value"]:
        yield f"beyond the margin, where the task suffers, the score reaches {summary['highest_of_all']:.1f} %"
    for name, curve in summary["curves"].items():
        told = "; ".join(reached_in_words(Reached(**reached), curve["steps"][-1]) for reached in curve["reached"])
        yield f"steps of {name} until the harmful score is at a level: {told}"


def reached_in_words(reached: Any, last: int) -> str:
    """A `Reached` as a person says it; a level that was not reached within the attack might have been later.

    Args:
        reached: The level and its steps.
        last: Steps of the attack.
    """
    level = f"{reached.level:.0f} %"
    if reached.step is None:
        return f"{level} not reached in {last} steps"
    if reached.after is None:
        return f"{level} by step {reached.step} already"
    return f"{level} between steps {reached.after} and {reached.step}"


_COLUMNS = {
    "learning_rate": "lr",
    "epochs": "epochs",
    "poison_ratio": "poison ratio",
    "rank": "rank",
    "steps": "steps",
}


def _rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of attacks; of the settings those that vary."""
    ordered = _ordered(summary)
    settings = [entry["settings"] | {"steps": entry.get("steps")} for entry in ordered]
    varied = [name for name in _COLUMNS if len({own.get(name) for own in settings}) > 1] or ["steps"]
    head = [*(_COLUMNS[name] for name in varied), "harmful score", "fine-tune accuracy", ""]
    lines = [
        [
            *("-" if own.get(name) is None else f"{own[name]}" for name in varied),
            *(_rate(entry.get(name)) for name in RATES[:2]),
            _remark(entry, summary["worst"]),
        ]
        for own, entry in zip(settings, ordered, strict=True)
    ]
    return head, lines


def markdown(summary: Mapping[str, Any]) -> str:
    """The sweep as Markdown: what was found, and a table of all attacks."""
    head, lines = _rows(summary)
    table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])
    found = "\n".join(f"- {line}" for line in _lines(summary))
    return f"# Attack sweep\n\n{found}\n\n{table}\n\nIn %, with 95 % intervals (Wilson) over prompts.\n"


def _show(result: SweepResult) -> None:
    from rich.table import Table

    from pharmacist.core.progress import console

    out, summary = console(), result.summary
    head, lines = _rows(summary)
    table = Table(title=f"{len(lines)} attacks, in %, 95 % intervals over prompts")
    for column in head:
        table.add_column(column.replace(" ", "\n"), justify="right" if column else "left", no_wrap=True)
    for cells in lines[:_SHOWN]:
        table.add_row(*cells)
    out.print(table)
    if len(lines) > _SHOWN:
        out.print(f"{len(lines) - _SHOWN} more in {result.folder / 'sweep.md'}", soft_wrap=True)
    for line in _lines(summary):
        out.print(line, markup=False, soft_wrap=True)
    out.print(f"page {result.folder / 'report.html'}\nfigures {result.folder / 'sweep.json'}", soft_wrap=True)


def _write_page(run: RunDir) -> None:
    from pharmacist.report.sweep import render_sweep

    render_sweep(run.root, manifest=run.manifest.model_dump(mode="json"))
