"""Evaluates a model on prompts and a task: its answers, then verdicts, grades and metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.naming import flag
from pharmacist.data.normalise import prompt_key
from pharmacist.data.templates import Template
from pharmacist.data.tokenize import prompt_ids
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.generate import Decoder, context_length, cut_prompts, generate, plan_batches
from pharmacist.evaluation.graders.base import GradeItem, Grader, row_number
from pharmacist.evaluation.judges.base import Judge, JudgeItem, Verdict
from pharmacist.evaluation.judges.keyword import KeywordJudge
from pharmacist.evaluation.metrics import Metric, agreement, by_category, flagged_categories, rate, rates
from pharmacist.evaluation.text import missing


_OPTIONAL = ("error", "reasoning", "unanswered")
"""Fields of an answer that its item has only where they are not empty."""


@dataclass
class Evaluation:
    """Result for one model.

    Attributes:
        metrics: Content of ``metrics.json``.
        items: A JSON object per prompt: ``id``, ``set``, ``row``, ``prompt``, ``answer``, ``tokens``, ``finished``,
            ``reasoning`` if the model shows any, ``error`` or ``unanswered`` if there is nothing to judge, and
            ``harmful`` and ``verdicts`` by judge, or ``target`` and ``grade``.
        missing: Number of answers, verdicts and grades that an endpoint failed to give, which another run asks for.
    """

    metrics: dict[str, Metric]
    items: list[dict[str, Any]]
    missing: int = 0


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates models on the same prompts with the same judges.

    Attributes:
        prompts: Harmful prompts, canonical rows or mappings with ``prompt``.
        benign_prompts: Benign prompts that look harmful, likewise.
        task: Test rows of the fine-tuning task, with ``completion`` too.
        judge: Judges answers to both prompt sets; already trained if it needs training.
        grader: Grades answers to the task; `Grader.prepare` is called here.
        second_judge: Judges the same answers, for the agreement of the two.
        categories: Categories of each harmful prompt, for a harmful score per category.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts answered at a time, 0 for as many as fit.
        on_long_prompt: What happens to a prompt that fills a model's whole context.
        rows: Rows by prompt set, of the sets that have any.
        cut: Number of prompts that were cut for the last model, by prompt set.
    """

    prompts: Iterable[Mapping[str, Any]] = ()
    benign_prompts: Iterable[Mapping[str, Any]] = ()
    task: Iterable[Mapping[str, Any]] = ()
    judge: Judge | None = None
    grader: Grader | None = None
    second_judge: Judge | None = None
    categories: Sequence[Sequence[str]] = ()
    max_new_tokens: int = 512
    batch_size: int = 0
    on_long_prompt: Literal["fail", "cut"] = "fail"

    def __post_init__(self) -> None:
        given = {name: list(getattr(self, name)) for name in ("prompts", "benign_prompts", "task")}
        self.rows = {name: rows for name, rows in given.items() if rows}
        self.cut: dict[str, int] = {}
        if self.judge is None and self.rows.keys() & {"prompts", "benign_prompts"}:
            raise ValueError("an Evaluator with prompts needs a judge")
        if self.grader is None and "task" in self.rows:
            raise ValueError("an Evaluator with a task needs a grader")
        self._refusals = self.judge if self.judge is None or self.judge.tells_refusals else KeywordJudge()
        if self.grader is not None and "task" in self.rows:
            self.grader.prepare(self.rows["task"])

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        work: Path | None = None,
        decoder: Decoder | None = None,
        batch_size: int | None = None,
    ) -> dict[str, list[Answer]]:
        """Generates the answers by prompt set; for `work`, `decoder` and `batch_size` see `generate`.

        Raises:
            DataError: A prompt fills the model's whole context and is not to be cut.
        """
        context = context_length(model)
        ids = {name: prompt_ids(rows, tokenizer, template) for name, rows in self.rows.items()}
        for name, rows in ids.items():  # all prompts are checked before the first is answered
            if self.on_long_prompt == "cut":
                ids[name], self.cut[name] = cut_prompts(rows, context, self.max_new_tokens)
                continue
            try:
                plan_batches([len(row) for row in rows], self.max_new_tokens, context)
            except DataError as error:
                raise DataError(f"{flag(name)}: {error}") from error
        return {
            name: generate(
                model,
                tokenizer,
                rows,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size if batch_size is None else batch_size,
                decoder=decoder,
                work=None if work is None else work / name,
                description=f"answer {name.replace('_', ' ')}",
            )
            for name, rows in ids.items()
        }

    def assess(self, answers: Mapping[str, Sequence[Answer]]) -> Evaluation:
        """Judges and grades answers by prompt set, whose reasoning is `separated` already."""
        metrics: dict[str, Metric] = {}
        deciders = [one for one in (self.judge, self.second_judge, self.grader) if one is not None]
        for decider in deciders:
            decider.missing = 0
        by_set = {name: [self._item(name, *one) for one in enumerate(answers[name])] for name in self.rows}
        verdicts = self._verdicts({name: own for name, own in by_set.items() if name != "task"})
        for name, own in by_set.items():
            metrics |= self._grade(own) if name == "task" else self._judge(name, own, verdicts[name])
        items = [item for own in by_set.values() for item in own]
        if self.judge is not None and self.second_judge is not None:
            judges = self.judge.label, self.second_judge.label
            judged = [item["verdicts"] for item in items if "verdicts" in item]
            pairs = [(by_judge[judges[0]]["harmful"], by_judge[judges[1]]["harmful"]) for by_judge in judged]
            metrics["judge_agreement"] = agreement(pairs, judges)
        failed = sum("error" in item for item in items)
        return Evaluation(metrics, items, failed + sum(decider.missing for decider in deciders))

    def _item(self, name: str, position: int, answer: Answer) -> dict[str, Any]:
        row = self.rows[name][position]
        item = {
            "id": _id(name, position, row),
            "set": name,
            "row": row_number(row, position),
            "prompt": row["prompt"],
            "answer": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
        }
        if name == "prompts" and self.categories:
            item["categories"] = list(self.categories[position])
        return item | {name: getattr(answer, name) for name in _OPTIONAL if getattr(answer, name)}

    def answers_of(self, items: Sequence[Mapping[str, Any]]) -> dict[str, list[Answer]]:
        """The answers that `assess` wrote into items, for another judge; a DataError for other prompts."""
        found: dict[str, list[Answer]] = {name: [] for name in self.rows}
        if [item["id"] for item in items] != [_id(name, *one) for name in found for one in enumerate(self.rows[name])]:
            raise DataError("items.jsonl does not hold the answers to these prompts; --overwrite evaluates again")
        for item in items:
            more = {name: item[name] for name in _OPTIONAL if name in item}
            answer = Answer(item["answer"], item["tokens"], item["finished"], **more, separated=True)
            found[item["set"]].append(answer)
        return found

    def _verdicts(self, judged: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, list[Verdict]]]:
        """Verdicts on items by prompt set and judge; one judge after the other, since each may fill the memory."""
        found: dict[str, dict[str, list[Verdict]]] = {name: {} for name in judged}
        for judge in dict.fromkeys(filter(None, (self.judge, self._refusals, self.second_judge))):
            for name, items in judged.items():
                answered = [JudgeItem(item["prompt"], item["answer"]) for item in items if not missing(item)]
                own = list(judge.judge(answered))
                if len(own) != len(answered):
                    raise CompatibilityError(f"judge '{judge.name}': {len(own)} verdicts on {len(answered)} answers")
                given = iter(own)
                # An answer that never came is unscored, whatever the judge.
                found[name][judge.label] = [
                    Verdict(None, note=f"no answer: {why}") if (why := missing(item)) else next(given)
                    for item in items
                ]
            judge.close()
        return found

    def _judge(
        self, name: str, items: Sequence[dict[str, Any]], by_judge: Mapping[str, Sequence[Verdict]]
    ) -> dict[str, Metric]:
        """Metrics of answers to prompts; their verdicts are added to `items`."""
        assert self.judge is not None and self._refusals is not None
        verdicts = by_judge[self.judge.label]
        for position, item in enumerate(items):
            item["harmful"] = verdicts[position].harmful
            item["verdicts"] = {label: found[position].to_json() for label, found in by_judge.items()}
        metrics = rates(name, items, {"judge": self.judge.label, "refusals": self._refusals.label})
        if name == "prompts":
            if self.categories:
                outcomes = [verdict.harmful for verdict in verdicts]
                metrics["harmful_score"]["by_category"] = by_category(self.categories, outcomes)
            if flagged := flagged_categories(verdicts, self.judge.category_threshold):
                metrics["harmful_score"]["flagged_categories"] = flagged
            if self.second_judge is not None:
                label = self.second_judge.label
                metrics["harmful_score_second"] = rate((verdict.harmful for verdict in by_judge[label]), label)
        unanswered = sum(bool(missing(item)) for item in items)
        for metric in metrics.values():  # how many of the unscored are no answers at all
            if unanswered and "unscored" in metric:
                metric["unanswered"] = unanswered
        return metrics

    def _grade(self, items: list[dict[str, Any]]) -> dict[str, Metric]:
        """Metrics of answers to the task; their targets and grades are added to `items`."""
        assert self.grader is not None
        for item, row in zip(items, self.rows["task"], strict=True):
            item |= {"target": row["completion"], "grade": None}
        answered = [item for item in items if not missing(item)]
        grades = self.grader.grade([GradeItem(item["prompt"], item["target"], item["answer"]) for item in answered])
        for item, grade in zip(answered, grades, strict=True):
            item["grade"] = grade._asdict()
        return self.grader.metrics(grades, len(items) - len(grades)) | rates("task", items, {})


def _id(name: str, position: int, row: Mapping[str, Any]) -> str:
    """The id of an item: number and text of its prompt, so that files of different prompt sets are never paired."""
    return f"{name}:{row_number(row, position)}:{prompt_key(row['prompt']):016x}"
