"""What a selector is: it may learn from references (and the pool), then gives every row a score and a reason."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.method import Method
from pharmacist.core.rundir import RunDir


if TYPE_CHECKING:
    from pharmacist.data.records import Records
    from pharmacist.data.tokenize import Encoded
    from pharmacist.nn.models import LoadedModel


FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

CRITICAL = "critical"
"""The reason of rows worth keeping: safety-critical and of good quality."""
RANKED = "ranked"
"""The reason of all rows where a selector measures without judging: it says nothing about what a row is."""
GOOD_REASONS = (CRITICAL, RANKED, "duplicate")
"""Reasons that do not speak against a row; a duplicate is a near-duplicate of a better critical row."""
FEWEST_REFERENCES = 8


@dataclass
class Scores:
    """A selector's verdict on a pool.

    Attributes:
        score: Higher = keep, finite, shape [rows].
        reason: One word per row; `CRITICAL` for rows worth keeping, `RANKED`, the default, where nothing was judged;
            shape [rows].
        signals: Further columns of ``scores.parquet``, each of shape [rows].
        report: What the selector says about itself (JSON), such as its quality on held-out references.
        warnings: Where the scores cannot be trusted, a sentence each.
        telling: How much a person's label of a row would teach, shape [rows]; None where labels teach nothing.
        weight: How much a row's loss should count in training against that of others, not negative, shape [rows];
            None where the selector only ranks.
    """

    score: FloatArray
    reason: npt.NDArray[np.str_] = field(default_factory=lambda: np.empty(0, np.str_))
    signals: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    telling: FloatArray | None = None
    weight: FloatArray | None = None

    def __post_init__(self) -> None:
        if not len(self.reason):
            self.reason = np.full(len(self.score), RANKED)

    @classmethod
    def by_size(cls, size: npt.NDArray[Any], signal: str, *, largest: bool) -> "Scores":
        """Rows with the largest (or the smallest) value of a measurement, shape [rows], come first."""
        score = size.astype(np.float64)
        return cls(score if largest else -score, signals={signal: size})


def scaled_to_mean_1(weight: FloatArray, selected: BoolArray) -> FloatArray:
    """Weights whose mean over the selected rows is 1; all 1 where those have none."""
    mean = weight[selected].mean() if selected.any() else 0.0
    found: FloatArray = weight / mean if mean > 0 else np.ones_like(weight)
    return found


@dataclass
class SelectionContext:
    """What a selector works with.

    Attributes:
        run: Output folder; partial state goes to ``run.work(...)``, costs are measured with ``run.phase(...)``.
        pool: The rows to rank.
        references: ``safe``, ``harmful``, ``utility`` where given; they share no prompt with the pool.
        model_name: Folder or hub id.
        seed: Of every random stream.
        fraction: About which share of the pool will be kept (where the cut lies).
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        template: Prompt template, as in `nn.models.load_model`.
        max_length: Longest row in tokens, 0 for the model's own limit.
        resume_from: Folder of a trained selector that only scores, never trains.
        trust_remote_code: Run code that comes with the model.
        checkpoint_seconds: Time between checkpoints of a training.
        embedder: Folder or hub id of a sentence-transformers model that says how near rows are; the hidden states of
            the model itself where there is none.
        sources: Kind of references -> the number of each row's source, where several files were given.
        labels: Position in the pool -> reason that a person gave it (`selectors.labels`).
        encoded: Filled by `encode`: what was tokenised, by name; the pool's is ``pool``.
        points: Filled by `embeddings.pool_points`.
    """

    run: RunDir
    pool: "Records"
    references: Mapping[str, "Records"]
    model_name: str | None
    seed: int
    fraction: float
    device: str = "auto"
    dtype: str = "auto"
    template: str = "auto"
    max_length: int = 0
    resume_from: Path | None = None
    trust_remote_code: bool = False
    checkpoint_seconds: float = 30.0
    embedder: str | None = None
    sources: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)
    encoded: dict[str, "Encoded"] = field(default_factory=dict)
    points: FloatArray | None = None

    @cached_property
    def model(self) -> "LoadedModel":
        """The base model, loaded on first use."""
        from pharmacist.nn.models import load_model

        if self.model_name is None:
            raise ConfigError("this selector reads the pool with a model; give --model")
        return load_model(
            self.model_name,
            device=self.device,
            dtype=self.dtype,
            template=self.template,
            trust_remote_code=self.trust_remote_code,
        )

    def forget_changed_model(self) -> None:
        """Makes the next use of `model` load it anew if a selector has put adapters on it."""
        from peft.tuners.lora import LoraLayer

        if "model" in self.__dict__ and any(isinstance(module, LoraLayer) for module in self.model.model.modules()):
            del self.__dict__["model"]

    @cached_property
    def encoded_pool(self) -> "Encoded":
        """The pool in tokens, made on first use and kept on disk."""
        return self.encode(self.pool.dataset, "pool")

    def reference_rows(self, name: str) -> list[dict[str, Any]]:
        """The references of one kind.

        Raises:
            DataError: They are too few to learn from.
        """
        rows = list(self.references[name].dataset)
        if len(rows) < FEWEST_REFERENCES:
            raise DataError(f"--{name}: {len(rows)} rows are left, at least {FEWEST_REFERENCES} are needed")
        return rows

    def encoded_references(self, name: str) -> "Encoded":
        """Likewise, in tokens."""
        self.reference_rows(name)
        return self.encode(self.references[name].dataset, name)

    def encode(self, rows: Any, name: str) -> "Encoded":
        """Canonical rows (`data.records`) in tokens, cached by `name` under ``work/``."""
        from pharmacist.data.tokenize import encode

        limit = min(self.max_length or self.model.max_length, self.model.max_length)
        # A long prompt is shortened in its middle, never refused: the model that ranks may have a shorter context than
        # the one that is aligned.
        self.encoded[name] = encode(
            rows,
            self.model.tokenizer,
            self.model.template,
            max_length=limit,
            on_long_prompt="cut",
            work_dir=self.run.work("tokens", name),
        )
        return self.encoded[name]


class Selector(Method, ABC):
    """Ranks a pool.

    Attributes:
        needs: What must be given: any of ``safe``, ``harmful``, ``utility``, ``model``, ``embedder`` (a model or an
            embedder); those of an instance may depend on its options.
        uses: What it reads besides, where it is given; a grid gives it nothing else.
        weighs: Whether its scores come with weights.
        asks: Whether `Scores.telling` says which rows a person should label.
        keeps_all: It ranks nothing, and all rows are kept.
        chance: Its order is drawn at random.
        covers: Its order covers the pool already, so that no ``diversity`` can do so again.
    """

    uses: frozenset[str] = frozenset()
    weighs: bool = False
    asks: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    chance: ClassVar[bool] = False
    covers: ClassVar[bool] = False

    @abstractmethod
    def rank(self, context: SelectionContext) -> Scores:
        """Learns what there is to learn and scores every row of ``context.pool``.

        The result depends on content alone: permuted rows get permuted scores, equal rows equal ones.
        """

    def notice(self, given: Collection[str]) -> str | None:
        """What it does otherwise for want of references, where these are given: a sentence, or None.

        Raises:
            ConfigError: Its options need others than those.
        """
        return None

    def check_room(self, rows: int, folder: Path) -> None:
        """Refuses more rows than memory, or the disk of the run's folder, can hold, before any work.

        Raises:
            ConfigError: It says how much would be needed.
        """
        return

    def check_saved(self, folder: Path, model: str | None) -> None:
        """Tells, before anything is read, whether what lies in a folder can be gone on from with a model.

        Raises:
            PharmacistError: It cannot.
        """
        return

    def save(self, folder: Path) -> bool:
        """Writes what was learned, so that new rows can be scored without training; False where nothing was."""
        return False
