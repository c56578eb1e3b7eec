"""A grid becomes a graph: cells, and the stages that they need, each of them once.

    rank [-> label -> rank] -> select -> align -> attack -> repair -> evaluate

Every model is evaluated where cells ask for it: aligned, at the attack's snapshots, attacked, and repaired.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pharmacist.attacks import ATTACKS
from pharmacist.core.config import from_mapping
from pharmacist.core.env import rank
from pharmacist.core.errors import CompatibilityError, ConfigError
from pharmacist.core.hashing import sha256_json
from pharmacist.core.options import RunOptions, as_json, identifying
from pharmacist.core.registry import Registry, closest
from pharmacist.data.formats import open_source
from pharmacist.defenses import DEFENSES
from pharmacist.evaluation.judges import JUDGES
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.bench.data import WORLD, Data, with_references
from pharmacist.pipeline.bench.options import (
    AttackEntry,
    BenchOptions,
    DefenseEntry,
    JudgeEntry,
    LaterEntry,
    ModelEntry,
    PoolEntry,
    SelectorEntry,
    TaskEntry,
)
from pharmacist.pipeline.bench.stages import EVERYWHERE, KINDS, Input, Stage, is_finished, make_stage, with_options
from pharmacist.pipeline.select import WEIGHTS
from pharmacist.pipeline.stages.curate import SPREAD
from pharmacist.pipeline.stages.evaluate import EVALUATE
from pharmacist.repairs import REPAIRS
from pharmacist.selectors import SELECTORS


Entry = TypeVar("Entry")
T = TypeVar("T")
NONE = "none"
SEP = " / "


class Point(NamedTuple):
    """A model along the attack that is evaluated: after so many steps, -1 for the attack's end, by which stage."""

    step: int
    stage: str


@dataclass(frozen=True)
class Cell:
    """One choice on every axis, and the names of the stages that it needs.

    Attributes:
        axes: Axis -> name of the choice, in the order of `results.AXES`, and the attack's strength.
        seed: Of all its stages.
        asked: Where the ranking has labels that its selector asked for: the stages that rank without them and label.
        rank: Stage that ranks the pool; likewise the following ones.
        before: Evaluation of the aligned model.
        curve: Evaluations along the attack, where there are snapshots.
        repair: None where there is none.
        after: Evaluation at the end.
    """

    axes: Mapping[str, Any]
    seed: int
    asked: tuple[str, ...]
    rank: str
    select: str
    align: str
    before: str
    attack: str
    curve: tuple[Point, ...]
    repair: str | None
    after: str

    @property
    def name(self) -> str:
        """The choices in words."""
        return _words(self.axes)

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages whose results it is made of."""
        own = (*self.asked, self.rank, self.select, self.align, self.before, self.attack, self.repair, self.after)
        return tuple(dict.fromkeys([*(name for name in own if name), *(point.stage for point in self.curve)]))

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern fits a part of the name, which ends with the seed."""
        return fnmatchcase(f"{self.name}{SEP}seed {self.seed}", f"*{pattern}*")


def _words(axes: Mapping[str, Any]) -> str:
    names = [axes["model"], axes["pool"], f"{axes['selector']} {axes['fraction']:g}", axes["defense"]]
    return SEP.join([*names, axes["attack"], axes["later_defense"], axes["task"], axes["judge"]])


@dataclass
class Plan:
    """The graph.

    Attributes:
        stages: By name, each after those that it needs.
        cells: In the grid's order.
        axes: Axis -> names of its choices, in the grid's order.
        data: What stages read.
    """

    stages: dict[str, Stage]
    cells: list[Cell]
    axes: dict[str, list[Any]]
    data: Data

    def write(self) -> None:
        """Writes the rows of the made-up world that stages read, under a launcher from its first process."""
        if rank() == 0:
            self.data.write()
        barrier()

    def waiting(self, pattern: str | None = None) -> list[Stage]:
        """Stages that are still to be run, each after those that it needs.

        A stage is not only run where its result is missing, but also where one that it needs is run.

        Args:
            pattern: Only those that cells with such names need; all by default.

        Raises:
            ConfigError: No cell has such a name.
            DataError: A result was written by a newer version.
        """
        cells = [cell for cell in self.cells if pattern is None or cell.matches(pattern)]
        if not cells:
            raise ConfigError(f"--only '{pattern}': no cell has such a name, such as '{self.cells[0].name}'")
        needed = {name for cell in cells for name in cell.stages}
        waiting: dict[str, Stage] = {}
        for name, stage in self.stages.items():
            if name in needed and (not waiting.keys().isdisjoint(stage.needs) or not is_finished(stage, self.stages)):
                waiting[name] = stage
        return list(waiting.values())


