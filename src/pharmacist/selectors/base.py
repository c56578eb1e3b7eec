"""The base of selectors, the inputs that they rank a pool with, and the scores that they return."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
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
    import datasets
    import torch

    from pharmacist.data.records import Records
    from pharmacist.data.tokenize import Encoded
    from pharmacist.nn.batching import Batch, Sequences
    from pharmacist.nn.models import LoadedModel
    from pharmacist.nn.passes import Measure


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
    """A selector's result: a score and a reason for every row of a pool.

    Attributes:
        score: Higher = keep, finite, shape [rows].
        reason: One word per row; `CRITICAL` for rows worth keeping, `RANKED`, the default, where nothing was judged;
            shape [rows].
        signals: Further columns of ``scores.parquet``, each of shape [rows].
        report: Facts about the ranking (JSON), such as the quality on held-out references.
        warnings: Reasons not to trust the scores, a sentence each.
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
    return weight / mean if mean > 0 else np.ones_like(weight)


@dataclass
class SelectionContext:
    """The inputs of a ranking, and the model and tokens that are made from them on first use.

    Attributes:
        run: Output folder; partial state goes to ``run.work(...)``, costs are measured with ``run.phase(...)``.
        pool: The rows to rank.
        references: ``safe``, ``harmful``, ``utility`` where given; they share no prompt with the pool.
        model_name: Folder or Hub id.
        seed: Seed of every random stream.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        template: Prompt template, as in `nn.models.load_model`.
        max_length: Longest row in tokens, 0 for the model's own limit.
        resume_from: Folder of a trained selector that only scores, never trains.
        trust_remote_code: Run code that comes with the model.
        checkpoint_seconds: Time between checkpoints of a training.
        embedder: Folder or Hub id of a sentence-transformers model by which rows are compared; without one, rows are
            compared by hidden states of the model.
        sources: Kind of references -> the number of each row's source, where several files were given.
        labels: Position in the pool -> reason that a person's label stands for (`selectors.labels`).
        encoded: Tokenised rows by name, filled by `encode`; those of the pool are called ``pool``.
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
        """Canonical rows (`data.records`) in tokens, memory-mapped under ``work/``, and noted in `encoded`."""
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
        """Measures every row with the model once, as phase ``score``; finished chunks lie in ``work/read/NAME``.

        The same name means the same measurement of the same rows. `forwards` says how often `measure` (of a pass)
        sends a batch through the model, for the count of tokens; `backward` that it keeps what a backward pass needs,
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
        self, sequences: "Sequences", measure: "Callable[[Batch], torch.Tensor]", name: str
    ) -> FloatArray:
        """As `read`, of one number per row, shape [rows]."""
        return self.read(sequences, lambda batch: {"number": measure(batch).double().cpu().numpy()}, name)["number"]


class Selector(Method, ABC):
    """Base of the methods that rank a pool.

    Attributes:
        needs: Required inputs: any of ``safe``, ``harmful``, ``utility``, ``model``, ``embedder`` (a model or an
            embedder); those of an instance may depend on its options.
        uses: Optional inputs. A grid gives a selector that needs and uses nothing neither model nor references.
        weighs: Whether `Scores.weight` is filled.
        asks: Whether `Scores.telling` is filled, so that a person can be asked for labels.
        keeps_all: Whether all rows are kept, since nothing is ranked.
        chance: Whether the order is drawn at random.
        covers: Whether the order spreads over the pool by itself, so that ``--diversity`` would do it twice.
    """

    uses: frozenset[str] = frozenset()
    weighs: bool = False
    asks: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    chance: ClassVar[bool] = False
    covers: ClassVar[bool] = False

    @abstractmethod
    def rank(self, context: SelectionContext) -> Scores:
        """Learns from references and pool, and scores every row of ``context.pool``.

        Scores depend on content alone: permuted rows get permuted scores. Equal rows get equal ones, except where a
        selector draws at random or chooses rows one after the other.
        """

    def learns_from_labels(self) -> bool:
        """Whether `SelectionContext.labels` change the scores."""
        return self.asks

    def notice(self, given: Collection[str]) -> str | None:
        """A sentence about what the selector does differently since some references are missing, or None.

        Args:
            given: Kinds of references that there are.

        Raises:
            ConfigError: The options cannot work with these kinds.
        """
        return None

    def check_room(self, rows: int, folder: Path) -> None:
        """Checks, before any work, that memory and the disk of the run's folder can hold so many rows.

        Raises:
            ConfigError: They cannot; the message says how much is needed.
        """
        return

    def check_saved(self, folder: Path, model: str | None) -> None:
        """Checks, before any work, that a folder holds a trained selector which can score with a model.

        Raises:
            PharmacistError: It does not.
        """
        return

    def save(self, folder: Path) -> bool:
        """Saves the trained selector, so that it can score new rows; False where there is nothing to save."""
        return False
