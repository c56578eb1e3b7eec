"""Expands a grid into a graph: its cells, and the stages that they need, each of them once.

    rank [-> label -> rank] -> select -> align -> attack -> repair -> evaluate

Models are evaluated after alignment, at the snapshots of the attack, after it, and after a repair.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from pharmacist.attacks import ATTACKS
from pharmacist.core.config import from_mapping, underscored
from pharmacist.core.env import process_index
from pharmacist.core.errors import CompatibilityError, ConfigError
from pharmacist.core.files import write_text
from pharmacist.core.hashing import sha256_json
from pharmacist.core.mappings import merged
from pharmacist.core.method import Method
from pharmacist.core.options import LengthOptions, as_json, identifying
from pharmacist.core.registry import Registry, closest
from pharmacist.data.formats import open_source
from pharmacist.data.records import first_row
from pharmacist.defenses import DEFENSES
from pharmacist.evaluation.judges import JUDGES
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.bench.data import WORLD, Data
from pharmacist.pipeline.bench.options import AXES, AttackEntry, BenchOptions, ModelEntry, PoolEntry, SelectorEntry
from pharmacist.pipeline.bench.stages import (
    EVERYWHERE,
    KINDS,
    Draft,
    Input,
    StageRun,
    has_answers,
    is_finished,
    make_stage,
    with_options,
)
from pharmacist.pipeline.curate import WEIGHTS
from pharmacist.pipeline.evaluate.reading import grader_of, judges_of, verdict_files
from pharmacist.pipeline.stages.curate import REFERENCES, SPREAD
from pharmacist.pipeline.stages.evaluate import EVALUATE, NOT_ALONG_ATTACKS
from pharmacist.repairs import REPAIRS
from pharmacist.selectors import SELECTORS


T = TypeVar("T")
_Choice = SimpleNamespace
"""One entry of every axis, by its name, and the seed; a selector has one fraction, an attack one strength."""
SEP = " / "
SELECTED = "selected.jsonl"
_LOADING = [item.name for item in fields(LengthOptions)]
"""Options of stages that an entry of the models decides."""
_KINDS = {"selectors": "rank", "defenses": "align", "attacks": "attack", "tasks": "evaluate", "judges": "evaluate"}
"""Axis -> kind of the stages to which the options of its entries belong."""
_MISSING = "-"
"""Value of a required option until it is known which stage's result it names."""


class NoDefense(Method):
    """Neither a fine-tuning-stage defense nor a repair."""

    name = "none"


DEFENSES_AND_REPAIRS: Registry[Any] = Registry(
    "defense or repair", {**DEFENSES.table(), **REPAIRS.table(), "none": f"{__name__}:NoDefense"}, group=""
)
"""Fine-tuning-stage defenses and repairs, which are one axis of a grid."""


