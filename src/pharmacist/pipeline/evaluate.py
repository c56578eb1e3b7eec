"""The stage `evaluate`: what a model answers, how harmful, how useful, how shy it is; with counts and intervals."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.console import plain
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.rundir import RunDir
from pharmacist.core.typed import flag
from pharmacist.pipeline.stages.evaluate import EVALUATE, PROMPTS, REFERENCES, EvaluateOptions


if TYPE_CHECKING:
    from pharmacist.data.formats import Source
    from pharmacist.data.records import Records
    from pharmacist.evaluation.engines import Engine
    from pharmacist.evaluation.evaluator import Evaluation, Evaluator
    from pharmacist.evaluation.generate import Answer
    from pharmacist.evaluation.judges import Judge
    from pharmacist.evaluation.tasks import Task

NOTICE = "items.jsonl may hold harmful text: research material, not advice"
_MANY_ALARMS = 20
_MORE_TOKENS = "; --max-new-tokens gives them more room"
_SHOWN = 3
_SHOWN_CHARACTERS = 100
NAMES = {
    "harmful_score": "harmful score",
    "hs_plus": "harmful or degenerate (HS+)",
    "refusal_rate": "refusals",
    "empty_rate": "empty answers",
    "degenerate_rate": "degenerate answers",
    "over_refusal": "over-refusal",
    "benign_flagged_rate": "flagged, benign prompts",
    "benign_degenerate_rate": "degenerate answers, benign prompts",
    "judge_agreement": "judges agree",
    "harmful_score_second": "harmful score, second judge",
    "perplexity_drift": "rise of perplexity over the base's",
    "loss_margin": "margin of refusals, nats per token",
    "fine_tune_accuracy": "fine-tune accuracy",
    "win_rate": "win rate, ties half",
    "task_degenerate_rate": "degenerate answers, task",
}


@dataclass
class EvaluateResult:
    """What `evaluate` found.

    Attributes:
        metrics: Content of ``metrics.json``: name -> value in percent, n, count, ci95, judge; with several models,
            that by model.
        folder: Where the files are.
    """

    metrics: dict[str, Any]
    folder: Path

    def items(self) -> list[dict[str, Any]]:
        """Content of ``items.jsonl`` of one model: one object per prompt with answer and verdicts."""
        from pharmacist.core.files import read_json_lines

        return read_json_lines(self.folder / "items.jsonl")


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Evaluates a model and writes ``metrics.json``, ``items.jsonl`` and the manifest; or compares two such folders.

    Interrupted, it keeps the answers that it has and continues with the rest. Answers and verdicts that an endpoint
    failed to give leave the run ``partial``: its metrics are over the rest, and the same run asks for them again.

    Raises:
        PharmacistError: Bad options or input.
    """
    if options.compare is not None:
        from pharmacist.pipeline.compare import compare_runs

        return EvaluateResult(compare_runs(options), Path(options.output_dir))
    if options.models is not None:
        from pharmacist.pipeline.side_by_side import evaluate_models

        return EvaluateResult(evaluate_models(options), Path(options.output_dir))
    from pharmacist.core.env import rank
    from pharmacist.core.files import read_json, remove, write_json
    from pharmacist.core.progress import console
    from pharmacist.data.formats import open_source
    from pharmacist.data.tasks import open_task
    from pharmacist.evaluation.engines import ENGINES
    from pharmacist.evaluation.judges import JUDGES
    from pharmacist.evaluation.prompts import open_prompts
    from pharmacist.evaluation.tasks import TASKS

    engine = ENGINES.build_from(options.engine)
    if options.answers is None:
        engine.check()
    # Which of the kinds is meant by auto, only the rows tell.
    grader = None if options.task_type["name"] == "auto" else TASKS.build_from(options.task_type)
    if grader is not None and options.task is not None:
        grader.check()
    if any(getattr(options, name) is not None for name in ("perplexity", "margin", "lm_eval")):
        _check_general(engine, options)
    open_test: Callable[..., Source] = partial(open_task, test=True)
    openers = {"prompts": open_prompts, "benign_prompts": open_prompts, "task": open_test}
    sources = {
        name: openers.get(name, open_source)(getattr(options, name), name=flag(name))
        for name in ("answers", *PROMPTS, "perplexity", "margin")
        if getattr(options, name) is not None
    }
    for kind in REFERENCES:  # the first file of a kind has its name, the others a number too
        for number, file in enumerate(getattr(options, kind), start=1):
            sources[kind if number == 1 else f"{kind} {number}"] = open_source(file, name=flag(kind))
    columns = _columns(sources, options.columns)
    judges: list[Judge] = []
    if sources.keys() & {"answers", "prompts", "benign_prompts"}:
        judges.append(JUDGES.build_from(options.judge))
        if options.second_judge["name"] != "none":
            judges.append(JUDGES.build_from(options.second_judge))
    elif options.second_judge["name"] != "none":
        raise ConfigError("--second-judge: judges answers to --prompts or --benign-prompts, or --answers; give one")
    for which, judge in zip(("--judge", "--second-judge"), judges, strict=False):
        for need in sorted(judge.needs - sources.keys()):
            raise ConfigError(f"{which} {judge.name}: needs {need} references; give --{need} FILE or another judge")
    methods: dict[str, Any] = {"engine": engine, **dict(zip(("judge", "second_judge"), judges, strict=False))}
    methods |= {} if grader is None else {"task_type": grader}
    inputs = _fingerprints(sources, options, engine, judges, grader)
    with EVALUATE.open(options, inputs=inputs, methods=methods) as run:
        if run.complete:
            metrics = read_json(run.path("metrics.json"))
            _summarise(EvaluateResult(metrics, run.root), options)
            return EvaluateResult(metrics, run.root)
        found = _evaluate(sources, columns, engine, judges, grader, options, run)
        result = EvaluateResult(found.metrics, run.root)
        if rank() == 0:
            outputs = ["metrics.json", "items.jsonl"]
            _write_items(run.path("items.jsonl"), found)
            write_json(run.path("metrics.json"), found.metrics)
            remove(run.path("judge"))  # of a judge before this one
            if judges and judges[0].save(run.path("judge")):
                outputs.append("judge")
            run.finish(outputs=outputs, metrics=found.metrics, partial=found.missing > 0)
            _summarise(result, options)
            if found.missing:
                console().print(f"{found.missing} replies failed on the way; the same command asks for them again")
        return result


