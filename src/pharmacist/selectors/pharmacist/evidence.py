"""Evidence: what references, labels and the pool's own answers say of every row, question by question."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.decomposition import TruncatedSVD
from sklearn.model_selection import GroupKFold

from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path, read_json, under, write_json
from pharmacist.core.progress import track
from pharmacist.data.normalise import normalised_prompt
from pharmacist.readers import views
from pharmacist.readers.question import Question, can_be_held_out, quality
from pharmacist.readers.states import PARTS
from pharmacist.readers.views import Joined, States, Texts, View, Words
from pharmacist.selectors.base import FloatArray, IntArray
from pharmacist.selectors.pharmacist import questions, requests
from pharmacist.selectors.pharmacist.distance import as_far_as_known, distance, nearness
from pharmacist.selectors.pharmacist.echo import Echo
from pharmacist.selectors.pharmacist.questions import PERTINENT, QUESTIONS, REFUSES, RISKY, TYPICAL, UNKNOWN, WHOLE
from pharmacist.selectors.pharmacist.references import References


LABEL_WEIGHT = 3.0
"""What a labelled row of the pool counts against a reference, which comes from elsewhere."""
_LABEL_FOLDS = 5
_CHUNK = 8192
_SURE = 50.0  # log-odds as good as certainty, and still finite
_REQUEST_WIDTH = 256
_TYPICAL_WEIGHT = 4.0


def _views(question: str, names: tuple[str, ...]) -> dict[str, View]:
    """What the readers of a question see, by the reader's name; those of `RISKY` are `requests`."""
    every: dict[str, dict[str, View]] = {
        REFUSES: {
            "lexical": Words("completions"),
            "lexical opening": Words("completions", opening=True),
            "probe": States(("answer", "answer_end")),
        },
        WHOLE: {"lexical": Words("completions"), "probe": States(("answer", "answer_end"), statistics=True)},
        PERTINENT: {"lexical": Echo(), "probe": States(("answer", "answer_end"), statistics=True)},
        TYPICAL: {
            "lexical": Joined(Words("prompts"), Words("completions"), Echo()),
            "probe": States(PARTS, statistics=True),
        },
    }
    return {name: view for name, view in every.get(question, {}).items() if name.split()[0] in names}


@dataclass(frozen=True)
class Labels:
    """Rows of the pool (ascending positions) whose class a person told (index into `CLASSES`)."""

    rows: IntArray
    classes: IntArray

    def __len__(self) -> int:
        return len(self.rows)