@dataclass
class Axes:
    """The grid's axes, read and checked."""

    models: list[ModelEntry]
    pools: list[PoolEntry]
    selectors: list[SelectorEntry]
    defenses: list[DefenseEntry]
    attacks: list[AttackEntry]
    later_defenses: list[LaterEntry]
    tasks: list[TaskEntry]
    judges: list[JudgeEntry]

    @classmethod
    def read(cls, grid: BenchOptions) -> "Axes":
        """Reads all entries.

        Raises:
            ConfigError: An unknown key, method or name; two entries of an axis with one name.
        """
        axes = cls(
            models=_entries("models", grid.models, ModelEntry, "model"),
            pools=[with_references(pool) for pool in _entries("pools", grid.pools, PoolEntry, "pool")],
            selectors=_entries("selectors", grid.selectors, SelectorEntry, "selector"),
            defenses=_entries("defenses", grid.defenses, DefenseEntry, "defense"),
            attacks=list(_swept(_entries("attacks", grid.attacks, AttackEntry, "kind"))),
            later_defenses=_entries("later_defenses", grid.later_defenses, LaterEntry, "method"),
            tasks=_entries("tasks", grid.tasks, TaskEntry, "train"),
            judges=_entries("judges", grid.judges, JudgeEntry, "judge"),
        )
        for selector in axes.selectors:
            _check_names(f"selector '{selector.name}'", "pool", selector.pools, axes.pools)
        for defense in axes.defenses:
            _check_names(f"defense '{defense.name}'", "selector", defense.selectors, axes.selectors)
        return axes

    def names(self) -> dict[str, list[Any]]:
        """Axis -> names, in order."""
        singular = {"later_defenses": "later_defense"}
        return {
            singular.get(item.name, item.name.removesuffix("s")): [one.name for one in getattr(self, item.name)]
            for item in fields(self)
        }


def _entries(axis: str, given: Sequence[Any], kind: type[Entry], short: str) -> list[Entry]:
    """The entries of an axis; a text stands for an entry with the option `short`."""
    found: list[Any] = []
    _check_any(axis, given)
    for number, value in enumerate(given, 1):
        where = f"{axis}, entry {number}"
        if not isinstance(value, str | Mapping):
            raise ConfigError(f"{where}: needs a name, or keys and values of its own, not {value!r}")
        entry: Any = from_mapping(kind, {short: value} if isinstance(value, str) else value, where=where)
        if not entry.name:
            chosen = getattr(entry, short)
            entry.name = chosen["name"] if isinstance(chosen, Mapping) else _short(chosen or NONE)
        if SEP in entry.name:
            raise ConfigError(f"{where}: the name '{entry.name}' must not hold '{SEP}'")
        if any(entry.name == other.name for other in found):
            raise ConfigError(f"{where}: another one is called '{entry.name}' too; give it a name of its own")
        found.append(entry)
    return found


def _check_names(where: str, axis: str, names: Sequence[str], entries: Sequence[Any]) -> None:
    """Refuses an entry that is for something which the grid does not have."""
    known = [entry.name for entry in entries]
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: there is no {axis} '{name}'{closest(name, known)}")


def _check_any(axis: str, given: Sequence[Any]) -> None:
    if not given:
        raise ConfigError(f"{axis}: must name at least one; docs/how-to/bench.md has an example")


def _short(place: str) -> str:
    """The name of a file without suffixes, or of a model."""
    return Path(place).name.partition(".jsonl")[0] if not Path(place).is_dir() else Path(place).resolve().name


