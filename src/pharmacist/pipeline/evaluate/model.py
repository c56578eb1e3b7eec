"""Evaluates one model, or answers that are there already: answers, verdicts, grades, metrics."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pharmacist.core.console import plain
from pharmacist.core.env import process_index
from pharmacist.core.files import atomic_write, read_json, read_json_lines, remove, write_json
from pharmacist.core.naming import flag
from pharmacist.core.progress import say, warn
from pharmacist.core.rundir import RunDir
from pharmacist.data.records import Records
from pharmacist.evaluation.answers import Answer, separated
from pharmacist.evaluation.endpoint import count_reasons
from pharmacist.evaluation.evaluator import Evaluation, Evaluator
from pharmacist.evaluation.general import lm_eval, loss_margin, perplexity_drift
from pharmacist.evaluation.graders import GRADERS, detect_grader
from pharmacist.evaluation.prompts import categories_of
from pharmacist.evaluation.reasoning import CUT, ENDED
from pharmacist.nn.distributed import from_main
from pharmacist.pipeline.evaluate.reading import EvaluateInputs, reference_rows, without_reasoning
from pharmacist.pipeline.evaluate.summary import summarise
from pharmacist.pipeline.rows import load, model_options
from pharmacist.pipeline.stages.evaluate import EVALUATE, PROMPTS, REFERENCES, EvaluateOptions


NOTICE = "items.jsonl may hold harmful text: research material, not advice"


def evaluate_model(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates one model, or the answers of a file; returns the content of ``metrics.json``."""
    inputs = EvaluateInputs(options)
    with EVALUATE.open(options, inputs=inputs.fingerprints(), methods=inputs.methods()) as run:
        if run.complete:
            metrics: dict[str, Any] = read_json(run.path("metrics.json"))
            summarise(metrics, run.root, options)
            return metrics
        found = _evaluate(inputs, run)
        if process_index() == 0:
            with atomic_write(run.path("items.jsonl")) as file:
                file.writelines(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in found.items)
            write_json(run.path("metrics.json"), found.metrics)
            remove(run.path("judge"))  # of a judge before this one
            learned = "judge" in inputs.judges and inputs.judges["judge"].save(run.path("judge"))
            outputs = ["metrics.json", "items.jsonl", *(["judge"] if learned else [])]
            outputs += ["replies"] if run.path("replies").is_dir() else []
            run.finish(outputs=outputs, metrics=found.metrics, partial=found.missing > 0)
            summarise(found.metrics, run.root, options)
            if found.missing:
                say(f"{found.missing} replies failed; the same command requests them again")
        return found.metrics


def _evaluate(inputs: EvaluateInputs, run: RunDir) -> Evaluation:
    options, judges = inputs.options, inputs.judges
    with run.phase("read"):
        records, given = inputs.read(run)
    for count in [count for count in run.manifest.counts if count.startswith(REFERENCES)]:
        del run.manifest.counts[count]  # of references before these
    trained_on = [rows.dataset["prompt_key"][:] for name, rows in records.items() if name.startswith(REFERENCES)]
    seen = set().union(*trained_on) if any(judge.needs for judge in judges.values()) else set()
    note = partial(_note, inputs, run)
    for name, rows in records.items():
        note(f"{name} refused", len(rows.refused), "rows cannot be used and are left out")
        if name in ("prompts", "benign_prompts"):
            keys = rows.dataset["prompt_key"][:]
            repeated = 0 if given is not None else len(keys) - len(set(keys))
            note(f"{name} repeated", repeated, "rows repeat a prompt, so that the intervals are too narrow")
            known = sum(key in seen for key in keys)
            note(
                f"{name} in_references",
                known,
                "rows share a prompt with the references on which the judge was trained",
            )
    references = reference_rows(records)
    if references and judges and not any(judge.needs for judge in judges.values()):
        say(f"--judge {judges['judge'].name}: reads no references; {', '.join(references)} not used")
    if options.task is None and options.task_type["name"] != "auto":
        say(f"--task-type {options.task_type['name']}: not used without --task")
    for judge in judges.values():
        judge.work, judge.replies = run.work("verdicts"), run.path("replies")
        with run.phase("train judge"):
            judge.fit(references)
    told = {warning for judge in judges.values() for warning in judge.report().get("warnings", ())}
    prompts: dict[str, Any] = {name: records[name].dataset for name in PROMPTS if name in records}
    grader = None
    if "task" in prompts:
        prompts["task"] = without_reasoning(records["task"])
        grader = inputs.grader or GRADERS.build(detect_grader([row["completion"] for row in prompts["task"]]), {})
        grader.replies = run.path("replies")
    evaluator = Evaluator(
        **prompts,
        judge=judges.get("judge"),
        second_judge=judges.get("second_judge"),
        grader=grader,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        on_long_prompt=options.on_long_prompt,
        categories=categories_of(records["prompts"]) if "prompts" in records else (),
    )
    answers: Mapping[str, Sequence[Answer]]
    if given is None:
        answers = _answers(evaluator, inputs, records, run)
        for name, cut in evaluator.cut.items():
            note(f"{name} cut", cut, "prompts were cut to fit the model's context")
    else:
        answers = {"prompts": given}
        run.record(device="none", extra={"engine": "answers"})
    answers = {name: separated(found) for name, found in answers.items()}
    for name, found in answers.items():
        failed = [answer.missing for answer in found if answer.missing]
        more_room = given is None and {ENDED, CUT}.intersection(failed)
        remedy = "; --max-new-tokens gives them more room" if more_room else ""
        why = f"of {len(found)} without an answer, unscored: {count_reasons(failed)}{remedy}"
        note(f"{name} unanswered", len(failed), why)
        reasoned = sum(bool(answer.reasoning) for answer in found)
        what = f"of {len(found)} answers contain reasoning, which is separated and not judged"
        note(f"{name} with_reasoning", reasoned, what)
    with run.phase("judge"):
        evaluation = evaluator.assess(answers)
    reports = {option: {"label": judge.label, **judge.report()} for option, judge in judges.items()}
    for option, report in reports.items():
        for warning in report.get("warnings", ()):  # about the answers; others were told before
            if warning not in told:
                warn(f"{judges[option].who}: {warning}")
    evaluation.metrics |= run.manifest.extra.get("general", {})
    run.record(
        counts={name: len(rows) for name, rows in prompts.items()},
        extra={
            "notice": NOTICE,
            **{name: reports.get(name) for name in ("judge", "second_judge")},
            "unfinished": {name: sum(not answer.finished for answer in found) for name, found in answers.items()},
        },
    )
    return evaluation