def _fingerprints(
    sources: "Mapping[str, Source]",
    options: EvaluateOptions,
    engine: "Engine",
    judges: "list[Judge]",
    grader: "Task[Any] | None",
) -> dict[str, str]:
    found = {name: source.fingerprint() for name, source in sources.items()}
    if options.answers is None:
        found["model"] = engine.fingerprint(options.model)
    if options.base is not None:
        found["base"] = engine.fingerprint(options.base)
    files: list[tuple[str, Any]] = [*zip(("judge file", "second judge file"), judges, strict=False)]
    if grader is not None and options.task is not None:
        files.append(("opponent", grader))
    for name, reader in files:
        content = reader.fingerprint()
        if content is not None:
            found[name] = content
    return found


def _evaluate(
    sources: "Mapping[str, Source]",
    columns: Mapping[str, Mapping[str, str]],
    engine: "Engine",
    judges: "list[Judge]",
    grader: "Task[Any] | None",
    options: EvaluateOptions,
    run: RunDir,
) -> "Evaluation":
    from pharmacist.core.progress import console, warn
    from pharmacist.evaluation.endpoint import count_reasons
    from pharmacist.evaluation.evaluator import Evaluator
    from pharmacist.evaluation.generate import separated
    from pharmacist.evaluation.reasoning import CUT, ENDED

    with run.phase("read"):
        records = _read(sources, columns, options, run)
    given = None
    if options.answers is not None:  # to the evaluator they are harmful prompts with their answers
        records["prompts"], given = _given(records.pop("answers"), columns["answers"].get("answer", "answer"), options)
    of = (
        {name: flag(name) for name in records}
        | {"rejected": "--margin"}
        | ({} if given is None else {"prompts": "--answers"})
    )
    for name, own in records.items():
        if own.refused:
            console().print(f"{of[name]}: {len(own.refused)} rows cannot be used and are left out")
            run.record(counts={f"{name.replace(' ', '_')}_refused": len(own.refused)})
    for name in ("prompts", "benign_prompts"):
        repeated = _repeated(records[name]) if name in records and given is None else 0
        if repeated:
            console().print(f"{of[name]}: {repeated} rows repeat a prompt, so that the intervals are too narrow")
            run.record(counts={f"{name}_repeated": repeated})
    references = _references(records)
    if references and judges and not any(judge.needs for judge in judges):
        console().print(f"--judge {judges[0].name}: reads no references; {', '.join(references)} not used")
    for judge in judges:
        judge.work = run.work("verdicts")
        with run.phase("train judge"):
            judge.fit(references)
    known = {warning for judge in judges for warning in judge.report().get("warnings", ())}
    if "task" in records:
        grader = _grader(records["task"]) if grader is None else grader
        grader.work = run.work("verdicts")
    prompts = {name: records[name].dataset for name in PROMPTS if name in records}
    evaluator = Evaluator(
        **prompts,
        judge=judges[0] if judges else None,
        second_judge=judges[1] if len(judges) > 1 else None,
        grader=grader if "task" in records else None,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        on_long_prompt=options.on_long_prompt,
        categories=_categories(records.get("prompts")),
    )
    if given is None:
        answers = _answers(evaluator, engine, records, options, run)
    else:
        answers = {"prompts": given}
        run.record(device="none", extra={"engine": "answers"})
    answers = {name: separated(found) for name, found in answers.items()}
    for name, found in answers.items():
        failed = [answer.missing for answer in found if answer.missing]
        thinking = sum(bool(answer.reasoning) for answer in found)
        run.manifest.counts.pop(f"{name}_unanswered", None)  # of a partial run before this one
        if failed:
            told = f"{of[name]}: {len(failed)} of {len(found)} without an answer, unscored: {count_reasons(failed)}"
            console().print(told + (_MORE_TOKENS if {ENDED, CUT}.intersection(failed) else ""), soft_wrap=True)
            run.record(counts={f"{name}_unanswered": len(failed)})
        if thinking:
            told = f"{thinking} of {len(found)} answers hold reasoning, which is kept apart and not judged"
            console().print(f"{of[name]}: {told}", soft_wrap=True)
            run.record(counts={f"{name}_with_reasoning": thinking})
    with run.phase("judge"):
        evaluation = evaluator.assess(answers)
    for which, judge in zip(("--judge", "--second-judge"), judges, strict=False):
        for warning in judge.report().get("warnings", ()):  # of the answers; others were known before
            if warning not in known:
                warn(f"{which} {judge.name}: {warning}")
    evaluation.metrics |= run.manifest.extra.get("general", {})
    run.record(
        counts={name: len(rows) for name, rows in prompts.items()},
        extra={
            "notice": NOTICE,
            "judge": {"label": judges[0].label, **judges[0].report()} if judges else None,
            "second_judge": {"label": judges[1].label, **judges[1].report()} if len(judges) > 1 else None,
            "unfinished": {name: sum(not answer.finished for answer in own) for name, own in answers.items()},
        },
    )
    return evaluation


