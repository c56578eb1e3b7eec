"""What `evaluate` reads: rows, engine, judges and grader, opened and checked before any work."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pharmacist.core.env import world_size
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.naming import flag
from pharmacist.core.progress import say
from pharmacist.core.rundir import RunDir
from pharmacist.data.formats import Row, Source, open_source
from pharmacist.data.records import Records, columns_in, first_row, parse_columns
from pharmacist.data.tasks import open_task
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.engines import ENGINES, Engine
from pharmacist.evaluation.engines.transformers import TransformersEngine
from pharmacist.evaluation.general import check_lm_eval
from pharmacist.evaluation.graders import GRADERS, Grader
from pharmacist.evaluation.judges import JUDGES, Judge
from pharmacist.evaluation.prompts import open_prompts
from pharmacist.evaluation.reasoning import separate
from pharmacist.evaluation.text import missing, writable
from pharmacist.pipeline.rows import PROMPT_COLUMNS, open_references, read
from pharmacist.pipeline.stages.evaluate import GENERAL, REFERENCES, EvaluateOptions


_OPENERS: dict[str, Callable[..., Source]] = {
    "answers": open_source,
    "prompts": open_prompts,
    "benign_prompts": open_prompts,
    "task": partial(open_task, test=True),
    "perplexity": open_source,
    "margin": open_source,
}
_JUDGED = ("answers", "prompts", "benign_prompts")
"""Inputs whose answers are judged; the answers to the task are graded."""


def judges_of(options: EvaluateOptions) -> dict[str, Judge]:
    """The judge, and the second one where there is one, by option."""
    names = ["judge"] if options.second_judge["name"] == "none" else ["judge", "second_judge"]
    return {name: JUDGES.build_from(getattr(options, name)) for name in names}


def grader_of(options: EvaluateOptions) -> Grader | None:
    """The grader of answers to the task; None where there is no task, or its kind is told by the rows."""
    if options.task is None or options.task_type["name"] == "auto":
        return None
    return GRADERS.build_from(options.task_type)


def verdict_files(judges: Mapping[str, Judge], grader: Grader | None) -> dict[str, str]:
    """Input -> fingerprint of what judges and grader read, of those that read files or models."""
    files = {f"{name.replace('_', ' ')} file": judge.fingerprint() for name, judge in judges.items()}
    files |= {} if grader is None else {"opponent": grader.fingerprint()}
    return {name: content for name, content in files.items() if content is not None}


def check_methods(options: EvaluateOptions) -> None:
    """Checks what the methods of an evaluation of a model need besides rows: packages, models, addresses.

    Raises:
        PharmacistError: Something is missing.
    """
    _check_engine(ENGINES.build_from(options.engine), options)
    for decider in (*judges_of(options).values(), grader_of(options)):
        if decider is not None:
            decider.check()


def _check_engine(engine: Engine, options: EvaluateOptions) -> None:
    engine.check()
    if any(getattr(options, name) is not None for name in GENERAL):
        if not isinstance(engine, TransformersEngine):
            engine.local()  # says why not
        if options.lm_eval is not None:
            check_lm_eval(options.lm_eval)
            if world_size() > 1:
                raise ConfigError("--lm-eval: runs in one process; leave the launcher out")


class EvaluateInputs:
    """What the options name, built and checked before any row is read.

    Attributes:
        engine: Gives the model's answers.
        grader: From `grader_of`.
        judges: By option, ``judge`` and ``second_judge``; empty where no answers are judged.
        sources: Rows by input, such as ``prompts``; the references of a kind are ``safe``, ``safe 2`` and so on.
    """

    def __init__(self, options: EvaluateOptions, within: str = "") -> None:
        """`within` is the option of which these are the parts, such as ``evaluate.``, for messages."""
        self.options = options
        self.engine: Engine = ENGINES.build_from(options.engine)
        if options.answers is None:
            _check_engine(self.engine, options)
        self.grader = grader_of(options)
        if self.grader is not None:
            self.grader.option = flag(within + "task_type")
            self.grader.check()
        named = {name: getattr(options, name) for name in _OPENERS if getattr(options, name) is not None}
        self.sources = {name: _OPENERS[name](rows, name=flag(within + name)) for name, rows in named.items()}
        self.sources |= open_references(options, within)
        self._columns = _columns_by_source(self.sources, options.columns)
        self.judges = judges_of(options) if self.sources.keys() & set(_JUDGED) else {}
        if not self.judges and options.second_judge["name"] != "none":
            needed = "judges answers to --prompts or --benign-prompts, or --answers; give one"
            raise ConfigError(f"--second-judge: {needed}")
        for name, judge in self.judges.items():
            judge.option = flag(within + name)
            for need in sorted(judge.needs - self.sources.keys()):
                give = f"give {flag(within + need)} FILE or another judge"
                raise ConfigError(f"{judge.who}: needs {need} references; {give}")

    def methods(self) -> dict[str, Any]:
        """Option -> the method that it names."""
        return {"engine": self.engine, **self.judges} | ({} if self.grader is None else {"task_type": self.grader})

    def fingerprints(self) -> dict[str, str]:
        """Input -> fingerprint of its content."""
        options = self.options
        found = {name: source.fingerprint() for name, source in self.sources.items()}
        models = {"model": options.model if options.answers is None else None, "base": options.base}
        found |= {name: self.engine.fingerprint(model) for name, model in models.items() if model is not None}
        return found | verdict_files(self.judges, self.grader)

    def read(self, run: RunDir) -> tuple[dict[str, Records], list[Answer] | None]:
        """Reads the rows of every input.

        Returns:
            Records by input; ``margin`` and ``rejected`` hold the two answers of its preference rows. With
            ``--answers``, ``prompts`` are their prompts, and the answers come second.
        """
        sources, columns = dict(self.sources), dict(self._columns)
        if "margin" in sources:
            first = first_row(sources["margin"])
            if not {columns["margin"].get(answer, answer) for answer in ("chosen", "rejected")} <= set(first):
                raise DataError(
                    f"{sources['margin'].where}: needs preference rows, prompt, chosen (the refusal) and rejected "
                    f"(the harmful answer), and has {', '.join(first)}; name them with --columns "
                    "chosen=NAME,rejected=NAME"
                )
            sources["rejected"], columns["rejected"] = sources["margin"], columns["margin"]
        records = {
            name: read(
                source,
                self.options,
                run.work("data", name),
                harmful=name.split()[0] in ("harmful", "rejected"),
                columns={to: column for to, column in columns[name].items() if to != "answer"},
                prompts_only=name in _JUDGED,
                keep=name in ("answers", "prompts"),
            )
            for name, source in sources.items()
        }
        if "answers" not in records:
            return records, None
        column = columns["answers"].get("answer", "answer")
        records["prompts"], answers = _with_answers(records.pop("answers"), column, self.options.on_bad_row)
        return records, answers

    def option(self, name: str) -> str:
        """The command line's option of an input as `read` names it, for messages."""
        shown = {"prompts": "answers"} if self.options.answers is not None else {}
        return flag((shown | {"rejected": "margin"}).get(name, name))