def _note(inputs: EvaluateInputs, run: RunDir, count: str, number: int, text: str) -> None:
    """Prints a remark on an input and counts it in the manifest; `count` is the input's name and what is counted."""
    run.manifest.counts.pop(count.replace(" ", "_"), None)  # of a judge, or a partial run, before this one
    if number:
        say(f"{inputs.option(count.rpartition(' ')[0])}: {number} {text}")
        run.record(counts={count.replace(" ", "_"): number})


def _answers(
    evaluator: Evaluator, inputs: EvaluateInputs, records: Mapping[str, Records], run: RunDir
) -> Mapping[str, list[Answer]]:
    """The answers in `run` where a finished evaluation lies there, else the model's.

    Of a partial evaluation only the questions that failed are asked again: the other answers are in its work folder.
    """
    options, engine, tokens_before = inputs.options, inputs.engine, 0
    if from_main("engine" in run.manifest.extra and run.path("items.jsonl").is_file()):
        kept = evaluator.answers_of(read_json_lines(run.path("items.jsonl")))
        failed = sum(bool(answer.error) for found in kept.values() for answer in found)
        # Another judge asks nothing of the model, not even what failed; the same run again does.
        root = plain(run.root)
        if not failed or not from_main(run.manifest.status == "partial"):
            say(f"{root}: existing answers are judged again, none is generated")
            return kept
        say(f"{root}: {failed} prompts without an answer are asked again")
        tokens_before = run.manifest.phases["generate"].tokens
    ignored = [flag(name) for name in engine.unused if getattr(options, name) != getattr(EvaluateOptions, name)]
    if ignored and options.lm_eval is None:
        say(f"--engine {engine.name}: {', '.join(ignored)} not used")
    with run.phase("load model"):
        engine.open(options.model, run.work("model"), **model_options(options))
    with run.phase("generate") as phase:
        answers = engine.answers(evaluator, run.work("answers"))
        known = max(0, tokens_before - phase.tokens)  # of a run that is finished: its phase is not gone on with
        phase.tokens = sum(answer.tokens for found in answers.values() for answer in found) - known
    report = engine.report()
    extra = {name: report.get(name) for name in ("template", "template_origin", "dtype")}
    run.record(device=report["device"], extra=extra | {"engine": engine.name})
    if general := _general(inputs, records, run):
        run.record(extra={"general": general})
    engine.close()
    return answers


def _general(inputs: EvaluateInputs, records: Mapping[str, Records], run: RunDir) -> dict[str, Any]:
    """Metrics of the open engine's model that need its weights and no answers."""
    options, engine, found = inputs.options, inputs.engine, dict[str, Any]()
    if options.base is not None:
        with run.phase("perplexity"):
            base, rows = load(options.base, options), records["perplexity"].dataset
            found["perplexity_drift"] = perplexity_drift(rows, engine.local(), base, work=run.work("perplexity"))
    if options.margin is not None:
        both = [records[name].dataset for name in ("margin", "rejected")]
        usable = set(both[0]["row"][:]) & set(both[1]["row"][:])
        refusals, harmful = (rows.select([i for i, n in enumerate(rows["row"][:]) if n in usable]) for rows in both)
        with run.phase("margin"):
            found["loss_margin"] = loss_margin(refusals, harmful, engine.local(), work=run.work("margin"))
    if options.lm_eval is not None:
        with run.phase("lm-eval"):
            found |= lm_eval(options.lm_eval, engine.local(), batch_size=options.batch_size, seed=options.seed)
    return found