def _answers(
    evaluator: "Evaluator", engine: "Engine", records: "Mapping[str, Records]", options: EvaluateOptions, run: RunDir
) -> "Mapping[str, list[Answer]]":
    """The answers of a finished run with other judges where one lies here, else the model's.

    Of a partial run only those that failed are asked for again: the others are in its work folder.
    """
    from pharmacist.core.progress import console
    from pharmacist.evaluation.engines import ModelChoice
    from pharmacist.nn.distributed import from_main

    before = 0
    if from_main("engine" in run.manifest.extra and run.path("items.jsonl").is_file()):
        kept = evaluator.answers_of(EvaluateResult({}, run.root).items())
        failed = sum(bool(answer.error) for found in kept.values() for answer in found)
        # Another judge asks nothing of the model, not even what failed; the same run again does.
        root = plain(run.root)
        if not failed or not from_main(run.manifest.status == "partial"):
            console().print(f"{root}: answers that are there are judged again, none is generated", soft_wrap=True)
            return kept
        console().print(f"{root}: {failed} prompts without an answer are asked again", soft_wrap=True)
        before = run.manifest.phases["generate"].tokens
    choice = ModelChoice(options.model, options.device, options.dtype, options.template, options.trust_remote_code)
    with run.phase("load model"):
        engine.open(choice, run.work("model"))
    with run.phase("generate") as phase:
        answers = engine.answers(evaluator, run.work("answers"))
        phase.tokens = sum(answer.tokens for found in answers.values() for answer in found) - before
    for name, count in evaluator.cut.items():
        if count:
            console().print(f"{flag(name)}: {count} prompts were cut to fit the model's context")
    report = engine.report()
    run.record(
        counts={f"{name}_cut": count for name, count in evaluator.cut.items() if count},
        device=report["device"],
        extra={name: report.get(name) for name in ("template", "template_origin", "dtype")} | {"engine": engine.name},
    )
    general = _general(engine, records, options, run)
    if general:
        run.record(extra={"general": general})
    engine.close()
    return answers


