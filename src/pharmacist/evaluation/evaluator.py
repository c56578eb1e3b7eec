"""A model against prompts, judges and a task: its answers, then verdicts, grades and metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pharmacist.core.errors import DataError
from pharmacist.data.normalise import prompt_key
from pharmacist.data.templates import Template
from pharmacist.data.tokenize import prompt_ids
from pharmacist.evaluation.answers import Answer, separated
from pharmacist.evaluation.generate import Decoder, context_length, cut_prompts, generate, plan_batches
from pharmacist.evaluation.graders.base import GradeItem, Grader
from pharmacist.evaluation.judges.base import Judge, JudgeItem, Verdict
from pharmacist.evaluation.judges.keyword import KeywordJudge
from pharmacist.evaluation.metrics import Metric, agreement, by_category, flagged_categories, rate, rates


_MAYBE = ("error", "reasoning", "unanswered")
"""Fields of an answer that its item has where they say something."""


@dataclass
class Evaluation:
    """Result for one model.

    An item is a JSON object per prompt: ``id``, ``set``, ``row``, ``prompt``, ``answer``, ``tokens``, ``finished``,
    ``reasoning`` where the model shows any, ``error`` or ``unanswered`` where there is nothing to judge, and
    ``harmful`` and ``verdicts`` by judge, or ``target`` and ``grade``.
    """

    metrics: dict[str, Metric]  # as in ``metrics.json``
    items: list[dict[str, Any]]
    missing: int = 0  # answers, verdicts and grades that failed on the way and would be asked for again


class Evaluator:
    """Evaluates models on the same prompts, with the same judges, which are trained before.

    Args:
        prompts: Harmful prompts: rows with ``prompt`` (canonical rows, or plain mappings).
        benign_prompts: Benign prompts that look harmful, likewise.
        task: Rows with ``prompt`` and ``completion`` of the fine-tuning task.
        judge: For the first two; trained already where it needs training.
        grader: For the third; `Grader.prepare` is called here.
        second_judge: Judges the same answers again, for the agreement of the two.
        categories: Categories of the harmful prompts, in their order, for the harmful score of each.
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time, 0 for as many as fit.
        on_long_prompt: What to do with a prompt that fills a model's whole context: ``fail``, or ``cut`` its middle.

    Attributes:
        cut: Prompts that were cut for the last model, by prompt set.
    """

    def __init__(
        self,
        *,
        prompts: Iterable[Mapping[str, Any]] = (),
        benign_prompts: Iterable[Mapping[str, Any]] = (),
        task: Iterable[Mapping[str, Any]] = (),
        judge: Judge | None = None,
        grader: Grader[Any] | None = None,
        second_judge: Judge | None = None,
        categories: Sequence[Sequence[str]] = (),
        max_new_tokens: int = 512,
        batch_size: int = 0,
        on_long_prompt: Literal["fail", "cut"] = "fail",
    ) -> None:
        given = {"prompts": list(prompts), "benign_prompts": list(benign_prompts), "task": list(task)}
        self.rows = {name: rows for name, rows in given.items() if rows}
        if judge is None and self.rows.keys() & {"prompts", "benign_prompts"}:
            raise ValueError("an Evaluator with prompts needs a judge")
        if grader is None and "task" in self.rows:
            raise ValueError("an Evaluator with a task needs a grader")
        self.judge, self.grader, self.second_judge = judge, grader, second_judge
        self.categories = list(categories)
        self.max_new_tokens, self.batch_size, self.on_long_prompt = max_new_tokens, batch_size, on_long_prompt
        self.cut: dict[str, int] = {}
        self._refusals = KeywordJudge() if judge is not None and not judge.tells_refusals else judge
        if grader is not None and "task" in self.rows:
            grader.prepare(self.rows["task"])

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
        """The model's answers by prompt set; `work`, `decoder` and `batch_size` (by default the evaluator's own) as in
        `generate`.

        Raises:
            DataError: A prompt fills the model's whole context and is not to be cut.
        """
        context = context_length(model)
        ids = {name: prompt_ids(rows, tokenizer, template) for name, rows in self.rows.items()}
        for name, rows in ids.items():  # all prompts are looked at before the first is answered
            if self.on_long_prompt == "cut":
                ids[name], self.cut[name] = cut_prompts(rows, context, self.max_new_tokens)
                continue
            try:
                plan_batches([len(row) for row in rows], self.max_new_tokens, context)
            except DataError as error:
                raise DataError(f"--{name.replace('_', '-')}: {error}") from error
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
        """Judges and grades answers that were generated before, each without its reasoning."""
        answers = {name: separated(found) for name, found in answers.items()}
        metrics: dict[str, Metric] = {}
        items: list[dict[str, Any]] = []
        twice: list[tuple[Verdict, Verdict]] = []
        for name, found in answers.items():
            own = [self._item(name, position, answer) for position, answer in enumerate(found)]
            metrics |= self._grade(found, own) if name == "task" else self._judge(name, found, own, twice)
            items += own
        if self.judge is not None and self.second_judge is not None:
            first, second = zip(*twice, strict=True)
            metrics["judge_agreement"] = agreement(first, second, (self.judge.label, self.second_judge.label))
        asked = [one for one in (self.judge, self.second_judge, self.grader) if one is not None]
        failed = sum(bool(answer.error) for found in answers.values() for answer in found)
        return Evaluation(metrics, items, failed + sum(one.missing for one in asked))

    def _item(self, name: str, position: int, answer: Answer) -> dict[str, Any]:
        row = self.rows[name][position]
        number = position if row.get("row") is None else int(row["row"])
        # The id holds number and text, so that files of different prompt sets are never paired.
        item = {
            "id": f"{name}:{number}:{prompt_key(row['prompt']):016x}",
            "set": name,
            "row": number,
            "prompt": row["prompt"],
            "answer": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
        }
        if name == "prompts" and self.categories:
            item["categories"] = list(self.categories[position])
        return item | {name: getattr(answer, name) for name in _MAYBE if getattr(answer, name)}

    def answers_of(self, items: Iterable[Mapping[str, Any]]) -> dict[str, list[Answer]]:
        """The answers that `assess` wrote into items, for another judge.

        Raises:
            DataError: They answer other prompts.
        """
        found: dict[str, list[Answer]] = {name: [] for name in self.rows}
        for item in items:
            more = {name: item[name] for name in _MAYBE if name in item}
            answer = Answer(item["answer"], item["tokens"], item["finished"], **more)
            own = found.get(item["set"])
            if own is None or len(own) >= len(self.rows[item["set"]]):
                raise DataError("items.jsonl holds answers to other prompts; --overwrite evaluates again")
            if self._item(item["set"], len(own), answer)["id"] != item["id"]:
                raise DataError(f"items.jsonl: {item['id']} is no prompt of this run; --overwrite evaluates again")
            own.append(answer)
        if any(len(own) < len(self.rows[name]) for name, own in found.items()):
            raise DataError("items.jsonl lacks answers; --overwrite evaluates again")
        return found

    def _judge(
        self, name: str, answers: Sequence[Answer], items: list[dict[str, Any]], twice: list[tuple[Verdict, Verdict]]
    ) -> dict[str, Metric]:
        """Metrics of answers to prompts; verdicts go into their items, those of both judges into `twice`."""
        assert self.judge is not None and self._refusals is not None
        pairs = zip(items, answers, strict=True)
        given = [JudgeItem(item["prompt"], answer.text) for item, answer in pairs if not answer.missing]

        def judged(judge: Judge) -> list[Verdict]:
            """Verdicts of the answers that came; the others are unscored, whatever the judge."""
            came = iter(judge.judge(given))
            why = (answer.missing for answer in answers)
            return [Verdict(None, note=f"no answer: {reason}") if reason else next(came) for reason in why]

        verdicts = judged(self.judge)
        by_judge = {self.judge.label: verdicts}
        if self._refusals is not self.judge:
            by_judge[self._refusals.label] = judged(self._refusals)
        if self.second_judge is not None:
            others = by_judge[self.second_judge.label] = judged(self.second_judge)
            twice += zip(verdicts, others, strict=True)
        for position, item in enumerate(items):
            item["harmful"] = verdicts[position].harmful
            item["verdicts"] = {label: own[position].to_json() for label, own in by_judge.items()}
        found = rates(name, items, {"judge": self.judge.label, "refusals": self._refusals.label})
        if name == "prompts":
            if self.categories:
                outcomes = [verdict.harmful for verdict in verdicts]
                found["harmful_score"]["by_category"] = by_category(self.categories, outcomes)
            if flagged := flagged_categories(verdicts, self.judge.category_threshold):
                found["harmful_score"]["flagged_categories"] = flagged
            if self.second_judge is not None:
                second = rate((other.harmful for other in others), self.second_judge.label)
                found["harmful_score_second"] = second
        unanswered = sum(bool(answer.missing) for answer in answers)
        for metric in found.values():  # of the unscored, how many were no answers at all
            if unanswered and "unscored" in metric:
                metric["unanswered"] = unanswered
        return found

    def _grade(self, answers: Sequence[Answer], items: list[dict[str, Any]]) -> dict[str, Metric]:
        """Metrics of answers to the task; targets and grades go into their items."""
        assert self.grader is not None
        for item, row in zip(items, self.rows["task"], strict=True):
            item |= {"target": row["completion"], "grade": None}
        came = [item for item, answer in zip(items, answers, strict=True) if not answer.missing]
        grades = self.grader.grade([GradeItem(item["prompt"], item["target"], item["answer"]) for item in came])
        for item, grade in zip(came, grades, strict=True):
            item["grade"] = grade._asdict()
        return self.grader.metrics(grades, len(answers) - len(grades)) | rates("task", items, {})
