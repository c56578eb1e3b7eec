"""The selector ``pharmacist``: evidence gives rows a class, twins may order the best of them; saving and loading."""

import shutil
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.hashing import sha256_json
from pharmacist.core.seeding import derive
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.data.records import last_requests, to_dataset
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.models import model_fingerprint
from pharmacist.readers.kept import ModelReader, read_texts, row_keys
from pharmacist.readers.views import Texts
from pharmacist.selectors.base import Scores, SelectionContext, Selector
from pharmacist.selectors.gradients import bank_phase
from pharmacist.selectors.options import PharmacistConfig
from pharmacist.selectors.pharmacist import twins as bilevel
from pharmacist.selectors.pharmacist.evidence import Evidence
from pharmacist.selectors.pharmacist.questions import Labels
from pharmacist.selectors.pharmacist.references import REASONS, References, build_references
from pharmacist.selectors.pharmacist.twins import Twins
from pharmacist.selectors.pharmacist.verdict import joint_scores, verdict, with_labels


FORMAT = 3
"""Version of what a saved selector holds."""
KEPT = "states"
"""Subfolder of a saved selector: the hidden states of every row."""
_LEAST_AUC = 0.7
"""Held-out AUC from which the twins' contrast orders the rows that evidence calls critical."""
_OF_REASON = {reason: number for number, reason in reversed(list(enumerate(REASONS.values())))}


