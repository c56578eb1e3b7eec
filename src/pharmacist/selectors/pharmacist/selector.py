"""The Pharmacist selector: evidence says what a row is; twins that learn from the pool may order the best of them."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import write_json
from pharmacist.core.seeding import derive
from pharmacist.data.records import last_requests, to_dataset
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import IntArray, Sequences
from pharmacist.nn.models import model_fingerprint
from pharmacist.nn.passes import run_pass
from pharmacist.nn.reading import tokens_per_batch
from pharmacist.readers.kept import row_keys
from pharmacist.selectors.base import FEWEST_REFERENCES, Scores, SelectionContext, Selector
from pharmacist.selectors.options import PharmacistConfig
from pharmacist.selectors.pharmacist.evidence import Evidence, Labels
from pharmacist.selectors.pharmacist.kept import FORMAT, KEPT, read_saved, read_texts
from pharmacist.selectors.pharmacist.references import REASONS, References, build_references
from pharmacist.selectors.pharmacist.twins import (
    TWINS,
    WITHOUT_HARMFUL,
    Twins,
    fall_back,
    safe_and_other,
    twin_losses,
    twin_reasons,
)
from pharmacist.selectors.pharmacist.verdict import both, honoured, verdict


if TYPE_CHECKING:
    import datasets


FloatArray = npt.NDArray[np.float64]

_WORTH_LISTENING = 0.7
"""Held-out AUC from which the twins' contrast orders the rows that evidence calls critical."""
_OF_REASON = {reason: number for number, reason in reversed(list(enumerate(REASONS.values())))}


class PharmacistSelector(Selector):
    """Ranks an alignment pool by what its rows are and, where asked for, by what training on them does."""

    Config = PharmacistConfig
    name = "pharmacist"
    needs = frozenset({"safe"})
    uses = frozenset({"harmful", "utility", "model"})
    asks = True
    paper = "arXiv 2510.10085; the questions of the evidence and the closed form are this project's own"

    _ranking: "_Ranking | None" = None

    def notice(self, given: Collection[str]) -> str | None:
        """Says that the twins fall back to SEAL's contrast where there are no harmful references."""
        return fall_back(self.config, given)

    def rank(self, context: SelectionContext) -> Scores:
        """Learns from references and labels (or loads what was learned), and reads the pool once."""
        self._ranking = _Ranking(self.config, context)
        return self._ranking.scores()

    def check_saved(self, folder: Path, model: str | None) -> None:
        """It must be ours, and of the model that it was trained with."""
        read_saved(folder, model)

    def save(self, folder: Path) -> bool:
        """Writes evidence, twins and what the model showed of every row: safetensors and JSON only."""
        if self._ranking is None:
            return False
        self._ranking.save(folder)
        return True


