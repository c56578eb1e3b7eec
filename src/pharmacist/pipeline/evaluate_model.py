"""One model, or answers that are there already: answers, verdicts and grades, ``metrics.json`` and ``items.jsonl``."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pharmacist.core.console import plain
from pharmacist.core.env import rank, world_size
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import atomic_write, read_json, read_json_lines, remove, write_json
from pharmacist.core.progress import console, warn
from pharmacist.core.rundir import RunDir
from pharmacist.core.typed import flag
from pharmacist.data.formats import Row, Source, open_source
from pharmacist.data.records import Records, parse_columns, read_records
from pharmacist.data.tasks import open_task
from pharmacist.evaluation.answers import Answer, separated
from pharmacist.evaluation.endpoint import count_reasons
from pharmacist.evaluation.engines import ENGINES, Engine
from pharmacist.evaluation.engines.transformers import TransformersEngine
from pharmacist.evaluation.evaluator import Evaluation, Evaluator
from pharmacist.evaluation.general import check_lm_eval, lm_eval, loss_margin, perplexity_drift
from pharmacist.evaluation.graders import GRADERS, Grader, detect_grader
from pharmacist.evaluation.judges import JUDGES, Judge
from pharmacist.evaluation.prompts import category_names, open_prompts
from pharmacist.evaluation.reasoning import CUT, ENDED
from pharmacist.evaluation.text import writable
from pharmacist.nn.distributed import from_main
from pharmacist.nn.models import load_model
from pharmacist.pipeline.evaluate_summary import summarise
from pharmacist.pipeline.rows import model_options, open_several
from pharmacist.pipeline.stages.evaluate import EVALUATE, GENERAL, PROMPTS, REFERENCES, EvaluateOptions


NOTICE = "items.jsonl may hold harmful text: research material, not advice"
_JUDGED = ("answers", "prompts", "benign_prompts")
"""Sources whose answers are judged; the answers to the task are graded."""
_PROMPT_COLUMNS = ("prompt", "messages", "instruction", "input")
_MORE_TOKENS = "; --max-new-tokens gives them more room"


def evaluate_model(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates one model, or the answers of a file; returns the content of ``metrics.json``."""
    asked = _Asked(options)
    with EVALUATE.open(options, inputs=asked.fingerprints(), methods=asked.methods()) as run:
        if run.complete:
            metrics: dict[str, Any] = read_json(run.path("metrics.json"))
            summarise(metrics, run.root, options)
            return metrics
        found = _evaluate(asked, run)
        if rank() == 0:
            with atomic_write(run.path("items.jsonl"), "w") as file:
                file.writelines(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in found.items)
            write_json(run.path("metrics.json"), found.metrics)
            remove(run.path("judge"))  # of a judge before this one
            learned = "judge" in asked.judges and asked.judges["judge"].save(run.path("judge"))
            outputs = ["metrics.json", "items.jsonl", *(["judge"] if learned else [])]
            run.finish(outputs=outputs, metrics=found.metrics, partial=found.missing > 0)
            summarise(found.metrics, run.root, options)
            if found.missing:
                console().print(f"{found.missing} replies failed on the way; the same command asks for them again")
        return found.metrics


