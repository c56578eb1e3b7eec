"""The Pharmacist selector: evidence classes throw out faults, the contrast of safe and toxic twins orders the rest."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.progress import track
from pharmacist.core.seeding import derive
from pharmacist.data.records import last_requests
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import Batch, IntArray
from pharmacist.nn.distributed import barrier
from pharmacist.nn.models import model_fingerprint
from pharmacist.nn.passes import run_pass
from pharmacist.selectors import twins
from pharmacist.selectors.base import CRITICAL, Scores, SelectionContext, Selector
from pharmacist.selectors.evidence.classes import REASONS, EvidenceReferences, build_references
from pharmacist.selectors.evidence.combine import Combination, fit_combination, log_loss, log_odds, quality
from pharmacist.selectors.evidence.readers.adapters import adapter_losses, energy_log_posterior, train_class_adapter
from pharmacist.selectors.evidence.readers.lexical import LexicalReader
from pharmacist.selectors.evidence.readers.probe import ProbeReader, hidden_features
from pharmacist.selectors.jobs import Job, run_jobs
from pharmacist.selectors.options import PharmacistConfig


if TYPE_CHECKING:
    import datasets

    from pharmacist.data.tokenize import Encoded


FloatArray = npt.NDArray[np.float64]

FEWEST_REFERENCES = 8
_WORTH = {"lexical": 0.01, "probe": 0.01, "adapters": 0.03}
"""Nats of held-out cross-entropy that a reader must gain to be kept by ``readers: auto``; the adapters read a row once
per class, which costs about six times what the other two do together."""
_FORMAT = 2


class Pharmacist(Selector):
    """Ranks an alignment pool by what its rows look like and by what training on them does."""

    Config = PharmacistConfig
    needs = frozenset({"safe"})
    paper = "arXiv 2510.10085; evidence classes and closed form are this project's own"

    def __init__(self, config: PharmacistConfig) -> None:
        self.config = config
        self._trained: _Trained | None = None

    def notice(self, given: Collection[str]) -> str | None:
        """Says that the twins fall back to SEAL's contrast where there are no harmful references."""
        return _fall_back(self.config, given)

    def rank(self, context: SelectionContext) -> Scores:
        """Trains (or loads) readers and twins, passes over the pool once, and combines what they say."""
        work = _Worker(self.config, context)
        self._trained = work.load(context.resume_from) if context.resume_from else work.train()
        return work.score(self._trained)

    def check_saved(self, folder: Path, model: str | None) -> None:
        """It must be ours, and of the model that it was trained with."""
        _read_saved(folder, model)

    def save(self, folder: Path) -> bool:
        """Writes readers, adapters and combination: safetensors and JSON only."""
        if self._trained is None:
            return False
        self._trained.save(folder)
        return True