class _Ranking:
    """One ranking, from references to scores."""

    def __init__(self, config: PharmacistConfig, context: SelectionContext) -> None:
        self.config, self.context, self.run = config, context, context.run
        self.seed = derive(context.seed, "pharmacist")
        self.evidence: Evidence | None = None
        self.twins: Twins | None = None
        self.saved: Path | None = None
        if context.resume_from is not None:
            self.saved, content = read_saved(context.resume_from, context.model_name)
            self.config = PharmacistConfig(**content["config"])
        self.readers = self.config.reader_names(model=context.model_name is not None)
        if "probe" in self.readers and context.model_name is None:
            raise ConfigError(
                "selector.readers: the probe reads hidden states; give --model, or --selector.readers lexical"
            )

    # --- what is read --------------------------------------------------------------------------------------------

    @cached_property
    def pool(self) -> "datasets.Dataset":
        """The rows as they are read: the last request and its answer."""
        return last_requests(self.context.pool.dataset)

    @cached_property
    def distinct(self) -> tuple[IntArray, IntArray]:
        """Rows of the pool with different texts, in an order of their content, and for each row which it is."""
        keys = row_keys(list(self.pool["prompt"]), list(self.pool["completion"]))
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        return first.astype(np.int64), inverse.astype(np.int64)

    @cached_property
    def references(self) -> References:
        given = {name: list(last_requests(rows.dataset)) for name, rows in self.context.references.items()}
        for name, rows in given.items():
            if len(rows) < FEWEST_REFERENCES:
                raise DataError(f"--{name}: {len(rows)} rows are left, at least {FEWEST_REFERENCES} are needed")
        config = self.config
        return build_references(
            given,
            n_folds=config.folds,
            corruptions_per_row=config.corruptions_per_row,
            seed=self.seed,
            sources=self.context.sources or None,
        )

    @cached_property
    def bank(self) -> AdapterBank:
        return AdapterBank(self.context.model.model, self.config, self.seed, self.context.checkpoint_seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[Any]:
        """Measures a phase, with the tokens that go through the adapters in it."""
        with self.run.phase(name) as phase:
            before = self.bank.tokens if "bank" in self.__dict__ else 0
            yield phase
            if "bank" in self.__dict__:
                phase.tokens += self.bank.tokens - before

    # --- learning and scoring ------------------------------------------------------------------------------------

    def scores(self) -> Scores:
        """The verdict on the pool."""
        fallback = None if self.saved else fall_back(self.config, self.context.references)
        evidence = self._evidence() if self.config.form != "bilevel" else None
        if self.config.form == "evidence":
            assert evidence is not None
            return evidence
        losses = self._twin_losses()
        assert self.twins is not None and self.twins.thresholds is not None
        safe, other = safe_and_other(losses)
        contrast = other - safe
        signals: dict[str, npt.NDArray[Any]] = {**losses, "contrast": contrast}
        report: dict[str, Any] = {"twins": self.twins.report}
        report |= {} if fallback is None else {"fallback": fallback}
        if evidence is None:
            keys = self.context.encoded["pool"].content_keys
            order = contrast if self.saved else self.twins.ordered(contrast, keys, self.run.work("twins"), self.seed)
            score, reason = honoured(order, twin_reasons(losses, self.twins.thresholds), *self._labelled())
            return Scores(score, reason, signals, report)
        used = self.twins.quality is not None and self.twins.quality >= _WORTH_LISTENING
        report["twins"]["used"] = used
        score = both(evidence.score, contrast, evidence.reason) if used else evidence.score
        score, reason = honoured(score, evidence.reason, *self._labelled())
        return Scores(
            score, reason, evidence.signals | signals, evidence.report | report, evidence.warnings, evidence.telling
        )

    @cached_property
    def labels(self) -> Labels:
        """What a person said of `distinct` rows; of copies that got several labels the last one's holds."""
        _, inverse = self.distinct
        told = {int(inverse[row]): _OF_REASON[reason] for row, reason in sorted(self.context.labels.items())}
        rows = np.array(sorted(told), dtype=np.int64)
        return Labels(rows, np.array([told[row] for row in rows], dtype=np.int64))

    def _labelled(self) -> tuple[IntArray, IntArray]:
        """The pool's rows that have a label, copies of labelled ones among them, and their classes."""
        first, inverse = self.distinct
        classes = np.full(len(first), -1)
        classes[self.labels.rows] = self.labels.classes
        rows = np.flatnonzero(classes[inverse] >= 0)
        return rows, classes[inverse[rows]]

    def _evidence(self) -> Scores:
        with self.phase("read references") as phase:
            if (learned := self._learned()) is not None:
                self.evidence = Evidence.load(learned)
                self.readers = self.evidence.names
            else:
                rows = to_dataset(self.references.rows)
                texts, tokens = read_texts(self.context, rows, "references", with_model="probe" in self.readers)
                phase.tokens += tokens
                self.evidence = Evidence(self.readers).fit(self.references, texts)
        with self.phase("read pool") as phase:
            texts, tokens = read_texts(self.context, self.pool, "pool", with_model="probe" in self.readers)
            phase.tokens += tokens
        with self.phase("answer"):
            first, inverse = self.distinct
            answers = self.evidence.answer(texts.take(first), self.labels)
        return verdict(answers, self.labels, inverse, self.evidence.report)

    def _learned(self) -> Path | None:
        """Where evidence of the same references lies: a selector to go on from, or this run before its labels."""
        if self.saved is not None:
            return self.saved
        own = self.run.path("selector")
        return own if self.context.labels and (own / "evidence.json").is_file() else None

    def _twin_losses(self) -> dict[str, FloatArray]:
        context = self.context
        pool = context.encode(self.pool, "pool")
        if self.saved is not None:
            self.twins = Twins.saved(self.bank, self.config, self.saved / "twins")
        else:
            names = TWINS if "harmful" in context.references else WITHOUT_HARMFUL
            self.twins = Twins(self.bank, self.config, names)
            with self.phase("train twins"):
                encoded = context.encode(to_dataset(self.references.rows), "references")
                self.twins.fit(encoded, self.references, pool, self.run.work("twins"), self.seed, self._measure)
        with self.phase("score with twins"):
            return self._measure(pool, self.run.work("scores", "twins"), None, "reading the pool with the twins")

    def _measure(self, rows: Sequences, work: Path, which: IntArray | None, what: str) -> dict[str, FloatArray]:
        assert self.twins is not None
        names = self.twins.names
        return run_pass(
            rows,
            lambda batch: twin_losses(self.bank, batch, names),
            work=work,
            device=self.bank.device,
            tokens_per_batch=tokens_per_batch(self.context.model.model, self.bank.device),
            rows=which,
            description=what,
        )

    def save(self, folder: Path) -> None:
        """Writes what was learned and read."""
        if self.evidence is not None:
            self.evidence.save(folder)
        if self.twins is not None:
            self.twins.save(folder / "twins")
        read = self.run.work("states")
        for path in sorted(read.glob("*.safetensors")):
            (folder / KEPT).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / KEPT / path.name)
        uses_model = "probe" in self.readers or self.twins is not None
        write_json(
            folder / "selector.json",
            {
                "format": FORMAT,
                "selector": "pharmacist",
                "config": asdict(self.config),
                "model": model_fingerprint(self.context.model_name) if uses_model and self.context.model_name else "",
            },
        )
