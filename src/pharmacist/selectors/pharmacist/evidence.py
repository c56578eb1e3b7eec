"""Evidence: answers the questions for every row of a pool, after learning from references and labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.model_selection import GroupKFold

from pharmacist.core.errors import DataError
from pharmacist.core.files import atomic_path, read_json, write_json
from pharmacist.core.mappings import under
from pharmacist.core.progress import track
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.data.normalise import normalised_prompt
from pharmacist.readers import views
from pharmacist.readers.question import Question, can_be_held_out, quality
from pharmacist.readers.states import PARTS
from pharmacist.readers.views import Joined, Reader, States, Texts, View, Words
from pharmacist.selectors.pharmacist import questions
from pharmacist.selectors.pharmacist.distance import adjusted_for_distance, distance, nearness
from pharmacist.selectors.pharmacist.echo import Echo
from pharmacist.selectors.pharmacist.questions import PERTINENT, QUESTIONS, REFUSES, RISKY, TYPICAL, WHOLE, Labels
from pharmacist.selectors.pharmacist.references import References
from pharmacist.selectors.pharmacist.requests import RequestQuestion


_LABEL_FOLDS = 5
_CHUNK = 8192
_SURE = 50.0  # log-odds as good as certainty, and still finite
_TYPICAL_WEIGHT = 4.0


def _views(question: str, names: tuple[str, ...]) -> dict[str, View]:
    """The views of a question's readers, by the reader's name; none for `RISKY`."""
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
class Answers:
    """The answers for a pool's rows.

    Attributes:
        log_odds: Of yes to each question, shape [rows, questions].
        typical: Added to the log-odds of the safe class, for likeness to the safe references as a whole; 0 where the
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

    All but ``risky`` are learned from references (and labels) by the readers of a `Question`; ``risky`` is a
    `RequestQuestion`, which learns from the pool's own answers too.
    """

    def __init__(self, readers: tuple[str, ...]) -> None:
        self.names = readers
        self.report: dict[str, Any] = {}
        self._risky = RequestQuestion(readers)
        self._questions: dict[str, Question] = {RISKY: self._risky}
        for question in (*QUESTIONS[1:], TYPICAL):
            self._questions[question] = Question(_views(question, readers))
        self._known: dict[str, IntArray] = {}
        self._references = Texts([], [])
        self._classes: IntArray = np.zeros(0, np.int64)

    def fit(self, references: References, texts: Texts) -> "Evidence":
        """Learns from references, `texts` in the same order.

        A DataError where nothing tells refusals from other answers, or no reference can be held out.
        """
        self._references, self._classes = texts, references.labels
        self.report = {
            "references": references.counts(),
            "readers": list(self.names),
            "questions": {},
            "held_out_by": "source" if references.by_source else "prompt",
        }
        for question, asked in track(self._questions.items(), "learning from references"):
            known = np.flatnonzero(questions.answers_to(question, references.labels) != questions.UNKNOWN)
            if question == RISKY:  # what was made has the requests of what was given
                known = known[~references.made[known]]
            self._known[question] = known
            known_texts, answers = self._references_of(question)
            folds = references.folds[known]
            if len(set(answers.tolist())) < 2:
                continue  # nothing that tells yes from no: the question stays open
            if question not in (RISKY, REFUSES) and not can_be_held_out(answers, folds):
                continue  # what was made to answer it by no comes from one fold alone: likewise
            log_odds, held_out = asked.learn(known_texts, answers, folds)
            self.report["questions"][question] = {
                "yes": int(answers.sum()),
                "no": int((1 - answers).sum()),
                "combined": quality(log_odds, answers),
                **{name: {"auc": quality(values, answers)["auc"]} for name, values in held_out.items()},
            }
        if not self._questions[REFUSES].spread:
            raise DataError("nothing tells refusals from other answers; give --harmful or --utility references")
        return self

    def _references_of(self, question: str) -> tuple[Texts, IntArray]:
        """The references that a question is learned from, and their answers (1 or 0)."""
        rows = self._known[question]
        return self._references.take(rows), questions.answers_to(question, self._classes[rows])

    def answer(self, pool: Texts, labels: Labels = questions.NO_LABELS) -> Answers:
        """Answers the questions for every row of a pool; where some have labels, readers learn from them too.

        The pool has each distinct row once, in an order of their content: sums then depend on nothing else.
        """
        # Regressions that differ in the labels they learn from: none, all, and all but those of some prompts.
        variants, held = [questions.NO_LABELS], []
        if len(labels):
            variants.append(labels)
            groups = [normalised_prompt(pool.prompts[row]) for row in labels.rows]
            folds = min(_LABEL_FOLDS, len(set(groups)))
            for rest, test in GroupKFold(folds).split(groups, groups=groups) if folds > 1 else ():
                variants.append(labels.take(rest))
                held.append(test)
        chosen = min(1, len(variants) - 1)
        by_reader = {
            question: self._read(question, pool, variants)
            for question, asked in self._questions.items()
            if asked.readers and asked.spread
        }
        known, known_answers = self._references_of(RISKY)
        features = self._risky.features(known, pool)

        def answered(variant: int) -> tuple[FloatArray, FloatArray]:
            """Log-odds of yes to each question, shape [rows, questions], and how typical rows look, shape [rows]."""
            read = {
                question: {name: values[:, variant] for name, values in readers.items()}
                for question, readers in by_reader.items()
            }
            # A question that no reference answers by no is answered by yes for all.
            log_odds = np.full((len(pool), len(QUESTIONS)), _SURE)
            for column, question in enumerate(QUESTIONS):
                if question in read:
                    log_odds[:, column] = self._questions[question].calibrated(read[question])
            log_odds[:, 0] = self._risky.of_pool(features, known_answers, log_odds[:, 1], variants[variant])
            return log_odds, self._questions[TYPICAL].combined(read[TYPICAL])

        pairs = [answered(variant) for variant in range(len(variants))]
        safe = self._references.take(np.flatnonzero(self._classes == 0))
        found = distance(safe, pool.take(np.flatnonzero((pairs[chosen][0][:, :2] > 0).all(1))))
        near = nearness(found)
        pairs = [(adjusted_for_distance(log_odds, near), _TYPICAL_WEIGHT * near * looks) for log_odds, looks in pairs]
        held_out = None
        if len(labels):
            scores = [questions.safe_log_odds(questions.class_log_posterior(*pair)) for pair in pairs]
            after = np.full(len(labels), np.nan)
            for positions, score in zip(held, scores[2:], strict=True):
                after[positions] = score[labels.rows[positions]]
            held_out = scores[0][labels.rows], after
        signals = {
            f"{question}_{name.replace(' ', '_')}": values[:, chosen]
            for question, readers in by_reader.items()
            for name, values in readers.items()
        }
        return Answers(*pairs[chosen], near, found, signals, held_out)

    def _read(self, question: str, pool: Texts, variants: list[Labels]) -> dict[str, FloatArray]:
        """Log-odds of the pool's rows by each reader, for each set of labels, shape [rows, sets]; one pass."""
        by_reader = {}
        for name, reader in self._questions[question].readers.items():
            fits = [reader.coefficients, *self._refitted(question, reader, pool, variants[1:])]
            coefficients = np.stack([fit[0] for fit in fits], axis=1)
            intercepts = np.array([fit[1] for fit in fits])
            parts = []
            for start in track(range(0, len(pool), _CHUNK), f"reading the pool: {question}, {name}"):
                some = pool.take(np.arange(start, min(start + _CHUNK, len(pool))))
                parts.append(np.asarray(reader.features(some) @ coefficients) + intercepts)
            by_reader[name] = np.concatenate(parts)
        return by_reader

    def _refitted(
        self, question: str, reader: Reader, pool: Texts, variants: list[Labels]
    ) -> Iterator[tuple[FloatArray, float]]:
        """What a reader learns from references and each set of labels, of which the first holds all others."""
        if not variants:
            return
        known, known_answers = self._references_of(question)
        every = variants[0].rows
        rotated, back = views.into_row_space(reader.features(known + pool.take(every)))  # once for all sets
        for labels in variants:
            labelled, answers = labels.answering(question)
            rows = np.concatenate([np.arange(len(known)), len(known) + np.searchsorted(every, labelled)])
            weights = np.repeat([1.0, questions.LABEL_WEIGHT], [len(known), len(labelled)])
            answers = np.concatenate([known_answers, answers])
            coefficients, intercept = views.fit_logistic(rotated[rows], answers, weights, reader.regularisation)
            yield back(coefficients), intercept

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
                learned["readers"] |= {f"{question}.{name}": state for name, state in content["readers"].items()}
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
        """Reads what `save` wrote; a DataError where it is not whole."""
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
                state = {"spread": spread, "calibration": content["calibration"][question], "readers": readers}
                evidence._questions[question].load(under(f"{question}.", tensors), state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
            raise DataError(f"{folder}: cannot be read as saved evidence ({error!r}); rank without it") from error
        return evidence