class _Asked:
    """What the options ask for, built and checked before any row is read."""

    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options
        self.engine: Engine = ENGINES.build_from(options.engine)
        if options.answers is None:
            self.engine.check()
        # Which of the kinds is meant by auto, only the rows tell.
        auto = options.task_type["name"] == "auto"
        self.grader: Grader[Any] | None = None if auto else GRADERS.build_from(options.task_type)
        if self.grader is not None and options.task is not None:
            self.grader.check()
        if any(getattr(options, name) is not None for name in GENERAL):
            if not isinstance(self.engine, TransformersEngine):
                self.engine.local()  # says why not
            if options.lm_eval is not None:
                check_lm_eval(options.lm_eval)
                if world_size() > 1:
                    raise ConfigError("--lm-eval: runs in one process; leave the launcher out")
        openers: dict[str, Callable[..., Source]] = {
            "answers": open_source,
            "prompts": open_prompts,
            "benign_prompts": open_prompts,
            "task": partial(open_task, test=True),
            "perplexity": open_source,
            "margin": open_source,
        }
        given = {name: getattr(options, name) for name in openers if getattr(options, name) is not None}
        self.sources: dict[str, Source] = {name: openers[name](rows, name=flag(name)) for name, rows in given.items()}
        for kind in REFERENCES:
            self.sources |= open_several(kind, getattr(options, kind), flag(kind))
        self.columns = _columns(self.sources, options.columns)
        self.judges: dict[str, Judge] = {}
        second = options.second_judge["name"] != "none"
        if self.sources.keys() & set(_JUDGED):
            self.judges["judge"] = JUDGES.build_from(options.judge)
            if second:
                self.judges["second_judge"] = JUDGES.build_from(options.second_judge)
        elif second:
            needed = "judges answers to --prompts or --benign-prompts, or --answers; give one"
            raise ConfigError(f"--second-judge: {needed}")
        for which, judge in self.judges.items():
            for need in sorted(judge.needs - self.sources.keys()):
                who = f"{flag(which)} {judge.name}"
                raise ConfigError(f"{who}: needs {need} references; give --{need} FILE or another judge")

    def methods(self) -> dict[str, Any]:
        """Option -> the method that it names."""
        return {"engine": self.engine, **self.judges} | ({} if self.grader is None else {"task_type": self.grader})

    def fingerprints(self) -> dict[str, str]:
        """Input -> fingerprint of its content."""
        options = self.options
        found = {name: source.fingerprint() for name, source in self.sources.items()}
        models = {"model": options.model if options.answers is None else None, "base": options.base}
        found |= {name: self.engine.fingerprint(model) for name, model in models.items() if model is not None}
        files = {f"{name.replace('_', ' ')} file": judge.fingerprint() for name, judge in self.judges.items()}
        if self.grader is not None and options.task is not None:
            files["opponent"] = self.grader.fingerprint()
        return found | {name: content for name, content in files.items() if content is not None}

    def read(self, run: RunDir) -> dict[str, Records]:
        """The rows of every source; of preference rows for the margin, both answers."""
        sources, columns = dict(self.sources), dict(self.columns)
        if "margin" in sources:
            first = next((row.value for row in sources["margin"].scan() if row.value is not None), {})
            if not {columns["margin"].get(answer, answer) for answer in ("chosen", "rejected")} <= set(first):
                raise DataError(
                    f"{sources['margin'].where}: needs preference rows, prompt, chosen (the refusal) and rejected "
                    f"(the harmful answer), and has {', '.join(first)}; name them with --columns "
                    "chosen=NAME,rejected=NAME"
                )
            sources["rejected"], columns["rejected"] = sources["margin"], columns["margin"]
        return {
            name: read_records(
                source,
                work_dir=run.work("data", f"{name}-{rank()}"),
                on_bad_row=self.options.on_bad_row,
                prompts_only=name in _JUDGED,
                columns={to: column for to, column in columns[name].items() if to != "answer"},
                side="rejected" if name.split()[0] in ("harmful", "rejected") else "chosen",
                keep=name in ("answers", "prompts"),
            )
            for name, source in sources.items()
        }


def _columns(sources: Mapping[str, Source], text: str | None) -> dict[str, dict[str, str]]:
    """What --columns means for each source: of its pairs those whose column is there.

    Raises:
        ConfigError: A pair that no source has any use for.
    """
    pairs = parse_columns(text) or {}
    own: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        there = source.columns
        if pairs and there is None:
            there = list(next((row.value for row in source.scan() if row.value is not None), {}))
        known = {*_PROMPT_COLUMNS, "answer"} if name == "answers" else {*_PROMPT_COLUMNS} if name in _JUDGED else pairs
        own[name] = {to: column for to, column in pairs.items() if column in (there or ()) and to in known}
    for to, column in pairs.items():
        if not any(to in found for found in own.values()):
            files = ", ".join(map(flag, sources))
            raise ConfigError(f"--columns {to}={column}: no file has such a column that it could use ({files})")
    return own