@dataclass
class _Trained:
    """What is learned from the references (and, for the twins, a share of the pool)."""

    config: PharmacistConfig
    model: str
    classes: tuple[str, ...]
    readers: tuple[str, ...]
    combination: Combination | None
    cheap_combination: Combination | None
    """Of the readers before the adapters, for the cascade."""
    lexical: LexicalReader | None
    probe: ProbeReader | None
    bank: AdapterBank | None
    thresholds: twins.Thresholds | None
    report: dict[str, Any]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Class adapters in use."""
        return self.classes if "adapters" in self.readers else ()

    @property
    def twins(self) -> tuple[str, ...]:
        """Twins in use."""
        if self.config.form == "evidence":
            return ()
        return twins.TWINS if "harmful" in self.classes else twins.WITHOUT_HARMFUL

    @property
    def reads_tokens(self) -> bool:
        """Whether scoring needs the model, and the pool in tokens."""
        return self.probe is not None or bool(self.adapters or self.twins)

    def save(self, folder: Path) -> None:
        if self.lexical is not None:
            self.lexical.save(folder / "lexical")
        if self.probe is not None:
            self.probe.save(folder / "probe")
        if self.bank is not None:
            for name in self.adapters + self.twins:
                self.bank.save(name, folder / "adapters" / name)
        write_json(folder / "selector.json", {
            "format": _FORMAT, "selector": "pharmacist", "config": asdict(self.config), "model": self.model,
            "classes": self.classes, "readers": self.readers,
            "combination": _combination_to_json(self.combination),
            "cheap_combination": _combination_to_json(self.cheap_combination),
            "thresholds": None if self.thresholds is None else asdict(self.thresholds), "report": self.report,
        })  # fmt: skip


def _combination_to_json(combination: Combination | None) -> dict[str, Any] | None:
    if combination is None:
        return None
    return {"weights": combination.weights, "bias": combination.bias.tolist(), "fitted": combination.fitted}


def _combination_from_json(value: dict[str, Any] | None) -> Combination | None:
    return None if value is None else Combination(value["weights"], np.array(value["bias"]), value["fitted"])


class _Worker:
    """One ranking: the context, and the steps from references to scores."""

    def __init__(self, config: PharmacistConfig, context: SelectionContext) -> None:
        self.config, self.context, self.run = config, context, context.run
        self.seed = derive(context.seed, "pharmacist")
        self._bank: AdapterBank | None = None
        self._encoded_references: Encoded | None = None
        self._base_tokens = 0

    # --- the parts that read tokens ------------------------------------------------------------------------------

    @property
    def bank(self) -> AdapterBank:
        if self._bank is None:
            self._bank = AdapterBank(
                self.context.model.model, self.config, self.seed, self.context.checkpoint_seconds
            )  # fmt: skip
        return self._bank

    @property
    def tokens_per_batch(self) -> int:
        vocabulary = getattr(self.context.model.model.config, "vocab_size", 32768)
        budget = 2**25 if self.context.model.device.type == "cpu" else 2**30
        return max(1024, min(65536, budget // int(vocabulary)))  # bounds the logits, the largest tensor of a pass

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a phase, with the tokens that go through the model in it (once per adapter)."""
        with self.run.phase(name) as phase:
            before = self.tokens()
            try:
                yield
            finally:
                phase.tokens += self.tokens() - before

    def tokens(self) -> int:
        return self._base_tokens + (self._bank.tokens if self._bank is not None else 0)

    def features(self, batch: Batch) -> FloatArray:
        """What the probe reads: the base model alone."""
        self._base_tokens += batch.tokens
        with self._bank.using(None) if self._bank is not None else nullcontext():
            return hidden_features(self.context.model.model, batch)

    @cached_property
    def pool(self) -> "datasets.Dataset":
        """The rows as they are read: the last request and its answer."""
        return last_requests(self.context.pool.dataset)

    @cached_property
    def encoded_pool(self) -> "Encoded":
        return self.context.encode(self.pool, "pool")

    def encode_references(self, references: EvidenceReferences) -> "Encoded":
        from pharmacist.data.records import to_dataset

        if self._encoded_references is None:
            self._encoded_references = self.context.encode(to_dataset(references.rows), "references")
        return self._encoded_references

    # --- training ------------------------------------------------------------------------------------------------

    def train(self) -> _Trained:
        config = self.config
        fallback = _fall_back(config, self.context.references)
        given = {name: list(last_requests(rows.dataset)) for name, rows in self.context.references.items()}
        for name, rows in given.items():
            if len(rows) < FEWEST_REFERENCES:
                raise DataError(f"--{name}: {len(rows)} rows are left, at least {FEWEST_REFERENCES} are needed")
        references = build_references(
            given, n_folds=config.folds, corruptions_per_row=config.corruptions_per_row, seed=self.seed
        )
        trained = _Trained(
            config=config, model="", classes=references.classes, readers=(), combination=None, cheap_combination=None,
            lexical=None, probe=None, bank=None, thresholds=None, report={"references": references.counts()},
        )  # fmt: skip
        if fallback is not None:
            trained.report["fallback"] = fallback
        trained.report["cannot_see"] = [REASONS[name] for name in REASONS if name not in references.classes]
        if config.form != "bilevel":
            with self.phase("train readers"):
                self.train_readers(trained, references)
        if config.form != "evidence":
            with self.phase("train twins"):
                self.train_twins(trained, references)
        if self.context.model_name is not None and trained.reads_tokens:
            trained.model = model_fingerprint(self.context.model_name)
        return trained

    def train_readers(self, trained: _Trained, references: EvidenceReferences) -> None:
        labels, n_classes = references.labels, len(references.classes)
        names = self.config.reader_names()
        out_of_fold: dict[str, FloatArray] = {}
        prompts = [str(row["prompt"]) for row in references.rows]
        completions = [str(row["completion"]) for row in references.rows]
        if "lexical" in names:
            out_of_fold["lexical"] = np.zeros((len(labels), n_classes))
            for fold in track(range(references.n_folds), "lexical reader, cross-fitting"):
                held = references.folds == fold
                reader = LexicalReader()
                reader.fit(_take(prompts, ~held), _take(completions, ~held), labels[~held], n_classes)
                out_of_fold["lexical"][held] = reader.log_posterior(_take(prompts, held), _take(completions, held))
            trained.lexical = LexicalReader().fit(prompts, completions, labels, n_classes)
        if "probe" in names:
            encoded = self.encode_references(references)
            features = self.reference_features(encoded)
            out_of_fold["probe"] = np.zeros((len(labels), n_classes))
            for fold in track(range(references.n_folds), "probe, cross-fitting"):
                held = references.folds == fold
                probe = ProbeReader().fit(features[~held], labels[~held], n_classes)
                out_of_fold["probe"][held] = probe.log_posterior(features[held])
            trained.probe = ProbeReader().fit(features, labels, n_classes)
        if "adapters" in names and (self.config.readers != "auto" or self.adapters_affordable(n_classes)):
            found = self.train_adapters(references, out_of_fold)
            if found is not None:
                out_of_fold["adapters"] = found
                trained.bank = self.bank
        self.combine(trained, references, out_of_fold)

    def adapters_affordable(self, n_classes: int) -> bool:
        """Whether training the class adapters reads no more rows than the pool has; on less even a look is dear."""
        config = self.config
        trained = n_classes * (config.adapter_folds + 1)
        return trained * config.adapter_steps * config.batch_size <= len(self.pool)

    def reference_features(self, encoded: "Encoded") -> FloatArray:
        result = run_pass(
            encoded, lambda batch: {"features": self.features(batch)}, work=self.run.work("probe"),
            device=self.context.model.device, tokens_per_batch=self.tokens_per_batch,
            description="probe, references",
        )  # fmt: skip
        return result["features"]

    def train_adapters(self, references: EvidenceReferences, cheaper: dict[str, FloatArray]) -> FloatArray | None:
        """Trains one adapter per class, and per class and fold for the out-of-fold predictions, which it returns.

        None where, under ``readers: auto``, the first fold shows that they add too little to the cheaper readers.
        """
        encoded, bank, classes = self.encode_references(references), self.bank, references.classes
        root, steps = self.run.work("adapters"), self.config.adapter_steps
        n_folds = min(self.config.adapter_folds, references.n_folds)
        folds = references.folds % n_folds

        def job(name: str, folder: Path, rows: IntArray) -> Job:
            def run(checkpoint: Path, advance: Any) -> None:
                train_class_adapter(
                    bank, name, encoded, rows, steps=steps, seed=self.seed, checkpoint=checkpoint, advance=advance
                )

            return Job((name,), folder, steps, run)

        def jobs(fold: int | None) -> list[Job]:
            made = []
            for label, name in enumerate(classes):
                rows = np.flatnonzero((references.labels == label) & (folds != fold))
                if not len(rows):
                    raise DataError(f"references of class {name} have too few prompts to hold some out; give more")
                made.append(job(name, root / ("final" if fold is None else f"fold{fold}"), rows))
            return made

        result = np.zeros((len(references.labels), len(classes)))
        for fold in range(n_folds):
            run_jobs(bank, jobs(fold), f"class adapters, fold {fold + 1}/{n_folds}")
            for name in classes:
                bank.load(name, root / f"fold{fold}" / name)
            held = np.flatnonzero(folds == fold)
            losses = run_pass(
                encoded, lambda batch: adapter_losses(bank, classes, batch), work=root / f"fold{fold}" / "losses",
                device=bank.device, tokens_per_batch=self.tokens_per_batch, rows=held,
                description=f"class adapters, held-out references {fold + 1}/{n_folds}",
            )  # fmt: skip
            result[held] = energy_log_posterior({key: value[held] for key, value in losses.items()})
            if fold == 0 and self.config.readers == "auto" and cheaper:
                before = {name: value[held] for name, value in cheaper.items()}
                if not _pays("adapters", before | {"adapters": result[held]}, references.labels[held]):
                    return None
        run_jobs(bank, jobs(None), "class adapters")
        for name in classes:
            bank.load(name, root / "final" / name)
        return result

    def combine(self, trained: _Trained, references: EvidenceReferences, out_of_fold: dict[str, FloatArray]) -> None:
        labels = references.labels
        kept = list(out_of_fold)
        if self.config.readers == "auto":
            # From the costliest: a reader stays if held-out references miss it.
            for name in reversed(kept.copy()):
                if len(kept) > 1 and not _pays(name, {n: out_of_fold[n] for n in kept}, labels):
                    kept.remove(name)
        trained.readers = tuple(kept)
        used = {name: out_of_fold[name] for name in kept}
        trained.combination = fit_combination(used, labels)
        cheap = {name: used[name] for name in kept if name != "adapters"}
        trained.cheap_combination = fit_combination(cheap, labels) if cheap else None
        trained.lexical = trained.lexical if "lexical" in kept else None
        trained.probe = trained.probe if "probe" in kept else None
        trained.report |= {
            "readers": kept, "left_out": [name for name in self.config.reader_names() if name not in kept],
            "weights": trained.combination.weights, "weights_fitted": trained.combination.fitted,
            "out_of_fold": {name: quality(value, labels, references.classes) for name, value in out_of_fold.items()}
            | {"combined": quality(trained.combination.log_posterior(used), labels, references.classes)},
        }  # fmt: skip

    def train_twins(self, trained: _Trained, references: EvidenceReferences) -> None:
        config, names = self.config, trained.twins
        encoded, bank, pool = self.encode_references(references), self.bank, self.encoded_pool
        trained.bank = bank
        rows = {
            name: np.flatnonzero((references.labels == references.classes.index(name)) & ~references.made)
            if name in references.classes
            else np.zeros(0, np.int64)
            for name in ("safe", "harmful", "utility")
        }
        pool_rows = twins.cotraining_rows(pool.content_keys, config.cotrain, self.seed)
        problem = twins.TwinProblem(
            references=encoded, rows=rows, pool=pool, pool_rows=pool_rows, gamma=config.gamma, mu=config.mu,
            steps=config.twin_steps, seed=self.seed,
        )  # fmt: skip
        root = self.run.work("twins")
        if config.solver == "gradient":
            folder = root / "gradient"
            run_jobs(bank, [twins.gradient_job(bank, problem, config.weight_rate, folder)], "twins")
        else:
            sigma = np.ones(len(pool_rows))
            for number in range(config.rounds):
                folder = root / f"round{number}"
                run_jobs(bank, twins.closed_form_jobs(bank, problem, sigma, folder), f"twins, round {number + 1}")
                if number + 1 < config.rounds and len(pool_rows):
                    self._load_twins(names, folder)
                    losses = self.measure_twins(names, pool, folder / "losses", pool_rows, "twins, co-trained rows")
                    safe, other = twins.safe_and_other(losses)
                    sigma = twins.sigma_closed_form((safe - other)[pool_rows], config.tau)
        self._load_twins(names, folder)
        every = np.concatenate([where for where in rows.values()])
        losses = self.measure_twins(names, encoded, folder / "reference-losses", every, "twins, references")
        trained.thresholds = twins.fit_thresholds(losses, rows)
        trained.report["twins"] = {
            "solver": config.solver, "cotrained_rows": len(pool_rows), "thresholds": asdict(trained.thresholds),
        }  # fmt: skip

    def _load_twins(self, names: tuple[str, ...], folder: Path) -> None:
        for name in names:
            self.bank.load(name, folder / name)

    def measure_twins(
        self, names: tuple[str, ...], sequences: "Encoded", work: Path, rows: IntArray, what: str
    ) -> dict[str, FloatArray]:
        return run_pass(
            sequences, lambda batch: twins.twin_losses(self.bank, batch, names), work=work, device=self.bank.device,
            tokens_per_batch=self.tokens_per_batch, rows=rows, description=what,
        )  # fmt: skip

    # --- loading a trained selector ------------------------------------------------------------------------------

    def load(self, folder: Path) -> _Trained:
        """Reads what an earlier run saved; nothing is trained."""
        folder, saved = _read_saved(folder, self.context.model_name)
        self.config = PharmacistConfig(**saved["config"])
        readers = tuple(saved["readers"])
        thresholds = saved["thresholds"]
        trained = _Trained(
            config=self.config, model=saved["model"], classes=tuple(saved["classes"]), readers=readers,
            combination=_combination_from_json(saved["combination"]),
            cheap_combination=_combination_from_json(saved["cheap_combination"]),
            lexical=LexicalReader.load(folder / "lexical") if "lexical" in readers else None,
            probe=ProbeReader.load(folder / "probe") if "probe" in readers else None,
            bank=None, thresholds=None if thresholds is None else twins.Thresholds(**thresholds),
            report=saved["report"],
        )  # fmt: skip
        adapters = trained.adapters + trained.twins
        if adapters:
            trained.bank = self.bank
            for name in adapters:
                self.bank.load(name, folder / "adapters" / name)
        return trained

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(self, trained: _Trained) -> Scores:
        with self.phase("score"):
            readers: dict[str, FloatArray] = {}
            if trained.lexical is not None:
                readers["lexical"] = self.score_lexical(trained.lexical)
            measured = self.score_pool(trained, readers)
        signals: dict[str, npt.NDArray[Any]] = {}
        evidence = reason = None
        if trained.combination is not None:
            evidence, reason = self._evidence(trained, readers, measured, signals)
        if not trained.twins:
            assert evidence is not None and reason is not None
            return Scores(evidence, reason, signals, trained.report)
        contrast = self._contrast(measured, signals)
        if evidence is None or reason is None:
            assert trained.thresholds is not None
            reasons = twins.twin_reasons(measured, trained.thresholds)
            return Scores(self._ordered_by_solver(contrast), reasons, signals, trained.report)
        return Scores(both(evidence, contrast, reason), reason, signals, trained.report)

    def score_lexical(self, reader: LexicalReader) -> FloatArray:
        dataset = self.pool
        parts = []
        for start in track(range(0, len(dataset), 8192), "lexical reader, pool"):
            rows = dataset[start : start + 8192]
            parts.append(reader.log_posterior(rows["prompt"], rows["completion"]))
        return np.concatenate(parts)

    def score_pool(self, trained: _Trained, readers: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """The pass over the pool (two under a cascade); fills `readers` and returns what the twins measured."""
        probe, cascade = trained.probe, self.config.cascade if trained.cheap_combination is not None else 0.0
        adapters_now = trained.adapters if not 0 < cascade < 1 else ()
        if not trained.reads_tokens:
            return {}

        def measure(batch: Batch) -> dict[str, FloatArray]:
            found: dict[str, FloatArray] = {}
            if probe is not None:
                found["probe"] = probe.log_posterior(self.features(batch))
            if adapters_now:
                found |= adapter_losses(self.bank, adapters_now, batch)
            if trained.twins:
                found |= twins.twin_losses(self.bank, batch, trained.twins)
            return found

        measured: dict[str, FloatArray] = {}
        if probe is not None or adapters_now or trained.twins:
            measured = self._pass(measure, "pool", None)
        if probe is not None:
            readers["probe"] = measured.pop("probe")
        if adapters_now:
            readers["adapters"] = energy_log_posterior(measured)
        elif trained.adapters:
            assert trained.cheap_combination is not None
            cheap = log_odds(trained.cheap_combination.log_posterior(readers))
            cut = np.quantile(cheap, 1 - self.context.fraction)
            keys = self.encoded_pool.content_keys
            near = np.lexsort((keys, np.abs(cheap - cut)))[: max(1, round(cascade * len(cheap)))]
            # Equal rows are read once, so that all of them can have what one of them is read for.
            rows = np.flatnonzero(np.isin(keys, keys[near]))
            losses = self._pass(lambda b: adapter_losses(self.bank, trained.adapters, b), "cascade", rows)
            readers["adapters"] = energy_log_posterior(losses)  # NaN on rows that were not read
        return measured

    def _pass(self, measure: Any, name: str, rows: IntArray | None) -> dict[str, FloatArray]:
        return run_pass(
            self.encoded_pool, measure, work=self.run.work("scores", name), device=self.context.model.device,
            tokens_per_batch=self.tokens_per_batch, rows=rows, description=f"reading the pool ({name})",
        )  # fmt: skip

    def _evidence(
        self,
        trained: _Trained,
        readers: dict[str, FloatArray],
        measured: dict[str, FloatArray],
        signals: dict[str, npt.NDArray[Any]],
    ) -> tuple[FloatArray, npt.NDArray[np.str_]]:
        assert trained.combination is not None
        used = {name: readers[name] for name in trained.readers}
        posterior = trained.combination.log_posterior(used)
        unread = np.isnan(posterior).any(1)
        if unread.any():
            assert trained.cheap_combination is not None
            posterior[unread] = trained.cheap_combination.log_posterior(used)[unread]
        for column, name in enumerate(trained.classes):
            signals[f"p_{name}"] = np.exp(posterior[:, column])
        for name, values in used.items():
            signals[f"{name}_log_odds"] = log_odds(values)
        reasons = np.array([REASONS[name] for name in trained.classes])
        return log_odds(posterior), reasons[posterior.argmax(1)]

    def _contrast(self, measured: dict[str, FloatArray], signals: dict[str, npt.NDArray[Any]]) -> FloatArray:
        safe, other = twins.safe_and_other(measured)
        signals |= {name: values for name, values in measured.items() if values is safe or values is other}
        signals["contrast"] = contrast = other - safe
        return contrast

    def _ordered_by_solver(self, contrast: FloatArray) -> FloatArray:
        if self.config.solver != "gradient" or self.context.resume_from is not None:
            return contrast
        barrier()
        logits = np.load(self.run.work("twins", "gradient", "logits.npy"), allow_pickle=False)
        keys = self.encoded_pool.content_keys
        rows = twins.cotraining_rows(keys, self.config.cotrain, self.seed)
        return twins.mean_over_copies(keys, rows, logits)  # equal rows were drawn apart


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
    if config.form != "bilevel" and config.corruptions_per_row == 0 and not {"harmful", "utility"} & set(given):
        raise ConfigError(
            "safe references alone have no other class to be told from; give --harmful or --utility, or set "
            "selector.corruptions_per_row above 0"
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


def both(evidence: FloatArray, contrast: FloatArray, reason: npt.NDArray[np.str_]) -> FloatArray:
    """Evidence throws out faults, contrast orders the rest.

    Rows whose reason is critical come first, by the sum of evidence and contrast, each standardised over those rows;
    the others follow by evidence alone, standardised over them. One row's score means little without its pool.

    Args:
        evidence: Log-odds of the safe class, shape [rows].
        contrast: Loss under the other twin less that under the safe one, shape [rows].
        reason: Shape [rows].
    """
    critical = reason == CRITICAL
    score = np.empty(len(reason))
    score[~critical] = _standardised(evidence[~critical])
    score[critical] = _standardised(evidence[critical]) + _standardised(contrast[critical])
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


def _take(items: list[str], mask: npt.NDArray[np.bool_]) -> list[str]:
    return [item for item, wanted in zip(items, mask, strict=True) if wanted]


def _pays(name: str, out_of_fold: dict[str, FloatArray], labels: IntArray) -> bool:
    """Whether held-out references miss a reader that is taken away."""
    rest = {other: values for other, values in out_of_fold.items() if other != name}
    return _loss_of(rest, labels) - _loss_of(out_of_fold, labels) >= _WORTH[name]


def _loss_of(out_of_fold: dict[str, FloatArray], labels: IntArray) -> float:
    return log_loss(fit_combination(out_of_fold, labels).log_posterior(out_of_fold), labels)