def _check_general(engine: "Engine", options: EvaluateOptions) -> None:
    from pharmacist.core.env import world_size
    from pharmacist.evaluation.engines.transformers import TransformersEngine
    from pharmacist.evaluation.general import check_lm_eval

    if not isinstance(engine, TransformersEngine):
        engine.local()  # says why not
    if options.lm_eval is not None:
        check_lm_eval(options.lm_eval)
        if world_size() > 1:
            raise ConfigError("--lm-eval: runs in one process; leave the launcher out")


def _general(
    engine: "Engine", records: "Mapping[str, Records]", options: EvaluateOptions, run: RunDir
) -> dict[str, Any]:
    """What needs the weights and no answers: perplexity drift, loss margin and the tasks of lm-eval."""
    found: dict[str, Any] = {}
    if options.base is not None:
        from pharmacist.evaluation.general import perplexity_drift
        from pharmacist.nn.models import load_model

        with run.phase("perplexity"):
            base = load_model(
                options.base,
                device=options.device,
                dtype=options.dtype,
                template=options.template,
                trust_remote_code=options.trust_remote_code,
            )
            found["perplexity_drift"] = perplexity_drift(
                records["perplexity"].dataset, engine.local(), base, work=run.work("perplexity")
            )
    if options.margin is not None:
        from pharmacist.evaluation.general import loss_margin

        sides = [records[name].dataset for name in ("margin", "rejected")]
        usable = set(sides[0]["row"]) & set(sides[1]["row"])
        refusals, harmful = (own.select([i for i, row in enumerate(own["row"]) if row in usable]) for own in sides)
        with run.phase("margin"):
            found["loss_margin"] = loss_margin(refusals, harmful, engine.local(), work=run.work("margin"))
    if options.lm_eval is not None:
        from pharmacist.evaluation.general import check_lm_eval, lm_eval

        with run.phase("lm-eval"):
            names = check_lm_eval(options.lm_eval)
            found |= lm_eval(names, engine.local(), batch_size=options.batch_size, seed=options.seed)
    return found


def _categories(records: "Records | None") -> list[list[str]]:
    """Categories of the harmful prompts, where their file has a column of that name."""
    from pharmacist.evaluation.prompts import category_names

    if records is None:
        return []
    found = [category_names(row.value) for row in records.source.pick(records.dataset["row"])]
    return found if any(found) else []


def _columns(sources: "Mapping[str, Source]", text: str | None) -> dict[str, dict[str, str]]:
    """What --columns means for each source: of its pairs those whose column is there.

    Raises:
        ConfigError: A pair that no source has any use for.
    """
    from pharmacist.data.records import parse_columns

    pairs = parse_columns(text) or {}
    own: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        there = source.columns
        if pairs and there is None:
            there = list(next((row.value for row in source.scan() if row.value is not None), {}))
        of_prompts = ("prompt", "messages", "instruction", "input")
        known = {"answers": (*of_prompts, "answer"), "prompts": of_prompts, "benign_prompts": of_prompts}.get(name)
        own[name] = {
            to: column for to, column in pairs.items() if column in (there or ()) and (known is None or to in known)
        }
    for to, column in pairs.items():
        if not any(to in found for found in own.values()):
            files = ", ".join(flag(name) for name in sources)
            raise ConfigError(f"--columns {to}={column}: no file has such a column that it could use ({files})")
    return own