NO_LABELS = Labels(np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Answers:
    """What evidence says of a pool.

    Attributes:
        log_odds: Of yes to each question, shape [rows, questions].
        typical: What it adds to the log-odds of a safe row that it looks like a safe reference as a whole; 0 where the
            pool is unlike the references; shape [rows].
        near: How far pool and references look like one source, in [0, 1].
        distance: See `distance.distance`.
        by_reader: Question and reader -> log-odds before they are combined, shape [rows].
        labels_held_out: Of labelled rows, `safe_log_odds` without any labels, and with those of other prompts.
    """

    log_odds: FloatArray
    typical: FloatArray
    near: float
    distance: dict[str, float] | None
    by_reader: dict[str, FloatArray]
    labels_held_out: tuple[FloatArray, FloatArray] | None = None


class Evidence:
    """Four questions, each with its own readers (``lexical``, ``probe``), references and calibration.

    All but ``risky`` are learned from references (and labels) by the readers of a `Question`; ``risky`` is learned
    from references, labels and the pool's own answers (`requests`).
    """

    def __init__(self, readers: tuple[str, ...]) -> None:
        self.names = readers
        self.report: dict[str, Any] = {}
        self._questions = {
            question: Question(partial(_views, question, readers)) for question in (*QUESTIONS, TYPICAL)
        }
        self._known: dict[str, IntArray] = {}
        self._references = Texts([], [])
        self._classes: IntArray = np.zeros(0, np.int64)

    def fit(self, references: References, texts: Texts) -> "Evidence":
        """Learns from references and, in the same order, what they say.

        Raises:
            DataError: Nothing tells refusals from other answers, or no reference can be held out.
        """
        self._references, self._classes = texts, references.labels
        counts = references.counts()
        self.report = {
            "references": counts,
            "readers": list(self.names),
            "questions": {},
            "held_out_by": "source" if references.by_source else "prompt",
        }
        for question, asked in track(self._questions.items(), "learning from references"):
            answers = questions.answers_to(question, references.labels)
            known = np.flatnonzero(answers != UNKNOWN)
            if question == RISKY:  # what was made has the requests of what was given
                known = known[~references.made[known]]
            self._known[question] = known
            own, answers, folds = texts.take(known), answers[known], references.folds[known]
            if len(set(answers.tolist())) < 2:
                continue  # nothing that tells yes from no: the question stays open
            if question not in (RISKY, REFUSES) and not can_be_held_out(answers, folds):
                continue  # what was made to answer it by no comes from one fold alone: likewise
            held_out = self._cross_fit(question, own, answers, folds)
            log_odds = asked.calibrate(held_out, answers)
            self.report["questions"][question] = {
                "yes": int(answers.sum()),
                "no": int((1 - answers).sum()),
                "combined": quality(log_odds, answers),
                **{name: {"auc": quality(values, answers)["auc"]} for name, values in held_out.items()},
            }
            asked.fit(own, answers)
        if not self._questions[REFUSES].spread:
            raise DataError("nothing tells refusals from other answers; give --harmful or --utility references")
        return self

    def _cross_fit(self, question: str, texts: Texts, answers: IntArray, folds: IntArray) -> dict[str, FloatArray]:
        """Log-odds of every reference by readers that did not see its fold."""
        if question != RISKY:
            return self._questions[question].held_out(texts, answers, folds)
        if not can_be_held_out(answers, folds):
            raise DataError("the references have too few different prompts to hold some out; give more")
        found = np.zeros(len(answers))
        for fold in np.unique(folds):
            held = folds == fold
            rest, own = texts.take(np.flatnonzero(~held)), texts.take(np.flatnonzero(held))
            features = self._request_features(rest, own)
            targets = np.concatenate([answers[~held], np.full(len(own), 0.5)])
            # Rows to be predicted take part with no weight.
            weights = np.concatenate([np.ones(len(rest)), np.full(len(own), 1e-12)])
            fitted = requests.leave_one_out(features, targets.astype(float), weights).fitted
            found[held] = requests.log_odds(fitted[len(rest) :])
        return {"requests": found}

    def _request_features(self, references: Texts, pool: Texts) -> FloatArray:
        """References first; standardised, shape [references + rows, features]."""
        both = references + pool
        blocks = []
        if "probe" in self.names and both.states is not None:
            blocks.append(requests.standardised(both.states[:, :2].reshape(len(both), -1).astype(np.float64)))
        if "lexical" in self.names:
            words = views.vectorizer().fit_transform([views.framed(prompt) for prompt in both.prompts])
            width = min(_REQUEST_WIDTH, *(n - 1 for n in words.shape))
            blocks.append(requests.standardised(TruncatedSVD(width, random_state=0).fit_transform(words)))
        return np.concatenate(blocks, axis=1)

    def answer(self, pool: Texts, labels: Labels = NO_LABELS) -> Answers:
        """Answers the questions for every row of a pool; where some have labels, readers learn from them too.

        The pool has each distinct row once, in an order of their content: sums then depend on nothing else.
        """
        # Regressions that differ in the labels they know: none, all, and all but those of some prompts.
        known, held = [NO_LABELS], []
        if len(labels):
            known.append(labels)
            groups = [normalised_prompt(pool.prompts[row]) for row in labels.rows]
            folds = min(_LABEL_FOLDS, len(set(groups)))
            for rest, test in GroupKFold(folds).split(groups, groups=groups) if folds > 1 else ():
                known.append(Labels(labels.rows[rest], labels.classes[rest]))
                held.append(test)
        by_reader = {
            question: self._read(question, pool, known)
            for question, asked in self._questions.items()
            if asked.readers and asked.spread
        }
        features = self._request_features(self._references.take(self._known[RISKY]), pool)
        answered = [self._answer(features, by_reader, variant, own) for variant, own in enumerate(known)]
        chosen = min(1, len(known) - 1)
        log_odds, _ = answered[chosen]
        safe = self._references.take(np.flatnonzero(self._classes == 0))
        found = distance(safe, pool.take(np.flatnonzero((log_odds[:, :2] > 0).all(1))))
        near = nearness(found)
        answered = [(as_far_as_known(odds, near), _TYPICAL_WEIGHT * near * looks) for odds, looks in answered]
        log_odds, typical = answered[chosen]
        held_out = None
        if len(labels):
            scores = [questions.safe_log_odds(questions.class_log_posterior(*pair)) for pair in answered]
            after = np.full(len(labels), np.nan)
            for positions, score in zip(held, scores[2:], strict=True):
                after[positions] = score[labels.rows[positions]]
            held_out = scores[0][labels.rows], after
        signals = {
            f"{question}_{name.replace(' ', '_')}": values[:, chosen]
            for question, readers in by_reader.items()
            for name, values in readers.items()
        }
        return Answers(log_odds, typical, near, found, signals, held_out)

    def _answer(
        self, features: FloatArray, by_reader: Mapping[str, Mapping[str, FloatArray]], variant: int, labels: Labels
    ) -> tuple[FloatArray, FloatArray]:
        """Log-odds of yes to each question, shape [rows, questions], and how typical rows look, shape [rows]."""
        own = {
            question: {name: values[:, variant] for name, values in readers.items()}
            for question, readers in by_reader.items()
        }
        # A question that no reference answers by no is answered by yes for all.
        log_odds = np.full((len(features) - len(self._known[RISKY]), len(QUESTIONS)), _SURE)
        for column, question in enumerate(QUESTIONS):
            if question in own:
                log_odds[:, column] = self._questions[question].calibrated(own[question])
        log_odds[:, 0] = self._risky(features, log_odds[:, 1], labels)
        return log_odds, self._questions[TYPICAL].combined(own[TYPICAL])

    def _read(self, question: str, pool: Texts, known: list[Labels]) -> dict[str, FloatArray]:
        """Log-odds of the pool's rows by each reader, for each set of labels, shape [rows, sets]; one pass."""
        by_reader = {}
        references = self._known[question]
        for name, reader in self._questions[question].readers.items():
            fits = [reader.coefficients]
            if len(known) > 1:
                every = known[1]
                features = reader.features(self._references.take(references) + pool.take(every.rows))
                rotated, back = views.into_row_space(features)  # once for all sets of labels
            for labels in known[1:]:
                told = np.flatnonzero(questions.answers_to(question, labels.classes) != UNKNOWN)
                own = len(references) + np.searchsorted(every.rows, labels.rows[told])
                rows = np.concatenate([np.arange(len(references)), own])
                classes = np.concatenate([self._classes[references], labels.classes[told]])
                weights = np.repeat([1.0, LABEL_WEIGHT], [len(references), len(told)])
                answers = questions.answers_to(question, classes)
                found, intercept = views.fit_logistic(rotated[rows], answers, weights, reader.regularisation)
                fits.append((back(found), intercept))
            coefficients = np.stack([fit[0] for fit in fits], axis=1)
            intercepts = np.array([fit[1] for fit in fits])
            parts = []
            for start in track(range(0, len(pool), _CHUNK), f"reading the pool: {question}, {name}"):
                some = pool.take(np.arange(start, min(start + _CHUNK, len(pool))))
                parts.append(np.asarray(reader.features(some) @ coefficients) + intercepts)
            by_reader[name] = np.concatenate(parts)
        return by_reader

    def _risky(self, features: FloatArray, refuses: FloatArray, labels: Labels) -> FloatArray:
        """Log-odds that a row's request is harmful, by references and by the answers of all other rows."""
        references = self._known[RISKY]
        targets = np.concatenate([questions.answers_to(RISKY, self._classes[references]), expit(refuses)])
        weights = np.ones(len(targets))
        told = np.flatnonzero(questions.answers_to(RISKY, labels.classes) != UNKNOWN)
        where = len(references) + labels.rows[told]
        targets[where], weights[where] = questions.answers_to(RISKY, labels.classes[told]), LABEL_WEIGHT
        found = requests.leave_one_out(features, targets, weights)
        predicted = found.held_out[len(references) :].copy()
        predicted[labels.rows[told]] = found.fitted[where]
        return requests.log_odds(predicted)

    def save(self, folder: Path) -> None:
        """Writes all that `answer` needs, the references among it: safetensors and JSON."""
        tensors: dict[str, npt.NDArray[Any]] = {"classes": self._classes}
        tensors |= {f"known.{question}": rows for question, rows in self._known.items()}
        learned: dict[str, dict[str, Any]] = {"spread": {}, "calibration": {}, "readers": {}}
        for question, asked in self._questions.items():
            if asked.spread:
                found, content = asked.state()
                tensors |= {f"{question}.{key}": value for key, value in found.items()}
                learned["spread"][question] = content["spread"]
                learned["calibration"][question] = content["calibration"]
                learned["readers"] |= {f"{question}.{name}": own for name, own in content["readers"].items()}
        if self._references.states is not None and self._references.statistics is not None:
            tensors |= {"states": self._references.states, "statistics": self._references.statistics}
        with atomic_path(folder / "evidence.safetensors") as path:
            save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
        write_json(
            folder / "evidence.json",
            {
                "names": self.names,
                "report": self.report,
                **learned,
                "prompts": list(self._references.prompts),
                "completions": list(self._references.completions),
            },
        )

    @classmethod
    def load(cls, folder: Path) -> "Evidence":
        """Reads what `save` wrote.

        Raises:
            DataError: It is not whole.
        """
        try:
            content, tensors = read_json(folder / "evidence.json"), load_file(folder / "evidence.safetensors")
            evidence = cls(tuple(content["names"]))
            evidence.report = content["report"]
            evidence._classes = tensors["classes"]
            evidence._known = under("known.", tensors)
            evidence._references = Texts(
                content["prompts"], content["completions"], tensors.get("states"), tensors.get("statistics")
            )
            for question, spread in content["spread"].items():
                readers = under(f"{question}.", content["readers"])
                own = {"spread": spread, "calibration": content["calibration"][question], "readers": readers}
                evidence._questions[question].load(under(f"{question}.", tensors), own)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
            raise DataError(f"{folder}: cannot be read as saved evidence ({error!r}); rank with it anew") from error
        return evidence