def _columns_by_source(sources: Mapping[str, Source], text: str | None) -> dict[str, dict[str, str]]:
    """The pairs of --columns that each source can use, since it has the column; each pair must be of use to one.

    Where only the harmful score is measured, as along an attack, the others may be for files that are left out.
    """
    pairs, found = parse_columns(text) or {}, dict[str, dict[str, str]]()
    for name, source in sources.items():
        usable = PROMPT_COLUMNS | ({"answer"} if name == "answers" else set()) if name in _JUDGED else pairs
        found[name] = columns_in(source, {to: column for to, column in pairs.items() if to in usable})
    for to, column in pairs.items():
        if not any(to in own for own in found.values()):
            files = ", ".join(map(flag, sources))
            unused = f"--columns {to}={column}: no file has a column that it applies to ({files})"
            if {"answers", "benign_prompts", "task"} & sources.keys():
                raise ConfigError(unused)
            say(unused)
    return found


def reference_rows(records: Mapping[str, Records]) -> dict[str, list[dict[str, Any]]]:
    """References for the judges: kind -> rows with ``prompt``, ``completion`` and ``source`` (number of the file)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, rows in records.items():
        kind, _, number = name.partition(" ")
        if kind in REFERENCES:
            source = {"source": int(number or 1)}
            found.setdefault(kind, []).extend(row | source for row in without_reasoning(rows))
    return found


def without_reasoning(records: Records) -> list[dict[str, Any]]:
    """Rows whose completions are without reasoning, as the answers that are judged and graded."""
    return [row | {"completion": separate(row["completion"]).answer} for row in records.dataset.to_list()]


def _with_answers(records: Records, column: str, on_bad_row: str) -> tuple[Records, list[Answer]]:
    """Prompts with the answers in a column of their file, in order.

    An answer that is null counts as unanswered, and so does an empty one of an ``items.jsonl`` that says why.

    A DataError where rows lack the column, or have something else than text or null in it.
    """
    answers, bad = list[Answer](), dict[int, Row]()
    for position, row in enumerate(records.source.pick(records.dataset["row"][:])):
        value = row.value or {}
        if reason := _not_an_answer(value, column):
            bad[position] = Row(row.number, row.line, None, reason)
        else:
            text = value[column]
            why = "null in the file" if text is None else "" if text else missing(value)
            answers.append(Answer(text or "", 0, True, unanswered=why))
    if bad and (on_bad_row == "fail" or not answers):
        first = next(iter(bad.values()))
        raise DataError(
            f"{records.source.where}: {len(bad)} of {len(records)} rows cannot be judged: "
            f"{first.where} {first.reason}; name the column of answers with --columns answer=NAME, "
            "or leave such rows out with --on-bad-row skip"
        )
    return replace(records.without(bad), refused=[*records.refused, *bad.values()]), answers


def _not_an_answer(row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    if column not in row:
        return f"has no '{column}'"
    if not isinstance(text, str | None):
        return f"has no text in '{column}'"
    return "" if writable(text or "") else f"has half a character (a lone surrogate) in '{column}'"