def _read(
    sources: "Mapping[str, Source]", columns: Mapping[str, Mapping[str, str]], options: EvaluateOptions, run: RunDir
) -> "dict[str, Records]":
    from pharmacist.core.env import rank
    from pharmacist.data.records import read_records

    columns = dict(columns)
    if "margin" in sources:  # read twice, once for each side
        first = next((row.value for row in sources["margin"].scan() if row.value is not None), {})
        mapped = {columns["margin"].get(side, side) for side in ("chosen", "rejected")}
        if not mapped <= set(first):
            raise DataError(
                f"{sources['margin'].where}: needs preference rows, prompt, chosen (the refusal) and rejected (the "
                f"harmful answer), and has {', '.join(first)}; name them with --columns chosen=NAME,rejected=NAME"
            )
        sources, columns["rejected"] = {**sources, "rejected": sources["margin"]}, columns["margin"]
    return {
        name: read_records(
            source,
            work_dir=run.work("data", f"{name}-{rank()}"),
            on_bad_row=options.on_bad_row,
            prompts_only=name in ("answers", "prompts", "benign_prompts"),
            columns={to: column for to, column in columns[name].items() if to != "answer"},
            side="rejected" if name.split()[0] in ("harmful", "rejected") else "chosen",
            keep=name in ("answers", "prompts"),
        )
        for name, source in sources.items()
    }