def _swept(attacks: Sequence[AttackEntry]) -> Iterator[AttackEntry]:
    """Attacks with one strength each."""
    for attack in attacks:
        sweeps = {
            name: value for name in ("poison_ratio", "samples") if isinstance(value := getattr(attack, name), list)
        }
        for name, values in sweeps.items():
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"attack '{attack.name}': {name} {values}: needs values that differ")
        for chosen in itertools.product(*sweeps.values()):
            setting = dict(zip(sweeps, chosen, strict=True))
            label = " ".join([attack.name, *(f"{name} {value:g}" for name, value in setting.items())])
            yield replace(attack, name=label, **setting)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values of both, those of the second over those of the first; mappings in them likewise.

    >>> merged({"train": {"max_steps": 1}}, {"train": {"seed": 2}})
    {'train': {'max_steps': 1, 'seed': 2}}
    """
    found = dict(first)
    for key, value in second.items():
        own = found.get(key)
        found[key] = merged(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return found


@dataclass
class _Expansion:
    """A grid while it becomes a graph."""

    grid: BenchOptions
    data: Data
    stages: dict[str, Stage] = field(default_factory=dict)
    _templates: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    """What is asked of a model -> the first stage that does."""
    _built: dict[tuple[str, str], Any] = field(default_factory=dict)

    def built(self, registry: Registry[T], choice: Mapping[str, Any]) -> T:
        """A method, for what it says about itself."""
        key = registry.kind, repr(choice)
        if key not in self._built:
            self._built[key] = registry.build_from(choice)
        method: T = self._built[key]
        return method

    def template(self, kind: str, label: tuple[str, ...], where: str, *layers: Mapping[str, Any]) -> Any:
        """Options of a kind of stage without inputs and seed, checked once.

        Args:
            kind: Key of `KINDS`.
            label: Names of the entries that decide it.
            where: For messages.
            layers: Options over those of the grid's section, from user and axes; later ones win.
        """
        if (kind, *label) not in self._templates:
            known = KINDS[kind]
            values: dict[str, Any] = dict(getattr(self.grid, known.name, {}))
            for layer in layers:
                values = merged(values, layer)
            grid = self.grid
            values |= {
                "output_dir": "-",
                "device": grid.device,
                "dtype": grid.dtype,
                "quiet": grid.quiet,
                "checkpoint_seconds": grid.checkpoint_seconds,
            }
            self._templates[kind, *label] = from_mapping(known.options, values, where=where)
        return self._templates[kind, *label]

    def stage(
        self,
        kind: str,
        template: RunOptions,
        seed: int,
        pool: PoolEntry,
        method: str,
        *,
        made: Mapping[str, tuple[Stage, str]],
        own_seed: int | None = None,
        **given: Any,
    ) -> Stage:
        """The stage with these options and inputs; the one that is there already if it is the same.

        Args:
            kind: Key of `KINDS`.
            template: From `template`.
            seed: Of the cell.
            pool: Of the cell.
            method: For tables.
            made: Option -> the stage that makes what it names, and the place in that one's folder.
            own_seed: Of the stage, where it is not the cell's.
            **given: Further options.
        """
        options, known = with_options(template, seed=seed if own_seed is None else own_seed, **given), KINDS[kind]
        inputs: dict[str, Input | list[Input]] = {}
        for name, (parent, place) in made.items():
            inputs[name] = Input(str(parent.folder / place), f"{parent.key}/{place}")
        for name in known.files:
            spec, where = getattr(options, name), f"{known.name}: {name}"
            if name in made or not spec:
                continue
            if isinstance(spec, list):
                inputs[name] = [self.data.rows(one, where, seed, pool) for one in spec]
            else:
                inputs[name] = self.data.rows(spec, where, seed, pool)
        for name in known.models:
            if name not in made and getattr(options, name):
                inputs[name] = self.data.model(getattr(options, name), f"{known.name}: {name}")
        parents = tuple(dict.fromkeys(parent.name for parent, _ in made.values()))
        stage = make_stage(self.data.root, kind, options, inputs, parents, method)
        return self.stages.setdefault(stage.name, stage)


def expand(grid: BenchOptions, root: Path) -> Plan:
    """The graph of a grid, with everything checked that can be checked before any work.

    Args:
        grid: The options.
        root: Of the benchmark.

    Raises:
        PharmacistError: Something in the grid cannot be.
    """
    _check_any("seeds", grid.seeds)
    _check_sections(grid)
    axes, expansion = Axes.read(grid), _Expansion(grid, Data(root))
    cells = []
    for seed, model, pool, selector in itertools.product(grid.seeds, axes.models, axes.pools, axes.selectors):
        if pool.name not in (selector.pools or [pool.name]):
            continue
        for fraction in _fractions(selector, grid):
            rest = itertools.product(axes.defenses, axes.attacks, axes.later_defenses, axes.tasks, axes.judges)
            for defense, attack, later, task, judge in rest:
                if selector.name not in (defense.selectors or [selector.name]):
                    continue
                chosen = _Choice(seed, model, pool, selector, fraction, defense, attack, later, task, judge)
                cells.append(_cell(expansion, chosen))
    return Plan(expansion.stages, cells, axes.names() | {"seed": list(grid.seeds)}, expansion.data)


@dataclass(frozen=True)
class _Choice:
    """One entry of every axis."""

    seed: int
    model: ModelEntry
    pool: PoolEntry
    selector: SelectorEntry
    fraction: float
    defense: DefenseEntry
    attack: AttackEntry
    later: LaterEntry
    task: TaskEntry
    judge: JudgeEntry

    @property
    def axes(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "pool": self.pool.name,
            "selector": self.selector.name,
            "fraction": self.fraction,
            "defense": self.defense.name,
            "attack": self.attack.name,
            "poison_ratio": self.attack.poison_ratio,
            "samples": self.attack.samples,
            "later_defense": self.later.name,
            "task": self.task.name,
            "judge": self.judge.name,
        }


def _fractions(selector: SelectorEntry, grid: BenchOptions) -> list[float]:
    name, full = selector.name, SELECTORS.get(selector.selector["name"]).keeps_all
    fractions = selector.fractions or ([1.0] if full else grid.fractions)
    if full and fractions != [1.0]:
        raise ConfigError(f"selector '{name}': keeps the full pool; leave its fractions out")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ConfigError(f"selector '{name}': fraction {fraction:g} must lie in (0, 1]")
    if not fractions or len(set(fractions)) < len(fractions):
        raise ConfigError(f"selector '{name}': fractions {fractions}: needs values that differ")
    return fractions


def _cell(expansion: _Expansion, chosen: _Choice) -> Cell:
    select, rank, asked = _selected(expansion, chosen)
    align = _aligned(expansion, chosen, select)
    attack = _attacked(expansion, chosen, align, select)
    repair = _repaired(expansion, chosen, attack, align, select)

    def evaluate(parent: Stage, place: str = "", *, prompts_only: bool = False) -> str:
        return _evaluated(expansion, chosen, parent, place, prompts_only).name

    before, last = evaluate(align), repair or attack
    curve: list[Point] = []
    if attack.options.snapshots:
        steps = sorted(set(attack.options.snapshots))
        between = [Point(s, evaluate(attack, f"snapshots/step-{s}", prompts_only=True)) for s in steps]
        curve = [Point(0, before), *between, Point(-1, evaluate(attack))]
    return Cell(
        axes=chosen.axes,
        seed=chosen.seed,
        asked=asked,
        rank=rank.name,
        select=select.name,
        align=align.name,
        before=before,
        attack=attack.name,
        curve=tuple(curve),
        repair=repair.name if repair else None,
        after=evaluate(last),
    )


def _loading(model: ModelEntry) -> dict[str, Any]:
    return {"template": model.template, "trust_remote_code": model.trust_remote_code}


def _selected(expansion: _Expansion, chosen: _Choice) -> tuple[Stage, Stage, tuple[str, ...]]:
    """The stages that select and rank, and the names of those that ask for labels."""
    pool, selector, model = chosen.pool, chosen.selector, chosen.model
    rank_options = expansion.template(
        "rank",
        (pool.name, selector.name, model.name),
        f"selector '{selector.name}', pool '{pool.name}'",
        selector.options,
        _loading(model),
        {
            "pool": pool.pool,
            "safe": pool.safe,
            "harmful": pool.harmful,
            "utility": pool.utility,
            "selector": selector.selector,
            "model": model.reader or model.model,
            "max_length": model.max_length,
            **_labels(chosen),
        },
    )
    _check_references(expansion, chosen, rank_options)
    if rank_options.diversity in SPREAD:
        raise ConfigError(
            f"selector '{selector.name}': diversity {rank_options.diversity} is for curate alone; in a grid, "
            f"take the selector {rank_options.diversity}"
        )
    method = expansion.built(SELECTORS, rank_options.selector)
    if not method.needs | method.uses:  # so that no model is fingerprinted, and models share the ranking
        rank_options = with_options(rank_options, model=None, safe=[], harmful=[], utility=[])
    rank = expansion.stage("rank", rank_options, chosen.seed, pool, selector.name, made={}, own_seed=selector.seed)
    asked: tuple[str, ...] = ()
    if selector.labels not in (0, "all"):
        label_options = expansion.template(
            "label", (pool.name, f"{selector.labels}"), "labels", {"ranking": "-", "labels": pool.labels}
        )
        made = {"ranking": (rank, "")}
        label = expansion.stage(
            "label", label_options, chosen.seed, pool, selector.name, made=made, own_seed=selector.seed
        )
        asked = (rank.name, label.name)
        made = {"labels": (label, "labels.json")}
        rank = expansion.stage(
            "rank", rank_options, chosen.seed, pool, selector.name, made=made, own_seed=selector.seed
        )
    select_options = expansion.template(
        "select",
        (f"{chosen.fraction}", f"{selector.fill}"),
        "fractions",
        {"ranking": "-", "top": chosen.fraction, "fill": selector.fill},
    )
    title = f"{selector.name} {chosen.fraction:g}"
    made = {"ranking": (rank, "")}
    select = expansion.stage("select", select_options, chosen.seed, pool, title, made=made, own_seed=selector.seed)
    return select, rank, asked


def _labels(chosen: _Choice) -> dict[str, Any]:
    """Options of the ranking that follow from the labels that its selector is given."""
    selector, pool = chosen.selector, chosen.pool
    if selector.labels == 0:
        return {}
    if pool.labels is None:
        raise ConfigError(
            f"selector '{selector.name}' is given labels: give pool '{pool.name}' a 'labels', or name the selector's "
            "'pools'"
        )
    if selector.labels == "all":
        return {"labels": pool.labels}
    if selector.labels < 2 or not SELECTORS.get(selector.selector["name"]).asks:
        raise ConfigError(
            f"selector '{selector.name}', labels {selector.labels}: only a selector that asks for labels has some, "
            "2 or more"
        )
    return {"to_label": selector.labels}


def _check_references(expansion: _Expansion, chosen: _Choice, options: Any) -> None:
    selector = expansion.built(SELECTORS, options.selector)
    if chosen.selector.weighted and not selector.weighs:
        raise ConfigError(f"selector '{chosen.selector.name}': has no weights; leave 'weighted' out")
    for need in sorted(selector.needs & {"safe", "harmful", "utility"}):
        from_pairs = need == "harmful" and any(map(_is_preference, options.safe))
        if not getattr(options, need) and not from_pairs:
            raise ConfigError(
                f"selector '{chosen.selector.name}' needs {need} references: give pool '{chosen.pool.name}' a '{need}'"
            )


def _is_preference(spec: str | None) -> bool:
    """Whether rows bring a rejected answer beside the chosen one; of rows that are not here, that is believed."""
    if spec is None or spec.startswith(WORLD):
        return False
    if not Path(spec).expanduser().exists():
        return True
    first = next(open_source(spec, name="rows").scan(), None)
    return first is not None and {"chosen", "rejected"} <= set(first.value or ())


def _aligned(expansion: _Expansion, chosen: _Choice, select: Stage) -> Stage:
    defense, model = chosen.defense, chosen.model
    options = expansion.template(
        "align",
        (defense.name, model.name),
        f"defense '{defense.name}'",
        {"max_length": model.max_length},
        defense.options,
        _loading(model),
        {"data": "-", "model": model.model, "defense": defense.defense},
    )
    strategy = expansion.built(DEFENSES, options.defense)
    if "align" not in strategy.stages:
        raise CompatibilityError(f"defense '{defense.name}': is not for alignment; name it under later_defenses")
    if "harmful" not in strategy.needs:
        options = with_options(options, harmful=None)  # not read: it identifies nothing
    elif options.harmful is None and not _is_preference(chosen.pool.pool):
        raise ConfigError(
            f"defense '{defense.name}' needs harmful rows, which pool '{chosen.pool.name}' does not bring: give "
            f"'harmful' under align{', such as world:answers' if chosen.pool.pool == WORLD else ''}"
        )
    made = {"data": (select, "selected.jsonl")}
    if chosen.selector.weighted:
        made["weights"] = (select, WEIGHTS)
    return expansion.stage("align", options, chosen.seed, chosen.pool, defense.name, made=made)


def _attacked(expansion: _Expansion, chosen: _Choice, align: Stage, select: Stage) -> Stage:
    attack, later, task, model = chosen.attack, chosen.later, chosen.task, chosen.model
    during = later.method if later.method["name"] in DEFENSES.names() else {"name": "sft"}
    options = expansion.template(
        "attack",
        (attack.name, later.name, task.name, model.name),
        f"attack '{attack.name}', task '{task.name}'",
        attack.options,
        later.options if during is later.method else {},
        _loading(model),
        {
            "model": "-",
            "task": task.train,
            "kind": attack.kind,
            "poison_ratio": attack.poison_ratio,
            "samples": attack.samples,
            "defense": during,
            "max_length": model.max_length,
        },
    )
    for need in sorted(expansion.built(ATTACKS, options.kind).needs):
        if getattr(options, need) is None:
            place = f"give task '{task.name}' a 'train'" if need == "task" else "give 'harmful' under attack"
            raise ConfigError(f"attack '{attack.name}' needs {need} rows: {place}")
    made = {"model": (align, "")}
    strategy = expansion.built(DEFENSES, options.defense)
    if "finetune" not in strategy.stages:
        raise CompatibilityError(f"later defense '{later.name}': is not for fine-tuning; name it under defenses")
    if "safe" in strategy.needs and options.safe is None:
        made["safe"] = (select, "selected.jsonl")  # the defender's own rows
    method = attack.name if during is not later.method else f"{attack.name}, {later.name}"
    return expansion.stage("attack", options, chosen.seed, chosen.pool, method, made=made)


def _repaired(expansion: _Expansion, chosen: _Choice, attack: Stage, align: Stage, select: Stage) -> Stage | None:
    later, model = chosen.later, chosen.model
    if later.method["name"] not in REPAIRS.names():
        return None
    options = expansion.template(
        "repair",
        (later.name, model.name),
        f"later defense '{later.name}'",
        later.options,
        _loading(model),
        {"model": "-", "aligned": "-", "method": later.method, "max_length": model.max_length},
    )
    made = {"model": (attack, ""), "aligned": (align, "")}
    needs = expansion.built(REPAIRS, options.method).needs
    if "safe" in needs and options.safe is None:
        made["safe"] = (select, "selected.jsonl")
    if "harmful" in needs and options.harmful is None:
        raise ConfigError(f"later defense '{later.name}' needs harmful rows: give 'harmful' under repair")
    return expansion.stage("repair", options, chosen.seed, chosen.pool, later.name, made=made)


def _evaluated(expansion: _Expansion, chosen: _Choice, parent: Stage, place: str, prompts_only: bool) -> Stage:
    judge, task = chosen.judge, chosen.task
    options = expansion.template(
        "evaluate",
        (judge.name, task.name, chosen.model.name),
        f"judge '{judge.name}', task '{task.name}'",
        task.options,
        judge.options,
        _loading(chosen.model),
        {
            "model": "-",
            "judge": judge.judge,
            "task": task.test,
            "safe": judge.safe,
            "harmful": judge.harmful,
            "utility": judge.utility,
        },
    )
    for need in sorted(expansion.built(JUDGES, options.judge).needs):
        if not getattr(options, need, None):
            raise ConfigError(f"judge '{judge.name}' needs {need} references: give it a '{need}'")
    if options.prompts is None:
        raise ConfigError("evaluate: 'prompts' must name the harmful prompts that are asked")
    if prompts_only:
        options = with_options(options, benign_prompts=None, task=None)
    stage = expansion.stage("evaluate", options, chosen.seed, chosen.pool, judge.name, made={"model": (parent, place)})
    asked = {name: value for name, value in identifying(as_json(options)).items() if name not in EVALUATE.final}
    first = expansion.answers.setdefault(sha256_json([parent.key, place, asked]), stage.name)
    if first not in (stage.name, stage.like):
        stage = replace(stage, parents=(*stage.parents, first), like=first)
        expansion.stages[stage.name] = stage
    return stage


def _check_sections(grid: BenchOptions) -> None:
    """Refuses keys that no section has, or that axes decide."""
    for kind in KINDS.values():
        section = getattr(grid, kind.name, None)
        if section is None:
            continue
        for key in section:
            if key in kind.by_axes | EVERYWHERE:
                raise ConfigError(f"{kind.name}: '{key}' is decided by the grid; leave it out here")
        placeholders = {"output_dir": "-", "model": "-"} | {
            name: "-" for name in ("pool", "data", "prompts") if name in {item.name for item in fields(kind.options)}
        }
        from_mapping(kind.options, placeholders | section, where=kind.name)