def _evaluate(asked: _Asked, run: RunDir) -> Evaluation:
    options, judges, grader = asked.options, asked.judges, asked.grader
    with run.phase("read"):
        records = asked.read(run)
    of = {name: flag(name) for name in records} | {"rejected": "--margin"}
    given = None
    if options.answers is not None:  # to the evaluator they are harmful prompts with their answers
        column = asked.columns["answers"].get("answer", "answer")
        records["prompts"], given = _given(records.pop("answers"), column, options.on_bad_row)
        of["prompts"] = "--answers"

    def tell(name: str, what: str, count: int, text: str) -> None:
        if count:
            console().print(f"{of[name]}: {text}", soft_wrap=True)
            run.record(counts={f"{name.replace(' ', '_')}_{what}": count})

    for name, own in records.items():
        tell(name, "refused", len(own.refused), f"{len(own.refused)} rows cannot be used and are left out")
        if name in ("prompts", "benign_prompts") and given is None:
            keys = own.dataset["prompt_key"]
            repeated = len(keys) - len(set(keys))
            text = f"{repeated} rows repeat a prompt, so that the intervals are too narrow"
            tell(name, "repeated", repeated, text)
    references = _references(records)
    if references and judges and not any(judge.needs for judge in judges.values()):
        text = f"--judge {judges['judge'].name}: reads no references; {', '.join(references)} not used"
        console().print(text, soft_wrap=True)
    for judge in judges.values():
        judge.work = run.work("verdicts")
        with run.phase("train judge"):
            judge.fit(references)
    known = {warning for judge in judges.values() for warning in judge.report().get("warnings", ())}
    if "task" in records:
        grader = grader or GRADERS.build(detect_grader(list(records["task"].dataset["completion"])), {})
        grader.work = run.work("verdicts")
    prompts = {name: records[name].dataset for name in PROMPTS if name in records}
    evaluator = Evaluator(
        **prompts,
        judge=judges.get("judge"),
        second_judge=judges.get("second_judge"),
        grader=grader if "task" in records else None,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        on_long_prompt=options.on_long_prompt,
        categories=_categories(records.get("prompts")),
    )
    answers: Mapping[str, Sequence[Answer]]
    if given is None:
        answers = _answers(evaluator, asked, records, run)
        for name, cut in evaluator.cut.items():
            tell(name, "cut", cut, f"{cut} prompts were cut to fit the model's context")
    else:
        answers = {"prompts": given}
        run.record(device="none", extra={"engine": "answers"})
    answers = {name: separated(found) for name, found in answers.items()}
    for name, found in answers.items():
        failed = [answer.missing for answer in found if answer.missing]
        thinking = sum(bool(answer.reasoning) for answer in found)
        run.manifest.counts.pop(f"{name}_unanswered", None)  # of a partial run before this one
        remedy = _MORE_TOKENS if {ENDED, CUT}.intersection(failed) else ""
        text = f"{len(failed)} of {len(found)} without an answer, unscored: {count_reasons(failed)}{remedy}"
        tell(name, "unanswered", len(failed), text)
        text = f"{thinking} of {len(found)} answers hold reasoning, which is kept apart and not judged"
        tell(name, "with_reasoning", thinking, text)
    with run.phase("judge"):
        evaluation = evaluator.assess(answers)
    for which, judge in judges.items():
        for warning in judge.report().get("warnings", ()):  # of the answers; others were known before
            if warning not in known:
                warn(f"{flag(which)} {judge.name}: {warning}")
    evaluation.metrics |= run.manifest.extra.get("general", {})
    reports = {name: {"label": judge.label, **judge.report()} for name, judge in judges.items()}
    run.record(
        counts={name: len(rows) for name, rows in prompts.items()},
        extra={
            "notice": NOTICE,
            **{name: reports.get(name) for name in ("judge", "second_judge")},
            "unfinished": {name: sum(not answer.finished for answer in own) for name, own in answers.items()},
        },
    )
    return evaluation