class PharmacistSelector(Selector):
    """Ranks an alignment pool by the content of its rows and, optionally, by the effect of training on them."""

    Config = PharmacistConfig
    name = "pharmacist"
    needs = frozenset({"safe"})
    uses = frozenset({"harmful", "utility", "model"})
    suggests_labels = True
    paper = "arXiv 2510.10085; the questions of the evidence and the closed form are this project's own"

    _ranking: "_Ranking | None" = None

    def notice(self, given: Collection[str]) -> str | None:
        """A sentence where there are no harmful references, and the twins fall back to SEAL's contrast."""
        config = self.config
        if config.form != "bilevel" and not {"harmful", "utility"} & set(given):
            raise ConfigError(
                "safe references alone offer no other answers to compare with; give --harmful or --utility, or use "
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

    def rank(self, context: SelectionContext) -> Scores:
        """Learns from references and labels (or loads what was learned), and reads the pool once."""
        self._ranking = _Ranking(self.config, context)
        return self._ranking.scores(None if context.resume_from else self.notice(context.references))

    def check_saved(self, folder: Path, model: str | None) -> None:
        _read_saved(folder, model)

    def save(self, folder: Path) -> bool:
        """Writes evidence, twins and the rows' hidden states: safetensors and JSON only."""
        if self._ranking is None:
            return False
        self._ranking.save(folder)
        return True


def _read_saved(folder: Path, model: str | None) -> tuple[Path, PharmacistConfig]:
    """The folder of a saved selector, and its options; checks that it fits the model."""
    folder = folder / "selector" if (folder / "selector" / "selector.json").is_file() else folder
    path = folder / "selector.json"
    if not path.is_file():
        raise DataError(f"{folder}: no selector.json; --resume-selector needs the folder of an earlier curate")
    saved = read_json(path)
    if not isinstance(saved, dict) or saved.get("selector") != "pharmacist" or saved.get("format") != FORMAT:
        raise DataError(f"{path}: not written by this version of the selector 'pharmacist'; train it again")
    try:
        trained_on, config = saved["model"], PharmacistConfig(**saved["config"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: is not as it was written ({error!r}); train the selector again") from error
    if trained_on:
        if model is None:
            raise ConfigError("the saved selector reads with a model; give --model")
        if model_fingerprint(model) != trained_on:
            raise DataError(f"{path}: was trained on another model than {model}; give that one")
    return folder, config


class _Ranking:
    """One ranking of a pool, from references to scores."""

    def __init__(self, config: PharmacistConfig, context: SelectionContext) -> None:
        self.config, self.context, self.run = config, context, context.run
        self.seed = derive(context.seed, "pharmacist")
        self.evidence: Evidence | None = None
        self.twins: Twins | None = None
        self.saved: Path | None = None
        if context.resume_from is not None:
            self.saved, self.config = _read_saved(context.resume_from, context.model_name)
        self.readers = self.config.reader_names(model=context.model_name is not None)
        if "probe" in self.readers and context.model_name is None:
            raise ConfigError(
                "selector.readers: the probe reads hidden states; give --model, or --selector.readers lexical"
            )

    @cached_property
    def pool(self) -> datasets.Dataset:
        """The pool's rows, each reduced to its last request and answer."""
        return last_requests(self.context.pool.dataset)

    @cached_property
    def distinct(self) -> tuple[IntArray, IntArray]:
        """Rows of the pool with different texts, in an order of their content; and each row's number among them."""
        keys = row_keys(self.pool["prompt"][:], self.pool["completion"][:])
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        return first.astype(np.int64), inverse.astype(np.int64)

    @cached_property
    def references(self) -> References:
        """References of all classes."""
        context = self.context
        return build_references(
            {name: list(last_requests(context.reference_rows(name))) for name in context.references},
            n_folds=self.config.folds,
            corruptions_per_row=self.config.corruptions_per_row,
            seed=self.seed,
            sources=context.sources,
        )

    @cached_property
    def labels(self) -> Labels:
        """A person's labels of `distinct` rows; of copies with several labels the last one counts."""
        _, inverse = self.distinct
        class_of = {int(inverse[row]): _OF_REASON[reason] for row, reason in sorted(self.context.labels.items())}
        rows = np.array(sorted(class_of), dtype=np.int64)
        return Labels(rows, np.array([class_of[row] for row in rows], dtype=np.int64))

    def scores(self, fallback: str | None) -> Scores:
        """Scores of the pool by evidence, twins, or both; `fallback` is the selector's notice, for the report."""
        evidence = self._evidence() if self.config.form != "bilevel" else None
        if evidence is not None and self.config.form == "evidence":
            return evidence
        twins, losses = self._twins()
        contrast, labels = bilevel.contrast(losses), self.labels.of_copies(self.distinct[1])
        signals: dict[str, npt.NDArray[Any]] = {**losses, "contrast": contrast}
        report: dict[str, Any] = {"twins": twins.report} | ({} if fallback is None else {"fallback": fallback})
        if evidence is None:
            assert twins.thresholds is not None
            keys = self.context.encoded["pool"].content_keys
            order = contrast if self.saved else twins.ordered(contrast, keys, self.run.work("twins"), self.seed)
            return Scores(*with_labels(order, bilevel.twin_reasons(losses, twins.thresholds), labels), signals, report)
        used = twins.quality is not None and twins.quality >= _LEAST_AUC
        report["twins"]["used"] = used
        score = joint_scores(evidence.score, contrast, evidence.reason) if used else evidence.score
        score, reason = with_labels(score, evidence.reason, labels)
        return replace(
            evidence, score=score, reason=reason, signals=evidence.signals | signals, report=evidence.report | report
        )

    def _evidence(self) -> Scores:
        # Evidence of the same references: that of a saved selector, or of this very run before it had labels.
        folder, before = self.saved, self.run.path("selector")
        if folder is None and self.context.labels and (before / "evidence.json").is_file():
            folder = before
        with self.run.phase("read references") as phase:
            if folder is not None:
                self.evidence = Evidence.load(folder)
                self.readers = self.evidence.names
            else:
                texts, tokens = self._read(to_dataset(self.references.rows), "references")
                phase.tokens += tokens
                self.evidence = Evidence(self.readers).fit(self.references, texts)
        with self.run.phase("read pool") as phase:
            texts, tokens = self._read(self.pool, "pool")
            phase.tokens += tokens
        first, inverse = self.distinct
        with self.run.phase("answer"):
            answers = self.evidence.answer(texts.take(first), self.labels)
        return verdict(answers, self.labels, inverse, self.evidence.report)

    def _read(self, rows: Any, name: str) -> tuple[Texts, int]:
        """Rows as texts, with hidden states where the probe reads them; and how many tokens the model read."""
        if "probe" not in self.readers:
            return read_texts(rows, name, None)
        context = self.context
        assert context.model_name is not None
        model = model_fingerprint(context.model_name)
        reader = ModelReader(
            key=sha256_json([model, context.dtype, context.template, context.max_length]),
            folder=self.run.work("states"),
            earlier=[folder / KEPT for folder in (self.run.path("selector"), self.saved) if folder is not None],
            encode=context.encode,
            model=lambda: context.model,
        )
        return read_texts(rows, name, reader)

    def _twins(self) -> tuple[Twins, dict[str, FloatArray]]:
        """The twins, and the pool's losses under them."""
        context, pool = self.context, self.context.encode(self.pool, "pool")
        bank = AdapterBank(context.model.model, self.config, self.seed, context.checkpoint_seconds)
        if self.saved is not None:
            twins = Twins.load(bank, self.config, self.saved / "twins")
        else:
            twins = Twins(bank, self.config)
            with bank_phase(self.run, "train twins", bank):
                encoded = context.encode(to_dataset(self.references.rows), "references")
                twins.fit(encoded, self.references, pool, self.run.work("twins"), self.seed)
        self.twins = twins
        with bank_phase(self.run, "score with twins", bank):
            return twins, twins.losses(pool, self.run.work("scores", "twins"), "reading the pool with the twins")

    def save(self, folder: Path) -> None:
        """Writes evidence, twins, hidden states, and ``selector.json`` last."""
        if self.evidence is not None:
            self.evidence.save(folder)
        if self.twins is not None:
            self.twins.save(folder / "twins")
        for path in sorted(self.run.work("states").glob("*.safetensors")):
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
