"""The base class of selectors, the inputs with which they rank a pool, and the scores that they return."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.core.method import Method
from pharmacist.core.rundir import RunDir
from pharmacist.data.arrays import BoolArray, FloatArray, IntArray


if TYPE_CHECKING:
    import datasets
    import torch

    from pharmacist.data.records import Records
    from pharmacist.data.tokenize import Encoded
    from pharmacist.nn.batching import Batch, Sequences
    from pharmacist.nn.models import LoadedModel
    from pharmacist.nn.passes import Measure


CRITICAL = "critical"
"""The reason of rows worth keeping: safety-critical and of good quality."""
RANKED = "ranked"
"""The reason of all rows if a selector does not judge them; it says nothing about the content of a row."""
GOOD_REASONS = (CRITICAL, RANKED, "duplicate")
"""Reasons that do not speak against a row; a duplicate is a near-duplicate of a better critical row."""
FEWEST_REFERENCES = 8
TABLE_COLUMNS = frozenset({"row", "score", "rank", "selected", "reason", "duplicate_of", "label", "group", "weight"})
"""Columns of ``scores.parquet`` that are no signals of a selector."""


@dataclass
class Scores:
    """A selector's result: a score and a reason for every row of a pool.

    Attributes:
        score: Finite scores, higher = keep, shape [rows].
        reason: One word per row: `CRITICAL` for rows worth keeping; `RANKED`, the default, if nothing was judged;
            shape [rows].
        signals: Further columns of ``scores.parquet``, each of shape [rows].
        report: Facts about the ranking (JSON), such as the quality on held-out references.
        warnings: Reasons not to trust the scores, one sentence each.
        informativeness: How informative a human label of each row would be, shape [rows]; None if the selector does
            not learn from labels.
        weight: Weight of each row's loss in training, not negative, shape [rows]; None if the selector only ranks.
    """

    score: FloatArray
    reason: npt.NDArray[np.str_] = field(default_factory=lambda: np.empty(0, np.str_))
    signals: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    informativeness: FloatArray | None = None
    weight: FloatArray | None = None

    def __post_init__(self) -> None:
        self.score = np.asarray(self.score, dtype=np.float64)
        self.reason = np.asarray(self.reason) if len(self.reason) else np.full(len(self.score), RANKED)
        for name in ("informativeness", "weight"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, np.asarray(values, dtype=np.float64))

    def check(self, selector: str, rows: int) -> None:
        """Raises a CompatibilityError unless rows have one value of each kind, in columns of their own."""
        own = {name: getattr(self, name) for name in ("score", "reason", "informativeness", "weight")}
        for name, values in (*own.items(), *self.signals.items()):
            if values is not None and len(values) != rows:
                raise CompatibilityError(f"selector '{selector}': {name} has {len(values)} values for {rows} rows")
        if self.weight is not None and not (np.isfinite(self.weight) & (self.weight >= 0)).all():
            raise CompatibilityError(f"selector '{selector}': weight has values that are negative or not finite")
        for name in TABLE_COLUMNS & self.signals.keys():
            raise CompatibilityError(f"selector '{selector}': no signal may be called {name}, like another column")

    @classmethod
    def by_size(cls, size: npt.NDArray[Any], signal: str, *, largest: bool) -> "Scores":
        """Scores by a measurement, shape [rows]: rows with the largest (or the smallest) value come first."""
        score = size.astype(np.float64)
        return cls(score if largest else -score, signals={signal: size})


def scaled_to_mean_1(weight: FloatArray, selected: BoolArray) -> FloatArray:
    """Weights scaled to mean 1 over the selected rows; all 1 if these have no weight."""
    mean = weight[selected].mean() if selected.any() else 0.0
    return weight / mean if mean > 0 else np.ones_like(weight)


@dataclass
class SelectionContext:
    """The inputs of a ranking, and the model and tokens created from them on first use.

    Attributes:
        run: Output folder; partial state goes to ``run.work(...)``, costs are measured with ``run.phase(...)``.
        pool: The rows to rank.
        references: ``safe``, ``harmful`` and ``utility`` references, as far as given; they share no prompt with the
        pool.
        model_name: Folder or Hub id.
        seed: Seed of all random number generators.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        template: Prompt template, as in `nn.models.load_model`.
        max_length: Longest row in tokens, 0 for the model's own limit.
        resume_from: Folder of a trained selector that only scores, never trains.
        trust_remote_code: Allow code that comes with the model to run.
        checkpoint_seconds: Time between checkpoints of a training.
        embedder: Folder or Hub id of a sentence-transformers model with which rows are compared; without it, hidden
            states of the model are compared.
        sources: Kind of references -> number of each row's source, if several files were given.
        labels: Position in the pool -> reason according to the row's human label (`selectors.labels`).
        encoded: Tokenised rows by name, filled by `encode`; the pool's rows are called ``pool``.
        points: The pool's rows as points, filled by `embeddings.pool_points`.
    """

    run: RunDir
    pool: "Records"
    references: Mapping[str, "Records"]
    model_name: str | None
    seed: int
    device: str = "auto"
    dtype: str = "auto"
    template: str = "auto"
    max_length: int = 0
    resume_from: Path | None = None
    trust_remote_code: bool = False
    checkpoint_seconds: float = 30.0
    embedder: str | None = None
    sources: Mapping[str, IntArray] = field(default_factory=dict)
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
        """Drops the model if a selector has put adapters on it, so that the next use of `model` loads it from disk."""
        from peft.tuners.lora import LoraLayer

        if "model" in self.__dict__ and any(isinstance(module, LoraLayer) for module in self.model.model.modules()):
            del self.__dict__["model"]

    @cached_property
    def encoded_pool(self) -> "Encoded":
        """The pool in tokens, made on first use."""
        return self.encode(self.pool.dataset, "pool")

    def reference_rows(self, name: str) -> "datasets.Dataset":
        """The references of one kind, as canonical rows.

        Raises:
            DataError: There are fewer than `FEWEST_REFERENCES`.
        """
        rows = self.references[name].dataset
        if len(rows) < FEWEST_REFERENCES:
            raise DataError(f"--{name}: {len(rows)} rows are left, at least {FEWEST_REFERENCES} are needed")
        return rows

    def encoded_references(self, name: str) -> "Encoded":
        """The references of one kind, in tokens; raises as `reference_rows` does."""
        return self.encode(self.reference_rows(name), name)

    def encode(self, rows: "datasets.Dataset", name: str) -> "Encoded":
        """Canonical rows (`data.records`) in tokens, memory-mapped under ``work/`` and stored in `encoded`."""
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

    def read(
        self, sequences: "Sequences", measure: "Measure", name: str, *, forwards: int = 1, backward: bool = False
    ) -> dict[str, FloatArray]:
        """Measures every row with the model once, as phase ``score``; finished chunks are kept in ``work/read/NAME``.

        The same name means the same measurement of the same rows. `forwards` is the number of forward passes that
        `measure` makes per batch, for the count of tokens; `backward` says that it keeps what a backward pass needs,
        so that batches must be smaller.
        """
        from pharmacist.nn.passes import run_pass

        with self.run.phase("score") as phase:

            def counted(batch: "Batch") -> dict[str, npt.NDArray[Any]]:
                phase.tokens += forwards * batch.tokens
                return measure(batch)

            work, what = self.run.work("read", name), f"reading rows ({name})"
            return run_pass(self.model.model, sequences, counted, work=work, description=what, backward=backward)

    def read_numbers(
        self, sequences: "Sequences", measure: "Callable[[Batch], torch.Tensor]", name: str, *, backward: bool = False
    ) -> FloatArray:
        """Like `read`, for one number per row, shape [rows]."""

        def numbers(batch: "Batch") -> dict[str, npt.NDArray[Any]]:
            return {"number": measure(batch).double().cpu().numpy()}

        return self.read(sequences, numbers, name, backward=backward)["number"]


class Selector(Method, ABC):
    """Base class of the methods that rank a pool.

    Attributes:
        needs: Required inputs: any of ``safe``, ``harmful``, ``utility``, ``model``, ``embedder`` (a model or an
            embedder); for an instance, they may depend on its options.
        uses: Optional inputs. A grid gives neither model nor references to a selector that needs and uses nothing.
        gives_weights: Whether `Scores.weight` is filled.
        suggests_labels: Whether `Scores.informativeness` is filled, so that rows can be suggested for labelling.
        keeps_all: Whether all rows are kept, because nothing is ranked.
        is_random: Whether the order is random.
        covers: Whether the order already spreads over the pool, so that ``--diversity`` would be redundant.
    """

    uses: frozenset[str] = frozenset()
    gives_weights: bool = False
    suggests_labels: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    is_random: ClassVar[bool] = False
    covers: ClassVar[bool] = False

    @abstractmethod
    def rank(self, context: SelectionContext) -> Scores:
        """Learns from references and pool, and scores every row of ``context.pool``.

        Scores depend on content alone: permuted rows get permuted scores. Equal rows get equal scores, unless a
        selector draws at random or chooses rows one after the other.
        """

    def learns_from_labels(self) -> bool:
        """Whether the scores depend on `SelectionContext.labels`."""
        return self.suggests_labels

    def notice(self, given: Collection[str]) -> str | None:
        """A sentence on what the selector does differently because kinds of references are not `given`, or None.

        Raises:
            ConfigError: The options cannot work with these kinds.
        """
        return None

    def check_room(self, rows: int, folder: Path) -> None:  # noqa: B027 - most read one row at a time
        """Checks, before any work, that memory and the disk of the run's folder are large enough for this many rows.

        Raises:
            ConfigError: They are not; the message says how much is needed.
        """

    def check_saved(self, folder: Path, model: str | None) -> None:  # noqa: B027 - most save nothing
        """Checks, before any work, that a folder contains a trained selector that can score with a model.

        Raises:
            PharmacistError: It does not.
        """

    def save(self, folder: Path) -> bool:
        """Saves the trained selector, so that it can score new rows; returns False if there is nothing to save."""
        return False
