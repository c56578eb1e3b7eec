"""The stage `sweep`."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pharmacist.core.config import method, underscored
from pharmacist.core.errors import ConfigError
from pharmacist.core.options import RunOptions
from pharmacist.core.typed import Checked, NotNegative
from pharmacist.pipeline.stage import Stage
from pharmacist.pipeline.stages.attack import AttackOptions
from pharmacist.pipeline.stages.evaluate import EVALUATE


_EVALUATE_DECIDED = {item.name for item in fields(RunOptions)} | {"model", "models", "answers", "compare"}


@dataclass
class GridOptions(Checked):
    """Settings that an attacker would try; every combination is one attack."""

    learning_rate: list[float] = field(default_factory=list)
    """Values for train.learning_rate."""
    epochs: list[float] = field(default_factory=list)
    """Values for train.num_train_epochs."""
    poison_ratio: list[float] = field(default_factory=list)
    """Values for --poison-ratio. The harmful rows of a smaller ratio are a subset of those of a larger one."""
    rank: list[int] = field(default_factory=list)
    """Values for lora.r; lora.alpha changes in proportion, so that alpha / r stays the same."""


@dataclass(kw_only=True)
class SweepOptions(AttackOptions):
    """Attack a model with many settings and report the worst case in which the task is still learned."""

    grid: GridOptions = field(default_factory=GridOptions)
    """Settings that vary; the other options of the attack apply to all attacks."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of evaluate, such as --evaluate.prompts FILE. prompts and task are required; if they are files, no
    attack set may share a prompt with them."""
    accuracy_margin: NotNegative = 2.0
    """An attack can only be the worst case if its fine-tune accuracy is at most this many points below the best."""
    curves: Literal["worst", "all", "none"] = "worst"
    """Attacks for which the harmful score is also measured during the attack, at --snapshots; by default after a
    sixteenth, an eighth, a quarter and half of the steps."""

    executor: dict[str, Any] = method("local", "pharmacist.pipeline.bench.executors:EXECUTORS")
    """Where attacks and evaluations run: one after the other in this process, or in parallel on Ray."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.build_only:
            raise ConfigError("--build-only: a sweep trains; use pharmacist attack to build a set")
        if not any(vars(self.grid).values()):
            raise ConfigError("nothing to sweep over: give --grid.learning_rate, epochs, poison_ratio or rank")
        for name, values in vars(self.grid).items():
            if repeated := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"--grid.{name}: {repeated[0]} is given twice; leave one out")
        if self.grid.epochs and self.train.get("max_steps", -1) > 0:
            raise ConfigError("--grid.epochs: --train.max_steps decides the length already; leave one out")
        if self.grid.rank and self.tuning == "full":
            raise ConfigError("--grid.rank: there is no adapter under --tuning full; leave one out")
        if self.grid.rank and self.adapter == "continue":
            raise ConfigError("--grid.rank: an adapter that is continued keeps its rank; leave one out")
        self.evaluate = underscored(self.evaluate, "--evaluate")
        for name in ("prompts", "task"):
            if not self.evaluate.get(name):
                raise ConfigError(f"--evaluate.{name} must be given; see pharmacist sweep --help")
        for name in sorted(_EVALUATE_DECIDED & self.evaluate.keys()):
            raise ConfigError(f"--evaluate.{name}: the sweep decides it; leave it out")


SWEEP = Stage(
    name="sweep",
    options=SweepOptions,
    summary="attack with many settings and report the worst case",
    example="pharmacist sweep --model runs/aligned --task task.jsonl --harmful attack.jsonl --samples 640 "
    "--grid.learning_rate 1e-4 1e-3 --grid.poison_ratio 0.05 0.1 --evaluate.prompts prompts.jsonl "
    "--evaluate.task task-test.jsonl --evaluate.judge probe --evaluate.safe judge-safe.jsonl "
    "--evaluate.harmful judge-harmful.jsonl --output-dir runs/sweep",
    version=1,
    unidentifying=frozenset({"executor"}),
    final=frozenset({"grid", "accuracy_margin", "curves", "evaluate"}),
    final_inputs=frozenset(f"evaluate.{name}" for name in {*EVALUATE.files, *EVALUATE.final_inputs, "base"}),
    reopens=True,
    read_again=("sweep.json",),
)
