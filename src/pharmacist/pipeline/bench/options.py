"""Options of a grid: a list of entries per axis, and sections with options that apply to all cells."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.errors import ConfigError
from pharmacist.core.options import LengthOptions, RunOptions
from pharmacist.core.typed import AtLeast1, Share
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class Entry:
    """One choice on an axis."""

    name: str = ""
    """Name in the results; by default the name of the method, or the last part of the path. Lists of poison_ratio or
    samples append their values.
    """


@dataclass(kw_only=True)
class EntryWithOptions(Entry):
    """A choice that may set options of the command that uses it."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options of curate for a selector, of align for a defense, of attack for an attack or a fine-tuning-stage
    defense, of repair for a repair, of evaluate for a task or judge."""


@dataclass(kw_only=True)
class ModelEntry(Entry, LengthOptions):
    """A model, and how all stages prompt it."""

    model: str
    """Local folder or Hub id; world is the tiny model of the synthetic world."""
    reader: str | None = None
    """Model that reads the pool for the ranking; the model itself by default."""


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
    """A pool and the references by which it is ranked; by default, a synthetic pool has the references of its
    world.
    """

    pool: str
    """Rows to rank; world generates a synthetic pool."""
    labels: str | None = None
    """Human labels of its rows (labels.json), for selectors that ask for labels and to measure rankings."""
    rows: AtLeast1 = 600
    """Number of rows of a synthetic pool."""
    mislabel: float = 0.05
    """Share of rows of a synthetic pool whose answers do what is forbidden."""
    kind: Literal["planted", "clean"] = "planted"
    """planted: a synthetic pool with known faults. clean: without faults; its refusals differ only in strength."""
    seed: int | None = None
    """Seed of the synthetic pool for all seeds of the grid; by default each seed makes another pool."""


@dataclass(kw_only=True)
class SelectorEntry(EntryWithOptions):
    """A selector."""

    selector: dict[str, Any] = method("pharmacist", "pharmacist.selectors:SELECTORS")
    """How rows are ranked."""
    fractions: list[Share] = field(default_factory=list)
    """Shares of the pool to keep."""
    seed: int | None = None
    """Seed of one ranking for all seeds of the grid; by default each seed makes another ranking."""
    fill: bool = True
    """Fill the fraction with rows whose reason speaks against them if there are too few others, so that all selections
    have the same size."""
    weighted: bool = False
    """Train with the selector's row weights, if it has any, and not only on its selection."""
    labels: int | Literal["all"] = 0
    """Rank again with the pool's labels of this many rows, those that the selector suggests. all: of every row, so
    that no row labelled bad is selected; with the selector random this is an oracle."""
    pools: list[str] = field(default_factory=list)
    """Names of the pools that the selector is combined with; all by default."""


@dataclass(kw_only=True)
class DefenseEntry(EntryWithOptions):
    """An alignment-stage defense."""

    defense: dict[str, Any] = method("sft", "pharmacist.defenses:DEFENSES")
    """How the model is aligned."""
    selectors: list[str] = field(default_factory=list)
    """Names of the selectors that the defense is combined with; all by default."""


@dataclass(kw_only=True)
class AttackEntry(EntryWithOptions):
    """An attack, or several of different strength."""

    kind: dict[str, Any] = method("mix", "pharmacist.attacks:ATTACKS")
    """How the attack set is built."""
    poison_ratio: float | list[float] = 0.1
    """Share of harmful rows in the attack set."""
    samples: int | list[int] = 1000
    """Number of rows in the attack set."""


@dataclass(kw_only=True)
class PostAlignmentDefenseEntry(EntryWithOptions):
    """A fine-tuning-stage defense or a repair."""

    method: dict[str, Any] = method("none", "pharmacist.pipeline.bench.grid:DEFENSES_AND_REPAIRS")
    """How safety is preserved during fine-tuning or restored after it."""


@dataclass(kw_only=True)
class TaskEntry(EntryWithOptions):
    """A fine-tuning task."""

    train: str | None = None
    """Benign rows of the user's task, or the name of a public one."""
    test: str | None = None
    """Test rows; without them, no accuracy is measured."""


