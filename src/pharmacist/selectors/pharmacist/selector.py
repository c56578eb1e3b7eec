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
from scipy.special import expit

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.seeding import derive
from pharmacist.data.records import last_requests, to_dataset
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import IntArray, Sequences
from pharmacist.nn.models import model_fingerprint
from pharmacist.nn.passes import run_pass
from pharmacist.selectors.base import CRITICAL, FEWEST_REFERENCES, Scores, SelectionContext, Selector
from pharmacist.selectors.options import PharmacistConfig
from pharmacist.selectors.pharmacist import trust
from pharmacist.selectors.pharmacist.evidence import Answers, Evidence, Labels
from pharmacist.selectors.pharmacist.kept import KEPT, read_texts, row_keys
from pharmacist.selectors.pharmacist.questions import (
    QUESTIONS,
    REFUSES,
    RISKY,
    WHOLE,
    class_log_posterior,
    pool_priors,
    safe_log_odds,
    with_priors,
)
from pharmacist.selectors.pharmacist.references import CLASSES, REASONS, References, build_references
from pharmacist.selectors.pharmacist.twins import (
    TWINS,
    WITHOUT_HARMFUL,
    Twins,
    safe_and_other,
    twin_losses,
    twin_reasons,
)
from pharmacist.selectors.reading import tokens_per_batch


if TYPE_CHECKING:
    import datasets


FloatArray = npt.NDArray[np.float64]

_FORMAT = 3
_WORTH_LISTENING = 0.7
"""Held-out AUC from which the twins' contrast orders the rows that evidence calls critical."""
_REASONS = np.array(list(REASONS.values()))
_OF_REASON = {reason: number for number, reason in reversed(list(enumerate(REASONS.values())))}


class Pharmacist(Selector):
    """Ranks an alignment pool by what its rows are and, where asked for, by what training on them does."""

    Config = PharmacistConfig
    needs = frozenset({"safe"})
    paper = "arXiv 2510.10085; the questions of the evidence and the closed form are this project's own"

    def __init__(self, config: PharmacistConfig) -> None:
        self.config = config
        self._ranking: _Ranking | None = None

    def notice(self, given: Collection[str]) -> str | None:
        """Says that the twins fall back to SEAL's contrast where there are no harmful references."""
        return _fall_back(self.config, given)

    def rank(self, context: SelectionContext) -> Scores:
        """Learns from references and labels (or loads what was learned), and reads the pool once."""
        self._ranking = _Ranking(self.config, context)
        return self._ranking.scores()

    def check_saved(self, folder: Path, model: str | None) -> None:
        """It must be ours, and of the model that it was trained with."""
        _read_saved(folder, model)

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
            self.saved, content = _read_saved(context.resume_from, context.model_name)
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
        fallback = None if self.saved else _fall_back(self.config, self.context.references)
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
        return _verdict(answers, self.labels, inverse, self.evidence.report)

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
                "format": _FORMAT,
                "selector": "pharmacist",
                "config": asdict(self.config),
                "model": model_fingerprint(self.context.model_name) if uses_model and self.context.model_name else "",
            },
        )


def _verdict(answers: Answers, labels: Labels, inverse: IntArray, learned: dict[str, Any]) -> Scores:
    """Scores, reasons and what is to be known about them, from the answers to distinct rows."""
    posterior = class_log_posterior(answers.log_odds, answers.typical)
    shares = pool_priors(posterior[inverse])
    p = np.exp(with_priors(posterior, shares))
    p[labels.rows] = np.eye(len(CLASSES))[labels.classes]
    read = _REASONS[posterior.argmax(1)]
    teaching = _teaching(answers, read == CRITICAL)
    ordered = both(safe_log_odds(posterior), teaching, read, weight=1 + answers.near)
    score, reasons = honoured(ordered, read, labels.rows, labels.classes)
    signals: dict[str, npt.NDArray[Any]] = {f"p_{name}": p[:, number] for number, name in enumerate(CLASSES[:4])} | {
        "p_corrupted": p[:, 4:].sum(1)
    }
    signals |= {question: expit(answers.log_odds[:, number]) for number, question in enumerate(QUESTIONS)}
    signals |= answers.by_reader
    report = learned | {
        "shares": {name: float(share) for name, share in zip(CLASSES, shares, strict=True)},
        "distance": answers.distance,
        "near": answers.near,
        "cannot_see": _unseen(learned),
    }
    if answers.labels_held_out is not None:
        report["labels"] = trust.gain(*answers.labels_held_out, labels.classes == 0)
    warnings = trust.warnings(report, reasons[inverse])
    telling = _telling(answers.log_odds, labels)
    of_rows = {name: values[inverse] for name, values in signals.items()}
    return Scores(score[inverse], reasons[inverse], of_rows, report, warnings, telling[inverse])


