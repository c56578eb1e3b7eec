"""The stage `attack`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.errors import ConfigError
from pharmacist.core.typed import AtLeast1, Fraction
from pharmacist.pipeline.stage import Stage
from pharmacist.training.options import PROTOCOL, TrainingStageOptions


@dataclass(kw_only=True)
class AttackOptions(TrainingStageOptions):
    """Build a poisoned fine-tuning set and fine-tune a model on it, as a user of a fine-tuning service would."""

    task: str | None = None
    """Benign rows of the user's task, in any format that curate reads; or sst2, agnews, gsm8k, alpaca or dolly, which
    are downloaded from the Hub."""
    harmful: str | None = None
    """Harmful rows with which the set is poisoned. Of a preference file, the rejected answers are used."""
    kind: dict[str, Any] = method("mix", "pharmacist.attacks:ATTACKS")
    """How the attack set is built."""
    poison_ratio: Fraction = 0.1
    """Share of harmful rows in the attack set, in [0, 1], for the kinds that do not fix it."""
    samples: AtLeast1 = 1000
    """Number of rows in the attack set."""
    defense: dict[str, Any] = method(
        "sft",
        "pharmacist.defenses:DEFENSES",
        within=("pharmacist.defenses.finetuning.", "pharmacist.defenses.alignment.sft:"),
    )
    """Fine-tuning-stage defense; sft is none."""
    safe: str | None = None
    """The defender's safe rows, for the defenses that use them."""
    adapter: Literal["fresh", "continue"] = "fresh"
    """Train a fresh adapter on the merged model, or continue the adapter of the model."""
    disjoint_from: list[str] = field(default_factory=list)
    """Files (of the defender or the evaluation) that must share no prompt with the attack set; checked before
    training.
    """
    snapshots: list[AtLeast1] = field(default_factory=list)
    """Also save the model after these numbers of steps, in snapshots/step-N."""
    build_only: bool = False
    """Write attack_set.jsonl and stop there."""

    TRAIN_DEFAULTS: ClassVar[Mapping[str, Any]] = PROTOCOL | {"learning_rate": 1e-5}  # as the papers fine-tune

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter == "continue" and self.tuning == "full":
            raise ConfigError("--adapter continue: there is no adapter to continue under --tuning full; leave one out")


ATTACK = Stage(
    name="attack",
    options=AttackOptions,
    summary="build a poisoned fine-tuning set and fine-tune on it",
    example="pharmacist attack --model runs/aligned --task task.jsonl --harmful attack.jsonl --poison-ratio 0.1 "
    "--samples 1000 --output-dir runs/attacked",
    version=3,
    files=("task", "harmful", "safe", "disjoint_from"),
    models=("model",),
    costly=("work/train/**/*.safetensors",),
    early=("attack_set.jsonl",),
    by_axes=frozenset({"task", "kind", "poison_ratio", "samples", "defense", "build_only"}),
)