@dataclass(frozen=True)
class Cell:
    """One choice on every axis, and the names of the stages that it needs.

    Attributes:
        axes: Axis -> name of the choice, and the attack's strength.
        seed: Of all its stages.
        roles: Role -> stage: `rank`, `select`, `align`, `before` (evaluation of the aligned model), `attack`, `repair`
            where there is one, `after` (evaluation at the end); where the ranking has labels that its selector asked
            for, `ask` (the ranking without them) and `label` too.
        curve: Evaluations along the attack, where there are snapshots: after how many steps, -1 for the attack's end,
            and the stage.
    """

    axes: Mapping[str, Any]
    seed: int
    roles: Mapping[str, str]
    curve: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """Names of the choices, joined by `SEP`."""
        axes = self.axes
        names = [axes["model"], axes["pool"], f"{axes['selector']} {axes['fraction']:.15g}", axes["defense"]]
        return SEP.join([*names, axes["attack"], axes["post_alignment_defense"], axes["task"], axes["judge"]])

    @property
    def stages(self) -> set[str]:
        """Names of all stages whose results it needs."""
        return {*self.roles.values(), *(stage for _, stage in self.curve)}

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern matches a part of the name followed by the seed."""
        return fnmatchcase(f"{self.name}{SEP}seed {self.seed}", f"*{pattern}*")


@dataclass
class Plan:
    """The graph: stages by name, each after those that it needs; cells and names by axis in the grid's order.

    `warnings` are reasons not to trust the results that the grid itself shows.
    """

    stages: dict[str, StageRun]
    cells: list[Cell]
    axes: dict[str, list[Any]]
    data: Data
    warnings: list[str]

    def write(self) -> None:
        """Writes the rows of the synthetic world that stages read, under a launcher in its first process.

        Files that are there are written again: the stages' keys say what is in them, whoever has changed them since.
        """
        if process_index() == 0:
            for path, text in self.data.texts.items():
                write_text(path, text)
        barrier()

    def waiting(self, pattern: str | None = None, *, again: bool = False) -> list[StageRun]:
        """Stages that are still to be run for the cells that match a pattern, each after those that it needs.

        A stage is run where its result is missing or stale, and where a stage that it needs is run; all are run
        `again` where the results are to be deleted.

        Raises:
            ConfigError: No cell matches.
            DataError: A result was written by a newer version of this package.
        """
        cells = [cell for cell in self.cells if pattern is None or cell.matches(pattern)]
        if not cells:
            raise ConfigError(
                f"--only '{pattern}': matches no cell; a cell is called '{self.cells[0].name}', for example"
            )
        needed = {name for cell in cells for name in cell.stages}
        waiting: dict[str, StageRun] = {}
        for name, stage in self.stages.items():
            if name in needed and (
                again or not waiting.keys().isdisjoint(stage.needs) or not is_finished(stage, self.stages)
            ):
                waiting[name] = stage
        return list(waiting.values())


def expand(grid: BenchOptions, root: Path) -> Plan:
    """Expands a grid into its graph in the folder `root`, and checks everything that can be checked before any work.

    Raises:
        PharmacistError: The grid has an error.
    """
    _check_differ("seeds", grid.seeds)
    graph, axes, cells = _Graph(grid, root), _axes(grid), []
    for seed, *entries in itertools.product(grid.seeds, *axes.values()):
        chosen = _Choice(**dict(zip(axes, entries, strict=True)), seed=seed)
        if chosen.pool.name not in (chosen.selector.pools or [chosen.pool.name]):
            continue
        if chosen.selector.name not in (chosen.defense.selectors or [chosen.selector.name]):
            continue
        roles, curve = graph.cell(chosen)
        names = {axis: entry.name for axis, entry in zip(axes, entries, strict=True)}
        names["fraction"] = chosen.selector.fractions[0]
        kind = graph.method(ATTACKS, chosen.attack.kind)
        names |= {"poison_ratio": kind.share(chosen.attack.poison_ratio), "samples": chosen.attack.samples}
        cells.append(Cell(names, seed, {role: stage.name for role, stage in roles.items()}, curve))
    graph.share_answers()
    names_of = {axis: list(dict.fromkeys(entry.name for entry in entries)) for axis, entries in axes.items()}
    return Plan(graph.stages, cells, names_of | {"seed": list(grid.seeds)}, graph.data, list(_favouring(axes)))


# --- axes -----------------------------------------------------------------------------------------------------------


def _axes(grid: BenchOptions) -> dict[str, list[Any]]:
    """Axis, in the singular -> its entries, parsed and checked."""
    axes = {axis.removesuffix("s"): _entries(axis, getattr(grid, axis)) for axis in AXES}
    for owner, axis in (("selector", "pool"), ("defense", "selector")):
        known = [entry.name for entry in axes[axis]]
        for entry in axes[owner]:
            for name in getattr(entry, f"{axis}s"):
                if name not in known:
                    raise ConfigError(f"{owner} '{entry.name}': there is no {axis} '{name}'{closest(name, known)}")
    for pool in axes["pool"]:
        for name in ("rows", "mislabel", "kind"):
            if pool.pool != WORLD and getattr(pool, name) != getattr(PoolEntry, name):
                raise ConfigError(
                    f"pool '{pool.name}': '{name}' only applies to a synthetic pool, and {pool.pool} is not one"
                )
        if pool.kind == "clean" and pool.mislabel != PoolEntry.mislabel:
            raise ConfigError(f"pool '{pool.name}': 'mislabel' only applies to the kind planted; leave it out")
        for name in REFERENCES:
            if pool.pool == WORLD and getattr(pool, name) is None:
                setattr(pool, name, f"{WORLD}:{name}")
    selectors = axes["selector"]
    axes["selector"] = [replace(one, fractions=[share]) for one in selectors for share in _fractions(one, grid)]
    axes["attack"] = list(_swept(axes["attack"]))
    return axes


def _favouring(axes: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """A warning for each judge that learns from what selectors read."""
    for judge in axes["judge"]:
        learned = {getattr(judge, name) for name in REFERENCES} - {None}
        of_pool = {pool.name: learned & {getattr(pool, name) for name in REFERENCES} for pool in axes["pool"]}
        if pools := ", ".join(f"'{name}'" for name, shared in of_pool.items() if shared):
            files = ", ".join(sorted(set().union(*of_pool.values())))
            yield (
                f"judge '{judge.name}' learns from references of pool {pools} ({files}), by which rows are selected, "
                "so that it may favour selectors that read them; give it others, or compare with another judge"
            )


def _entries(axis: str, values: Sequence[Any]) -> list[Any]:
    """The entries of an axis."""
    entries: list[Any] = []
    _check_any(axis, values)
    kind, short = AXES[axis]
    for number, value in enumerate(values, 1):
        where = f"{axis}, entry {number}"
        if not isinstance(value, str | Mapping):
            raise ConfigError(f"{where}: needs a name, or keys and values of its own, not {value!r}")
        entry: Any = from_mapping(kind, {short: value} if isinstance(value, str) else value, where=where)
        if not entry.name:
            chosen = getattr(entry, short)
            entry.name = chosen["name"] if isinstance(chosen, Mapping) else _stem(chosen or "none")
        if SEP in entry.name:
            raise ConfigError(f"{where}: the name '{entry.name}' must not contain '{SEP}'")
        if any(entry.name == other.name for other in entries):
            raise ConfigError(f"{where}: another entry is also called '{entry.name}'; give one of them another name")
        if own := getattr(entry, "options", {}):
            entry.options = _own_options(_kind(axis, entry), f"{where}: options", own)
        entries.append(entry)
    return entries


def _kind(axis: str, entry: Any) -> str:
    """The kind of stage to which the options of an entry belong; a ConfigError where it belongs to none."""
    if axis != "post_alignment_defenses":
        return _KINDS[axis]
    name = entry.method["name"]
    if name == NoDefense.name:
        raise ConfigError(f"{axis}: '{entry.name}' is no defense, so options have no effect; leave them out")
    return "repair" if name in REPAIRS.names() else "attack"


def _own_options(kind: str, where: str, options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options of a section or of an entry, without hyphens; a ConfigError where the grid decides one of them."""
    own = underscored(options, where)
    for key, name in zip(options, own, strict=True):
        if name in KINDS[kind].by_axes | EVERYWHERE:
            raise ConfigError(f"{where}: '{key}' is decided by the grid; leave it out here")
    return own