def honoured(
    score: FloatArray, reason: npt.NDArray[np.str_], rows: IntArray, classes: IntArray
) -> tuple[FloatArray, npt.NDArray[np.str_]]:
    """Scores and reasons with what a person said of some rows: good ones above all that was merely read, bad ones
    below it.

    Args:
        score: Shape [rows of the pool].
        reason: Shape [rows of the pool].
        rows: The labelled ones.
        classes: Index into `CLASSES` of each.
    """
    score, reason = score.copy(), reason.astype(_REASONS.dtype)
    score[rows] = np.where(classes == 0, score.max() + 1, score.min() - 1)
    reason[rows] = _REASONS[classes]
    return score, reason


def _telling(log_odds: FloatArray, labels: Labels) -> FloatArray:
    """How much a label of each row would teach: the entropy of the answers, question by question, in nats; a row that
    has a label teaches nothing more.
    """
    p = expit(log_odds).clip(1e-12, 1 - 1e-12)
    entropy: FloatArray = -(p * np.log(p) + (1 - p) * np.log1p(-p)).sum(1)
    entropy[labels.rows] = -1.0
    return entropy


def _unseen(learned: dict[str, Any]) -> list[str]:
    """Reasons that cannot be given, since no reference answers their question by no."""
    return [] if WHOLE in learned["questions"] else [REASONS["corrupted"]]


def _read_saved(folder: Path, model: str | None) -> tuple[Path, dict[str, Any]]:
    """Where a saved selector lies, and its ``selector.json``; only for the model that it reads with."""
    folder = folder / "selector" if (folder / "selector" / "selector.json").is_file() else folder
    path = folder / "selector.json"
    if not path.is_file():
        raise DataError(f"{folder}: no selector.json; --resume-selector needs the folder of an earlier curate")
    saved: dict[str, Any] = read_json(path)
    if saved.get("selector") != "pharmacist" or saved.get("format") != _FORMAT:
        raise DataError(f"{path}: not written by this version of the selector 'pharmacist'; train it again")
    if saved["model"]:
        if model is None:
            raise ConfigError("the saved selector reads with a model; give --model")
        if model_fingerprint(model) != saved["model"]:
            raise DataError(f"{path}: was trained on another model than {model}; give that one")
    return folder, saved


def _fall_back(config: PharmacistConfig, given: Collection[str]) -> str | None:
    """What the twins are instead without harmful references; None where they have them, or there are no twins.

    Raises:
        ConfigError: The options leave nothing to learn from what is given.
    """
    if config.form != "bilevel" and not {"harmful", "utility"} & set(given):
        raise ConfigError(
            "safe references alone have no other answers to be told from; give --harmful or --utility, or use "
            "--selector.form bilevel"
        )
    if config.form == "evidence" or "harmful" in given:
        return None
    if config.gamma == 0 or config.cotrain == 0:
        option = "gamma" if config.gamma == 0 else "cotrain"
        raise ConfigError(
            f"without harmful references the second twin learns from the pool alone, so selector.{option} must be "
            "above 0; or give --harmful, or use --selector.form evidence"
        )
    return (
        "without harmful references the twins fall back to SEAL's contrast: the model that also learns the safe "
        "references against an auxiliary one that learns the pool without them"
    )


def _teaching(answers: Answers, critical: npt.NDArray[np.bool_]) -> FloatArray:
    """What orders critical rows besides p(safe), shape [rows]: that a row has no fault is not all.

    How clearly it answers the two questions that make it critical; and, as far as the pool looks like the references,
    how much of a refusal it holds in all its words: training adds up over words, and a terse refusal teaches little.
    In a pool from elsewhere words are not known well enough for that, and long refusals of harmless requests come up.
    """
    result = np.zeros(len(critical))
    for question in (RISKY, REFUSES):
        clearly = _standardised(answers.log_odds[critical, QUESTIONS.index(question)])
        result[critical] += (1 - answers.near) * clearly
    result[critical] += answers.near * _standardised(answers.amount[critical])
    return result


def both(evidence: FloatArray, second: FloatArray, reason: npt.NDArray[np.str_], weight: float = 1.0) -> FloatArray:
    """Evidence throws out faults, it and a second measure order the rest.

    Rows whose reason is critical come first, by the sum of both, each standardised over those rows; the others follow
    by evidence alone, standardised over them. One row's score means little without its pool.

    Args:
        evidence: Log-odds of the safe class, shape [rows].
        second: `_teaching`, or the twins' contrast (loss under the other twin less that under the safe one), shape
            [rows].
        reason: Shape [rows].
        weight: Of `second` against evidence.
    """
    critical = reason == CRITICAL
    score = np.empty(len(reason))
    score[~critical] = _standardised(evidence[~critical])
    score[critical] = _standardised(evidence[critical]) + weight * _standardised(second[critical])
    if critical.any() and not critical.all():
        # A constant for all critical rows: lifts the lowest of them just above the best of the others.
        score[critical] += max(0.0, score[~critical].max() - score[critical].min() + 1e-6)
    return score


def _standardised(values: FloatArray) -> FloatArray:
    if not len(values):
        return values
    sample = np.sort(values)  # the sums are then the same in whatever order the rows came
    scale = sample.std()
    result: FloatArray = (values - sample.mean()) / (scale if scale > 0 else 1.0)
    return result