@dataclass(kw_only=True)
class JudgeEntry(EntryWithOptions, EntryWithReferences):
    """A judge and, if it is trained, its references."""

    judge: dict[str, Any] = method("keyword", "pharmacist.evaluation.judges:JUDGES")
    """The judge that decides whether an answer is harmful."""


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
"""Axis -> class of its entries, and the key that a string instead of an entry sets."""


@dataclass(kw_only=True)
class BenchOptions(RunOptions):
    """Run a grid of selectors, defenses and attacks; stages that cells share run once."""

    models: list[Any] = field(default_factory=list)
    """Models: entries of name, model (folder, Hub id or world), reader, template, max_length, trust_remote_code."""
    pools: list[Any] = field(default_factory=list)
    """Pools: entries of name, pool (or world with rows, mislabel, kind, seed), safe, harmful, utility, labels."""
    selectors: list[Any] = field(default_factory=lambda: ["full", "random", "pharmacist"])
    """Selectors: names of methods, or entries of name, selector, fractions, seed, fill, weighted, labels, pools,
    options."""
    fractions: list[Share] = field(default_factory=lambda: [0.3])
    """Shares of the pool to keep, for selectors whose entry has no fractions; full always keeps all rows."""
    defenses: list[Any] = field(default_factory=lambda: ["sft"])
    """Alignment-stage defenses: names of methods, or entries of name, defense, selectors, options."""
    attacks: list[Any] = field(default_factory=lambda: ["mix"])
    """Attacks: kinds, or entries of name, kind, poison_ratio, samples, options; each value in a list of poison_ratio
    or samples is an attack."""
    post_alignment_defenses: list[Any] = field(default_factory=lambda: ["none"])
    """Fine-tuning-stage defenses and repairs: names of methods, or entries of name, method, options."""
    tasks: list[Any] = field(default_factory=list)
    """Fine-tuning tasks: entries of name, train, test, options."""
    judges: list[Any] = field(default_factory=lambda: ["keyword"])
    """Judges: names, or entries of name, judge, safe, harmful, utility, options."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, by default --seed alone; each makes another synthetic pool."""
    curate: dict[str, Any] = field(default_factory=dict)
    """Options of curate for every cell."""
    align: dict[str, Any] = field(default_factory=dict)
    """Options of align for every cell."""
    attack: dict[str, Any] = field(default_factory=dict)
    """Options of attack for every cell; the harmful score is also measured at its snapshots."""
    repair: dict[str, Any] = field(default_factory=dict)
    """Options of repair for every cell."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of evaluate for every cell."""
    only: str | None = None
    """Run only the cells whose name and seed match, such as '*pharmacist*seed 0'; a part of the name is enough."""
    dry_run: bool = False
    """Print the graph of stages and its expected cost without running anything."""
    fail_fast: bool = False
    """Stop at the first stage that fails, instead of running the stages that do not need it."""
    executor: dict[str, Any] = method("local", "pharmacist.pipeline.bench.executors:EXECUTORS")
    """Where stages run: one after the other in this process, or in parallel on Ray."""

    NOT_PATHS: ClassVar[frozenset[str]] = RunOptions.NOT_PATHS | {"only", *AXES} - {"models"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed:
            if self.seeds not in ([0], [self.seed]):
                raise ConfigError(f"--seed {self.seed}: the grid names its seeds; change 'seeds' there")
            self.seeds = [self.seed]


BENCH = Stage(
    name="bench",
    options=BenchOptions,
    run="pharmacist.pipeline.bench.command:bench",
    summary="run a grid of selectors, defenses and attacks",
    example="pharmacist bench --config recipes/embedded.yaml --output-dir runs/bench",
    version=1,
    unidentifying=frozenset({"only", "fail_fast", "executor"}),
    # One folder may hold several grids, one after the other: they share stages.
    final=frozenset(item.name for item in fields(BenchOptions)),
    final_inputs=frozenset({"stages", "labels"}),
    reopens=True,
    again="",
)