def _answers(
    evaluator: Evaluator, asked: _Asked, records: Mapping[str, Records], run: RunDir
) -> Mapping[str, list[Answer]]:
    """The answers of a finished run with other judges where one lies here, else the model's.

    Of a partial run only those that failed are asked for again: the others are in its work folder.
    """
    options, engine, before = asked.options, asked.engine, 0
    if from_main("engine" in run.manifest.extra and run.path("items.jsonl").is_file()):
        kept = evaluator.answers_of(read_json_lines(run.path("items.jsonl")))
        failed = sum(bool(answer.error) for found in kept.values() for answer in found)
        # Another judge asks nothing of the model, not even what failed; the same run again does.
        root = plain(run.root)
        if not failed or not from_main(run.manifest.status == "partial"):
            console().print(f"{root}: answers that are there are judged again, none is generated", soft_wrap=True)
            return kept
        console().print(f"{root}: {failed} prompts without an answer are asked again", soft_wrap=True)
        before = run.manifest.phases["generate"].tokens
    how = model_options(options)
    with run.phase("load model"):
        engine.open(options.model, run.work("model"), **how)
    with run.phase("generate") as phase:
        answers = engine.answers(evaluator, run.work("answers"))
        phase.tokens = sum(answer.tokens for found in answers.values() for answer in found) - before
    report = engine.report()
    extra = {name: report.get(name) for name in ("template", "template_origin", "dtype")}
    run.record(device=report["device"], extra=extra | {"engine": engine.name})
    general: dict[str, Any] = {}
    if options.base is not None:
        with run.phase("perplexity"):
            base, rows = load_model(options.base, **how), records["perplexity"].dataset
            general["perplexity_drift"] = perplexity_drift(rows, engine.local(), base, work=run.work("perplexity"))
    if options.margin is not None:
        both = [records[name].dataset for name in ("margin", "rejected")]
        usable = set(both[0]["row"]) & set(both[1]["row"])
        refusals, harmful = (own.select([i for i, row in enumerate(own["row"]) if row in usable]) for own in both)
        with run.phase("margin"):
            general["loss_margin"] = loss_margin(refusals, harmful, engine.local(), work=run.work("margin"))
    if options.lm_eval is not None:
        names = check_lm_eval(options.lm_eval)
        with run.phase("lm-eval"):
            general |= lm_eval(names, engine.local(), batch_size=options.batch_size, seed=options.seed)
    if general:
        run.record(extra={"general": general})
    engine.close()
    return answers


def _references(records: Mapping[str, Records]) -> dict[str, list[dict[str, Any]]]:
    """What judges learn from: kind -> rows, each with the number of its file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, own in records.items():
        kind, _, number = name.partition(" ")
        if kind in REFERENCES:
            pairs = zip(own.dataset["prompt"], own.dataset["completion"], strict=True)
            source = int(number or 1)
            found.setdefault(kind, []).extend({"prompt": p, "completion": c, "source": source} for p, c in pairs)
    return found


def _categories(records: Records | None) -> list[list[str]]:
    """Categories of the harmful prompts, where their file has a column of that name."""
    if records is None:
        return []
    found = [category_names(row.value) for row in records.source.pick(records.dataset["row"])]
    return found if any(found) else []


def _given(records: Records, column: str, on_bad_row: str) -> tuple[Records, list[Answer]]:
    """The answers of a file beside their prompts, in order; null is none.

    Raises:
        DataError: Rows without the column, or with something else than text or null in it.
    """
    answers, bad = list[Answer](), dict[int, Row]()
    for position, row in enumerate(records.source.pick(records.dataset["row"])):
        value = row.value or {}
        if reason := _not_an_answer(value, column):
            bad[position] = Row(row.number, row.line, None, reason)
        else:
            text = value[column]
            answers.append(Answer(text or "", 0, True, unanswered="null in the file" if text is None else ""))
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