def _check_any(axis: str, values: Sequence[Any]) -> None:
    if not values:
        raise ConfigError(f"{axis}: must name at least one; docs/how-to/bench.md has an example")


def _stem(path: str) -> str:
    """The name of a file without suffixes, or of a model."""
    return Path(path).resolve().name if os.path.isdir(path) else Path(path).name.partition(".jsonl")[0]


def _check_differ(where: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{where} {values}: needs one or more values, all different")


def _fractions(selector: SelectorEntry, grid: BenchOptions) -> list[float]:
    where, full = f"selector '{selector.name}'", SELECTORS.get(selector.selector["name"]).keeps_all
    fractions = selector.fractions or ([1.0] if full else grid.fractions)
    if full and fractions != [1.0]:
        raise ConfigError(f"{where}: keeps the full pool; leave its fractions out")
    _check_differ(f"{where}: fractions", fractions)
    return fractions


def _swept(attacks: Iterable[AttackEntry]) -> Iterator[AttackEntry]:
    """Attacks with a single poison ratio and number of samples each."""
    for attack in attacks:
        strength = {name: getattr(attack, name) for name in ("poison_ratio", "samples")}
        sweeps = {name: values for name, values in strength.items() if isinstance(values, list)}
        if "poison_ratio" in sweeps:
            ATTACKS.build_from(attack.kind).check_varies(f"attack '{attack.name}': poison_ratio")
        for name, values in sweeps.items():
            _check_differ(f"attack '{attack.name}': {name}", values)
        for chosen in itertools.product(*sweeps.values()):
            setting = dict(zip(sweeps, chosen, strict=True))
            label = " ".join([attack.name, *(f"{name} {value:.15g}" for name, value in setting.items())])
            yield replace(attack, name=label, **setting)


# --- stages ---------------------------------------------------------------------------------------------------------


def _once_per(*axes: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Has a method of the graph called only once for all cells with the same seed and entries of these axes."""

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        @wraps(make)
        def made(graph: "_Graph", chosen: _Choice, *more: Hashable) -> T:
            entries = (id(getattr(chosen, axis)) for axis in axes)  # an entry is one object in all cells
            found: T = graph.once((make, chosen.seed, *entries, *more), lambda: make(graph, chosen, *more))
            return found

        return made

    return decorate


class _Graph:
    """The graph of a grid while it is built; sections that the stages cannot have are refused."""

    def __init__(self, grid: BenchOptions, root: Path) -> None:
        self.grid, self.data = grid, Data(root)
        self.stages: dict[str, StageRun] = {}
        self._sections: dict[str, dict[str, Any]] = {}
        """Kind of stages -> its options for every cell."""
        self._made: dict[Hashable, Any] = {}
        self._asking: dict[tuple[str, str], list[str]] = defaultdict(list)
        """Hashes of a model and of what it is asked -> names of the evaluations with it."""
        for kind, known in KINDS.items():
            self._sections[kind] = own = _own_options(kind, known.name, getattr(grid, known.name, {}))
            if decided := [name for name in own if name in _LOADING]:
                raise ConfigError(f"{known.name}: '{decided[0]}' is decided by the entries of models; give it there")
            if own:
                self.options(kind, known.name)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made only once per key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def method(self, registry: Registry[Any], choice: Mapping[str, Any]) -> Any:
        """An instance of a method, for what it declares."""
        return self.once(f"{registry.kind} {choice!r}", lambda: registry.build_from(choice))

    def options(self, kind: str, where: str, *layers: Mapping[str, Any], model: ModelEntry | None = None) -> Any:
        """Checked options of a kind of stage, without inputs and seed: those of the grid's section, of the model and
        of the layers, of which the last wins.
        """
        known = KINDS[kind]
        values: dict[str, Any] = {
            item.name: _MISSING
            for item in fields(known.options)
            if item.default is item.default_factory is MISSING or item.name in ("model", "prompts")
        }
        values |= self._sections[kind]
        if model is not None:
            values |= {item.name: getattr(model, item.name) for item in fields(known.options) if item.name in _LOADING}
        for layer in layers:
            values = merged(values, layer)
        for name in ("device", "dtype", "quiet", "checkpoint_seconds"):
            values[name] = getattr(self.grid, name)
        return self.once(f"options of {kind} {values!r}", lambda: from_mapping(known.options, values, where=where))

    def draft(
        self, kind: str, options: Any, chosen: _Choice, method: str, made: Iterable[str], seed: int | None = None
    ) -> Draft:
        """A stage without the results of others, which come by the options `made` instead of what these name; the
        seed is by default that of the cell.
        """
        options, known = with_options(options, seed=chosen.seed if seed is None else seed), KINDS[kind]
        inputs: dict[str, Input | list[Input]] = {}
        for name in (*known.files, *known.models, *known.folders):
            spec, where = getattr(options, name), f"{known.name}: {name}"
            if name in made or not spec:
                continue
            if name in known.models:
                inputs[name] = self.data.model(spec, where)
            elif name in known.folders:
                inputs[name] = self.data.encoder(spec, where)
            elif isinstance(spec, list):
                inputs[name] = [self.data.rows(one, where, chosen) for one in spec]
            else:
                inputs[name] = self.data.rows(spec, where, chosen)
        return Draft(kind, options, method, inputs)

    def stage(
        self, kind: str, options: Any, chosen: _Choice, method: str, made: Mapping[str, Input], seed: int | None = None
    ) -> StageRun:
        """Adds a stage to the graph, or finds the one that is the same; `made` are results of other stages."""
        stage = make_stage(self.data.root, self.draft(kind, options, chosen, method, made, seed), made)
        return self.stages.setdefault(stage.name, stage)

    def cell(self, chosen: _Choice) -> tuple[dict[str, StageRun], tuple[tuple[int, str], ...]]:
        """`Cell.roles` with the stages themselves, and `Cell.curve`."""
        align, attack = self.aligned(chosen), self.attacked(chosen)
        roles = self.selected(chosen) | {"align": align, "attack": attack}
        if chosen.post_alignment_defense.method["name"] in REPAIRS.names():
            roles["repair"] = self.repaired(chosen)
        roles["before"] = self.evaluated(chosen, align.output())
        curve: list[tuple[int, str]] = []
        if steps := sorted(set(attack.options.snapshots)):
            curve.append((0, roles["before"].name))
            for step in steps:
                model = attack.output(f"snapshots/step-{step}")
                curve.append((step, self.evaluated(chosen, model, prompts_only=True).name))
            curve.append((-1, self.evaluated(chosen, attack.output()).name))
        roles["after"] = self.evaluated(chosen, roles.get("repair", attack).output())
        return roles, tuple(curve)

    @_once_per("model", "pool", "selector")
    def selected(self, chosen: _Choice) -> dict[str, StageRun]:
        """The stages that rank and select, and where a selector asks for labels, those before them."""
        pool, selector, who = chosen.pool, chosen.selector, f"selector '{chosen.selector.name}'"
        given = {name: getattr(pool, name) for name in ("pool", *REFERENCES)} | _labels(chosen)
        given |= {"selector": selector.selector, "model": chosen.model.reader or chosen.model.model}
        where = f"{who}, pool '{pool.name}'"
        options = self.options("rank", where, selector.options, given, model=chosen.model)
        method = self.method(SELECTORS, options.selector)
        if selector.weighted and not method.gives_weights:
            raise ConfigError(f"{who}: has no weights; leave 'weighted' out")
        need = _lacking(options, method.needs & set(REFERENCES))
        if need and not (need == "harmful" and any(map(_is_preference, options.safe))):
            raise ConfigError(f"{who} needs {need} references: give pool '{pool.name}' a '{need}'")
        if (diversity := options.diversity) in SPREAD:
            raise ConfigError(f"{who}: a grid has no diversity {diversity}; use the selector {diversity} instead")
        if not method.needs | method.uses:  # so that no model is fingerprinted, and models share the ranking
            options = with_options(options, model=None, safe=[], harmful=[], utility=[])

        def stage(kind: str, options: Any, method: str = selector.name, **made: Input) -> StageRun:
            return self.stage(kind, options, chosen, method, made, selector.seed)

        roles = {"rank": stage("rank", options)}
        self.data.read_labels(pool)
        if selector.labels not in (0, "all"):
            roles["ask"] = roles["rank"]
            own = self.options("label", "labels", {"labels": pool.labels})
            roles["label"] = stage("label", own, ranking=roles["ask"].output())
            roles["rank"] = stage("rank", options, labels=roles["label"].output("labels.json"))
        own = self.options("select", "fractions", {"top": chosen.selector.fractions[0], "fill": selector.fill})
        title = f"{selector.name} {chosen.selector.fractions[0]:.15g}"
        roles["select"] = stage("select", own, title, ranking=roles["rank"].output())
        return roles

    @_once_per("model", "pool", "selector", "defense")
    def aligned(self, chosen: _Choice) -> StageRun:
        """The stage that aligns."""
        select = self.selected(chosen)["select"]
        defense, pool, who = chosen.defense, chosen.pool, f"defense '{chosen.defense.name}'"
        given = {"model": chosen.model.model, "defense": defense.defense}
        options = self.options("align", who, defense.options, given, model=chosen.model)
        strategy = self.method(DEFENSES, options.defense)
        if "align" not in strategy.stages:
            raise CompatibilityError(
                f"{who}: is not an alignment-stage defense; list it under post_alignment_defenses"
            )
        if "harmful" not in strategy.needs:
            options = with_options(options, harmful=None)  # not read: it identifies nothing
        elif options.harmful is None and not _is_preference(pool.pool):
            hint = f"; those of pool '{pool.name}' are for selectors" if pool.harmful else ""
            hint = ", such as world:answers" if pool.pool == WORLD else hint
            raise ConfigError(f"{who} needs harmful rows: give 'harmful' under align{hint}")
        made = {"data": select.output(SELECTED)}
        if chosen.selector.weighted:
            made["weights"] = select.output(WEIGHTS)
        return self.stage("align", options, chosen, defense.name, made)

    @_once_per("model", "pool", "selector", "defense", "attack", "post_alignment_defense", "task")
    def attacked(self, chosen: _Choice) -> StageRun:
        """The stage that attacks, under a fine-tuning-stage defense where there is one."""
        attack, defense, task = chosen.attack, chosen.post_alignment_defense, chosen.task
        who = f"post_alignment_defenses, '{defense.name}'"
        defended = defense.method["name"] in DEFENSES.names()
        given = {
            "task": task.train,
            "kind": attack.kind,
            "poison_ratio": attack.poison_ratio,
            "samples": attack.samples,
        }
        layers = (attack.options, {"defense": defense.method} | defense.options if defended else {}, given)
        where = f"attack '{attack.name}', task '{task.name}'"
        options = self.options("attack", where, *layers, model=chosen.model)
        if need := _lacking(options, self.method(ATTACKS, options.kind).needs):
            remedy = f"give task '{task.name}' a 'train'" if need == "task" else "give 'harmful' under attack"
            raise ConfigError(f"attack '{attack.name}' needs {need} rows: {remedy}")
        strategy = self.method(DEFENSES, options.defense)
        if "finetune" not in strategy.stages:
            raise CompatibilityError(f"{who}: is not a fine-tuning-stage defense; list it under defenses")
        made = {"model": self.aligned(chosen).output()}
        if "safe" not in strategy.needs:
            options = with_options(options, safe=None)  # not read: it identifies nothing
        if _lacking(options, strategy.needs & {"safe"}):
            made["safe"] = self.selected(chosen)["select"].output(SELECTED)  # the defender's own rows
        method = f"{attack.name}, {defense.name}" if defended else attack.name
        return self.stage("attack", options, chosen, method, made)

    @_once_per("model", "pool", "selector", "defense", "attack", "post_alignment_defense", "task")
    def repaired(self, chosen: _Choice) -> StageRun:
        """The stage that repairs."""
        repair, who = chosen.post_alignment_defense, f"post_alignment_defenses, '{chosen.post_alignment_defense.name}'"
        options = self.options("repair", who, repair.options, {"method": repair.method}, model=chosen.model)
        needs = self.method(REPAIRS, options.method).needs
        options = with_options(options, **dict.fromkeys({"harmful", "safe"} - needs))  # not read
        if _lacking(options, needs & {"harmful"}):
            raise ConfigError(f"{who} needs harmful rows: give 'harmful' under repair")
        made = {"model": self.attacked(chosen).output(), "aligned": self.aligned(chosen).output()}
        if _lacking(options, needs & {"safe"}):
            made["safe"] = self.selected(chosen)["select"].output(SELECTED)
        return self.stage("repair", options, chosen, repair.name, made)

    def evaluated(self, chosen: _Choice, model: Input, *, prompts_only: bool = False) -> StageRun:
        """The stage that evaluates a model."""
        draft, asked, files = self.evaluation(chosen, prompts_only)
        stage = make_stage(self.data.root, draft, {"model": model})
        if stage.name not in self.stages:
            self.stages[stage.name] = replace(stage, verdict_files=files)
            self._asking[model.content, asked].append(stage.name)
        return self.stages[stage.name]

    def share_answers(self) -> None:
        """Has judges of the same answers take them from one evaluation, one that has them already if there is any."""
        for names in self._asking.values():
            first, *others = names
            if others:
                first = next((name for name in names if has_answers(self.stages[name], self.stages)), first)
            for stage in [self.stages[name] for name in names if name != first]:
                self.stages[stage.name] = replace(stage, parents=(*stage.parents, first), like=first)

    @_once_per("model", "pool", "task", "judge")
    def evaluation(self, chosen: _Choice, prompts_only: bool) -> tuple[Draft, str, dict[str, str]]:
        """The stages that evaluate, without a model; a hash of what they ask; and `StageRun.verdict_files`."""
        judge, task = chosen.judge, chosen.task
        given = {"judge": judge.judge, "task": task.test} | {name: getattr(judge, name) for name in REFERENCES}
        where, layers = f"judge '{judge.name}', task '{task.name}'", (task.options, judge.options, given)
        options = self.options("evaluate", where, *layers, model=chosen.model)
        if need := _lacking(options, self.method(JUDGES, options.judge).needs):
            raise ConfigError(f"judge '{judge.name}' needs {need} references: give it a '{need}'")
        if options.prompts == _MISSING:
            raise ConfigError("evaluate: 'prompts' must name the harmful prompts that are asked")
        if prompts_only:
            options = with_options(options, **dict.fromkeys(NOT_ALONG_ATTACKS))
        asked = {name: value for name, value in identifying(as_json(options)).items() if name not in EVALUATE.final}
        judging = f"judging {options.judge!r} {options.second_judge!r} {options.task and options.task_type!r}"
        files = self.once(judging, lambda: verdict_files(judges_of(options), grader_of(options)))
        return self.draft("evaluate", options, chosen, judge.name, ["model"]), sha256_json(asked), files


def _labels(chosen: _Choice) -> dict[str, Any]:
    """Options of the ranking that follow from the ``labels`` of the selector."""
    selector, pool = chosen.selector, chosen.pool
    if selector.labels == 0:
        return {}
    if pool.labels is None:
        raise ConfigError(
            f"selector '{selector.name}' needs labels, and pool '{pool.name}' has none: give the pool 'labels', or "
            "list the selector's 'pools'"
        )
    if selector.labels == "all":
        return {"labels": pool.labels}
    if selector.labels < 2 or not SELECTORS.get(selector.selector["name"]).suggests_labels:
        raise ConfigError(
            f"selector '{selector.name}', labels {selector.labels}: must be all, or at least 2 with a selector that "
            "asks for labels"
        )
    return {"to_label": selector.labels}


def _lacking(options: Any, needs: Iterable[str]) -> str | None:
    """The first input that a method needs and the options do not name, if there is one."""
    return next((need for need in sorted(needs) if not getattr(options, need, None)), None)


def _is_preference(spec: str | None) -> bool:
    """Whether rows have a rejected answer beside the chosen one; assumed of rows that are not on this machine."""
    if spec is None or spec.startswith(WORLD):
        return False
    if not os.path.exists(os.path.expanduser(spec)):
        return True
    return {"chosen", "rejected"} <= set(first_row(open_source(spec, name="rows")))
