"""Options of a grid: a list of entries per axis, and sections with options that all cells share."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.errors import ConfigError
from pharmacist.core.options import LengthOptions, RunOptions
from pharmacist.core.typed import AtLeast1
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class Entry:
    """One choice on an axis."""

    name: str = ""
    """Name in the results; by default that of the method, or the last part of the path. A sweep of an attack adds its
    values.
    """


@dataclass(kw_only=True)
class EntryWithOptions(Entry):
    """A choice that may set options of the command in which it is used."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options of curate for a selector, of align for a defense, of attack for an attack or a fine-tuning-stage
    defense, of repair for a repair, of evaluate for a task or judge."""


@dataclass(kw_only=True)
class ModelEntry(Entry, LengthOptions):
    """A model, and how all stages ask it."""

    model: str
    """Local folder or hub id; world is the tiny model of the made-up world."""
    reader: str | None = None
    """Model that ranks the pool; the model itself by default."""


@dataclass(kw_only=True)
class EntryWithReferences(Entry):
    """A choice with references."""

    safe: str | None = None
    """Safe references."""
    harmful: str | None = None
    """Harmful references."""
    utility: str | None = None
    """Utility references."""


@dataclass(kw_only=True)
class PoolEntry(EntryWithReferences):
    """A pool and the references by which it is ranked, for a made-up pool by default its world's."""

    pool: str
    """Rows to rank; world makes them up."""
    labels: str | None = None
    """Labels of its rows by people (labels.json): for selectors that ask for labels, and to measure rankings."""
    rows: AtLeast1 = 600
    """Number of rows of a made-up pool."""
    mislabel: float = 0.05
    """Share of its rows whose answers do what is forbidden."""
    kind: Literal["planted", "clean"] = "planted"
    """planted: a made-up pool with known faults. clean: without faults; its refusals differ in force."""
    seed: int | None = None
    """Seed of the made-up pool for all seeds of the grid; by default each makes another one."""


@dataclass(kw_only=True)
class SelectorEntry(EntryWithOptions):
    """A selector."""

    selector: dict[str, Any] = method("pharmacist", "pharmacist.selectors:SELECTORS")
    """How rows are ranked."""
    fractions: list[float] = field(default_factory=list)
    """Shares of the pool to keep."""
    seed: int | None = None
    """Seed of one ranking for all seeds of the grid; by default each makes another one."""
    fill: bool = True
    """Fill the fraction with rows whose reason speaks against them, where too few others are left, so that all arms
    have the same size."""
    weighted: bool = False
    """Train with the selector's weights of the rows, where it has some, and not only on its selection."""
    labels: int | Literal["all"] = 0
    """Rank again with the pool's labels of so many rows, those that the selector asks for. all: of every row, so that
    no row labelled bad is selected; with the selector random this is an oracle."""
    pools: list[str] = field(default_factory=list)
    """Names of the pools that it is combined with; all by default."""


@dataclass(kw_only=True)
class DefenseEntry(EntryWithOptions):
    """An alignment-stage defense."""

    defense: dict[str, Any] = method("sft", "pharmacist.defenses:DEFENSES")
    """How the model is aligned."""
    selectors: list[str] = field(default_factory=list)
    """Names of the selectors that it is combined with; all by default."""


@dataclass(kw_only=True)
class AttackEntry(EntryWithOptions):
    """An attack, or a sweep over its strength."""

    kind: dict[str, Any] = method("mix", "pharmacist.attacks:ATTACKS")
    """What the fine-tuning set is made of."""
    poison_ratio: float | list[float] = 0.1
    """Share of harmful rows in the set."""
    samples: int | list[int] = 1000
    """Rows in the set."""


@dataclass(kw_only=True)
class PostAlignmentDefenseEntry(EntryWithOptions):
    """A fine-tuning-stage defense or a repair."""

    method: dict[str, Any] = method("none", "pharmacist.pipeline.bench.grid:DEFENSES_AND_REPAIRS")
    """How safety is kept during fine-tuning or restored after it."""


@dataclass(kw_only=True)
class TaskEntry(EntryWithOptions):
    """A fine-tuning task."""

    train: str | None = None
    """Benign rows of the user's task, or the name of a public one."""
    test: str | None = None
    """Test rows; without them no accuracy is measured."""


@dataclass(kw_only=True)
class JudgeEntry(EntryWithOptions, EntryWithReferences):
    """A judge and, if it is trained, what it learns from."""

    judge: dict[str, Any] = method("keyword", "pharmacist.evaluation.judges:JUDGES")
    """Who decides whether an answer is harmful."""