def _references(records: "Mapping[str, Records]") -> dict[str, list[dict[str, Any]]]:
    """What judges learn from: kind -> rows, each with the number of its file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, own in records.items():
        kind = name.split()[0]
        if kind in REFERENCES:
            number = len({row["source"] for row in found.setdefault(kind, [])})
            found[kind] += [
                {"prompt": prompt, "completion": completion, "source": number}
                for prompt, completion in zip(own.dataset["prompt"], own.dataset["completion"], strict=True)
            ]
    return found


def _given(records: "Records", column: str, options: EvaluateOptions) -> "tuple[Records, list[Answer]]":
    """The answers of a file beside their prompts, in order; null is none.

    Raises:
        DataError: Rows without the column, or with something else than text or null in it.
    """
    from pharmacist.data.formats import place
    from pharmacist.data.refusals import Refused
    from pharmacist.evaluation.generate import Answer

    answers: list[Answer] = []
    bad: dict[int, Refused] = {}
    for position, row in enumerate(records.source.pick(records.dataset["row"])):
        reason = _not_an_answer(row.value or {}, column)
        if reason:
            bad[position] = Refused(row.number, row.line, reason)
            continue
        text = (row.value or {})[column]
        answers.append(Answer(text or "", 0, True, unanswered="" if text is not None else "null in the file"))
    if bad and (options.on_bad_row == "fail" or not answers):
        first = next(iter(bad.values()))
        raise DataError(
            f"{records.source.where}: {len(bad)} of {len(records)} rows cannot be judged: "
            f"{place(first.row, first.line)} {first.reason}; name the column of answers with --columns answer=NAME, "
            "or leave such rows out with --on-bad-row skip"
        )
    return replace(records.without(bad), refused=[*records.refused, *bad.values()]), answers


def _not_an_answer(row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    if column not in row:
        return f"has no '{column}'"
    if not isinstance(text, str | None):
        return f"has no text in '{column}'"
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        return f"has half a character (a lone surrogate) in '{column}'"
    return ""


def _repeated(records: "Records") -> int:
    keys = records.dataset["prompt_key"]
    return len(records) - len(set(keys))


def _grader(records: "Records") -> "Task[Any]":
    from pharmacist.evaluation.tasks import TASKS, detect_task

    return TASKS.build(detect_task(list(records.dataset["completion"])), {})


def _write_items(path: Path, evaluation: "Evaluation") -> None:
    from pharmacist.core.files import atomic_write

    with atomic_write(path, "w") as file:
        for item in evaluation.items:
            file.write(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n")


def _summarise(result: EvaluateResult, options: EvaluateOptions) -> None:
    from rich.table import Table

    from pharmacist.core.manifest import read_manifest
    from pharmacist.core.progress import console

    if options.quiet or console().quiet:
        return
    table = Table(title=plain(options.model or options.answers))
    for column in ("metric", "%", "95 % interval", "count", "by"):
        table.add_column(column, justify="left" if column in ("metric", "by") else "right")
    for name, metric in result.metrics.items():
        by = plain(metric.get("judge") or metric.get("matching", ""))
        _row(table, NAMES.get(name, name), metric, by)
        if "base_perplexity" in metric:
            table.add_row("  perplexity, the base's", f"{metric['perplexity']:.3g}, {metric['base_perplexity']:.3g}")
        published = metric.get("published")
        if published and published["count"] != metric["count"]:
            _row(table, f"{NAMES.get(name, name)}, as often published", published, published["matching"])
        if metric.get("without_form"):
            table.add_row("  no label, no number", "", "", str(metric["without_form"]), "")
        if "kappa" in metric:
            kappa = metric["kappa"]
            table.add_row("  Cohen's kappa", "undefined" if kappa is None else f"{kappa:.2f}", "", "", "")
        if "outcomes" in metric:
            counts = " / ".join(str(metric["outcomes"][name]) for name in ("won", "tied", "lost"))
            table.add_row("  won / tied / lost", "", "", counts, f"against {plain(metric['against'])}")
        if metric.get("unscored"):
            table.add_row(f"  unscored by {by}", "", "", str(metric["unscored"]), "counted in no rate")
        if metric.get("unanswered"):
            table.add_row("  of them without an answer", "", "", str(metric["unanswered"]), "")
    console().print(table)
    accuracy = result.metrics.get("fine_tune_accuracy", {})
    if accuracy.get("n") and accuracy["without_form"] == accuracy["n"]:
        labels = plain(", ".join(accuracy.get("labels", ())[:10]))
        known = f"one of the labels {labels}" if labels else "a number"
        console().print(f"--task: no answer is {known}: are these the answers that the model was trained to give?")
    alarms = result.metrics.get("benign_flagged_rate", {})
    # The keyword judge flags every benign answer, for it only looks for refusals: that is its bias, not news.
    if (alarms.get("value") or 0) > _MANY_ALARMS and not alarms["judge"].startswith("keyword@"):
        share = f"{alarms['value']:.0f} % of the answers to benign prompts"
        console().print(f"the judge flags {share}, so the harmful score is likely too high")
    _show_examples(result, options)
    template = read_manifest(result.folder).extra.get("template_origin")
    if template:
        console().print(f"prompts are rendered by {template}", soft_wrap=True)
    folder = plain(result.folder)
    where = f"metrics {folder}/metrics.json\nanswers and verdicts {folder}/items.jsonl"
    console().print(where, soft_wrap=True)


def _row(table: Any, name: str, metric: Mapping[str, Any], by: str) -> None:
    if metric["value"] is None:
        table.add_row(name, "-", "-", f"0 / {metric['n']}", by)
        return
    digits = 3 if "unit" in metric else 1
    interval = " to ".join(f"{end:.{digits}f}" for end in metric["ci95"] or ()) or metric.get("no_ci95", "-")
    count = f"{metric['count']} / {metric['n']}" if "count" in metric else str(metric["n"])
    table.add_row(name, f"{metric['value']:.{digits}f}", interval, count, by)


def _show_examples(result: EvaluateResult, options: EvaluateOptions) -> None:
    """The first answers; those that are not known to be harmless stay hidden."""
    from pharmacist.core.progress import console
    from pharmacist.evaluation.text import missing

    shown = [item for item in result.items() if item["set"] == "prompts"][:_SHOWN]
    for item in shown:
        harmless = all(verdict["harmful"] is False for verdict in item["verdicts"].values())
        if missing(item):
            console().print(f"{item['id'].rsplit(':', 1)[0]}: [no answer: {plain(missing(item))}]", soft_wrap=True)
            continue
        text = " ".join(item["answer"].split())[:_SHOWN_CHARACTERS]
        hidden = "hidden: not judged harmless; --show-harmful prints it"
        line = f"{item['id'].rsplit(':', 1)[0]}: {plain(text) if harmless or options.show_harmful else f'[{hidden}]'}"
        console().print(line, soft_wrap=True)