AXES: dict[str, tuple[type[Any], str]] = {
    "models": (ModelEntry, "model"),
    "pools": (PoolEntry, "pool"),
    "selectors": (SelectorEntry, "selector"),
    "defenses": (DefenseEntry, "defense"),
    "attacks": (AttackEntry, "kind"),
    "post_alignment_defenses": (PostAlignmentDefenseEntry, "method"),
    "tasks": (TaskEntry, "train"),
    "judges": (JudgeEntry, "judge"),
}
"""Axis -> class of its entries, and the key whose value a text in place of an entry is."""


@dataclass(kw_only=True)
class BenchOptions(RunOptions):
    """Run a grid of selectors, defenses and attacks; stages that cells share run once, finished ones never again."""

    models: list[Any] = field(default_factory=list)
    """Models: entries of name, model (folder, hub id or world), reader, template, max_length, trust_remote_code."""
    pools: list[Any] = field(default_factory=list)
    """Pools: entries of name, pool (or world with rows, mislabel, kind, seed), safe, harmful, utility, labels."""
    selectors: list[Any] = field(default_factory=lambda: ["full", "random", "pharmacist"])
    """Selectors: names of methods, or entries of name, selector, fractions, seed, fill, weighted, labels, pools,
    options."""
    fractions: list[float] = field(default_factory=lambda: [0.3])
    """Shares of the pool to keep, for selectors whose entry has no fractions; full always keeps all."""
    defenses: list[Any] = field(default_factory=lambda: ["sft"])
    """Alignment-stage defenses: names of methods, or entries of name, defense, selectors, options."""
    attacks: list[Any] = field(default_factory=lambda: ["mix"])
    """Attacks: kinds, or entries of name, kind, poison_ratio, samples, options; lists of the two are sweeps."""
    post_alignment_defenses: list[Any] = field(default_factory=lambda: ["none"])
    """Fine-tuning-stage defenses and repairs: names of methods, or entries of name, method, options."""
    tasks: list[Any] = field(default_factory=list)
    """Fine-tuning tasks: entries of name, train, test, options."""
    judges: list[Any] = field(default_factory=lambda: ["keyword"])
    """Judges: names, or entries of name, judge, safe, harmful, utility, options."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, by default --seed alone; each makes another made-up pool."""
    curate: dict[str, Any] = field(default_factory=dict)
    """Options of curate for every cell."""
    align: dict[str, Any] = field(default_factory=dict)
    """Options of align for every cell."""
    attack: dict[str, Any] = field(default_factory=dict)
    """Options of attack for every cell; at its snapshots the harmful score is measured too."""
    repair: dict[str, Any] = field(default_factory=dict)
    """Options of repair for every cell."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of evaluate for every cell."""
    only: str | None = None
    """Only the cells whose name and seed match, as '*pharmacist*seed 0'; a part of the name is enough."""
    dry_run: bool = False
    """Print the graph of stages and its expected cost; nothing runs."""
    fail_fast: bool = False
    """Stop at the first stage that fails, instead of running those that do not need it."""
    executor: dict[str, Any] = method("local", "pharmacist.pipeline.bench.executors:EXECUTORS")
    """Where stages run: in this process one after the other, or on Ray in parallel."""

    NOT_PATHS: ClassVar[frozenset[str]] = RunOptions.NOT_PATHS | {"only", *AXES} - {"models"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "://" in self.output_dir:
            raise ConfigError(f"--output-dir {self.output_dir}: must be a folder; one that all machines share will do")
        if self.seed:
            if self.seeds not in ([0], [self.seed]):
                raise ConfigError(f"--seed {self.seed}: the grid names its seeds; change 'seeds' there")
            self.seeds = [self.seed]
        if repeated := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ConfigError(f"seeds: {repeated[0]} is there twice; leave one out")


BENCH = Stage(
    name="bench",
    options=BenchOptions,
    run="pharmacist.pipeline.bench.command:bench",
    summary="a grid of selectors, defenses and attacks, every stage of it once",
    example="pharmacist bench --config recipes/embedded.yaml --output-dir runs/bench",
    version=1,
    unidentifying=frozenset({"only", "fail_fast", "executor"}),
    # One folder may hold several grids, one after the other: they share stages.
    final=frozenset(item.name for item in fields(BenchOptions)),
    final_inputs=frozenset({"stages"}),
    reopens=True,
    again="",
)
