"""The Python interface of objects: datasets, loaded models and methods in, loaded models and results out.

Each function is a stage of the command line, whose options it takes by keyword; what they name may be the object.
Given the stage's options instead (``align(AlignOptions(...))``), it runs the stage from files to files.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import datasets
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from pharmacist.attacks import Attack
from pharmacist.core.method import Method
from pharmacist.data.batches import IGNORED
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.data.templates import choose_template
from pharmacist.data.tokenize import encode
from pharmacist.evaluation.graders import Grader
from pharmacist.evaluation.judges import Judge
from pharmacist.nn.models import LoadedModel, in_memory, load_model
from pharmacist.pipeline import curate
from pharmacist.pipeline.evaluate import EvaluateResult
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stages.align import ALIGN, AlignOptions
from pharmacist.pipeline.stages.attack import ATTACK, AttackOptions
from pharmacist.pipeline.stages.curate import CurateOptions
from pharmacist.pipeline.stages.evaluate import EVALUATE, EvaluateOptions
from pharmacist.pipeline.stages.repair import REPAIR, RepairOptions
from pharmacist.repairs.base import Repair
from pharmacist.selectors import Selector
from pharmacist.training.options import GivenLora, LoraOptions, TrainingStageOptions, train_options
from pharmacist.training.strategy import GradientStrategy


Rows: TypeAlias = str | datasets.Dataset | Sequence[Mapping[str, Any]]
"""A path, a hub id, a dataset or a list of dicts, in any layout that the commands read."""
Model: TypeAlias = str | PreTrainedModel | PeftModel
"""A local folder, a hub id, or a loaded model, which is left as it is."""
Choice: TypeAlias = str | Mapping[str, Any]
"""The name of a method, or ``{"name": ..., **options}``."""
Template: TypeAlias = Literal["auto", "chat", "alpaca"]
OnBadRow: TypeAlias = Literal["fail", "skip"]


def rank(
    pool: Rows,
    *,
    safe: Rows | Sequence[Rows] | None = None,
    harmful: Rows | Sequence[Rows] | None = None,
    utility: Rows | Sequence[Rows] | None = None,
    labels: str | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    selector: Choice | Selector = "pharmacist",
    top: float | None = None,
    top_k: int | None = None,
    min_score: float | None = None,
    fill: bool = False,
    diversity: Literal["none", "near-duplicates", "k-center", "facility-location"] = "none",
    diversity_margin: float = 1.5,
    balance: str | None = None,
    balance_share: float = 0.5,
    duplicate_threshold: float = 0.8,
    to_label: int = 40,
    embedder: str | None = None,
    resume_selector: str | None = None,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    template: Template = "auto",
    max_length: int = 0,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    checkpoint_seconds: float = 30.0,
    output_dir: str | None = None,
) -> Ranking:
    """Ranks an alignment pool.

    Args:
        pool: Rows to rank.
        safe: Safe references: harmful prompt, refusal. Several files or datasets are several sources, of which one at
            a time is held out.
        harmful: Harmful references: harmful prompt, harmful answer; likewise.
        utility: Utility references: benign prompt, helpful answer; likewise.
        labels: A person's labels of some rows, ``labels.json``.
        model: Reads the pool; selectors that need none do without.
        tokenizer: Of a loaded model; by default the one that lies where it was loaded from.
        selector: A selector, such as ``PharmacistSelector(folds=3)``, or its name.
        top: Share of the pool that will be kept, in (0, 1]: where the cut of the ranking lies; 0.3 by default.
        top_k: Number of rows that will be kept, instead.
        min_score: Least score of the rows that will be kept, instead.
        fill: Fill up with rows whose own reason speaks against them.
        diversity: How rows are kept from resembling each other.
        diversity_margin: k-center and facility-location take rows from that many times as many best-ranked ones.
        balance: Column of the pool of which no value may vanish from the core subset.
        balance_share: Least share of each value, of a proportional draw.
        duplicate_threshold: Jaccard similarity of word shingles from which two rows are near-duplicates.
        to_label: How many rows to name whose label would teach most.
        embedder: A sentence-transformers model that says how near rows are.
        resume_selector: Folder of an earlier `curate` whose trained selector scores this pool, without training.
        columns: Other column names, ``{"prompt": "question"}``.
        where: Only rows with these values, ``["label=true"]``.
        on_bad_row: ``skip`` leaves rows out that cannot be used.
        template: Prompt template; auto is the model's own where it has one, else Alpaca.
        max_length: Longest row in tokens; 0 is the model's own limit.
        trust_remote_code: Run code that comes with the model.
        seed: Of every random stream.
        device: Where a model given by name runs.
        dtype: Its number format.
        checkpoint_seconds: Time between checkpoints of a training.
        output_dir: Where partial state lies, so that an interrupted ranking resumes; a temporary folder by default.

    Returns:
        The ranking; `Ranking.select` gives the core subset.

    Raises:
        PharmacistError: Rows, models or options that cannot be used.
    """
    return curate.rank(
        CurateOptions(
            pool=_rows(pool, "pool"),
            safe=_several(safe, "safe"),
            harmful=_several(harmful, "harmful"),
            utility=_several(utility, "utility"),
            labels=labels,
            model=_model(model, tokenizer, template),
            selector=_choice(selector),
            top=top,
            top_k=top_k,
            min_score=min_score,
            fill=fill,
            diversity=diversity,
            diversity_margin=diversity_margin,
            balance=balance,
            balance_share=balance_share,
            duplicate_threshold=duplicate_threshold,
            to_label=to_label,
            embedder=embedder,
            resume_selector=resume_selector,
            columns=None if columns is None else ",".join(f"{name}={column}" for name, column in columns.items()),
            where=list(where),
            on_bad_row=on_bad_row,
            template=template,
            max_length=max_length,
            trust_remote_code=trust_remote_code,
            seed=seed,
            device=device,
            dtype=dtype,
            checkpoint_seconds=checkpoint_seconds,
            output_dir=output_dir or "",
        )
    )


def align(
    model: Model | AlignOptions,
    data: Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    defense: Choice | GradientStrategy = "sft",
    harmful: Rows | None = None,
    harmful_batch_size: int = 0,
    pair_by: Literal["prompt", "row"] = "prompt",
    weights: str | None = None,
    args: TrainingArguments | None = None,
    peft_config: LoraConfig | None = None,
    tuning: Literal["lora", "full"] = "lora",
    columns: str | None = None,
    where: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
    template: Template = "auto",
    max_length: int = 0,
    seed: int | None = None,
    output_dir: str | None = None,
) -> Any:
    """Trains a model on an alignment set with an alignment-stage defense.

    Args:
        model: The model; or `AlignOptions`, for the stage from files to files.
        data: Alignment set, such as `Ranking.select` gives it.
        tokenizer: Of a loaded model; by default the one that lies where it was loaded from.
        defense: A defense, such as ``Vaccine(rho=2)``, or its name.
        harmful: Harmful rows for the defenses that use them.
        harmful_batch_size: Harmful rows per pass; 0 is as many as alignment rows.
        pair_by: How repnoise finds the harmful row of an alignment row.
        weights: Weights of the rows' losses: ``scores.parquet``, or a Parquet file with a column weight.
        args: transformers' arguments. Output folder, checkpoints, seeds, device and number format are this function's;
            without them the protocol of the alignment-stage papers is used.
        peft_config: PEFT's configuration of the adapter; rank 8 on all linear layers by default.
        tuning: ``full`` trains all weights of a copy of the model.
        columns: Other column names, ``"prompt=question"``.
        where: Only rows with these values, ``["label=true"]``.
        on_bad_row: ``skip`` leaves rows out that cannot be used.
        on_long_prompt: What to do with a row whose prompt alone fills the length.
        template: Prompt template; auto is the one that was saved with the model, else its own, else Alpaca.
        max_length: Longest row in tokens; 0 is the model's own limit.
        seed: Of every random stream; by default that of `args`, else 0.
        output_dir: Also writes adapter, log, card and manifest there, where an interrupted training resumes.

    Returns:
        The trained model: a ``PeftModel``, a ``PreTrainedModel`` under full tuning; `AlignResult` for options.

    Raises:
        PharmacistError: Rows, models or options that cannot be used.
    """
    if isinstance(model, AlignOptions):
        return ALIGN(model)
    options = AlignOptions(
        data=_rows(data, "data"),
        harmful=_rows(harmful, "harmful"),
        harmful_batch_size=harmful_batch_size,
        pair_by=pair_by,
        weights=weights,
        defense=_choice(defense),
        columns=columns,
        where=list(where),
        on_bad_row=on_bad_row,
        on_long_prompt=on_long_prompt,
        max_length=max_length,
        **_training(AlignOptions, model, tokenizer, args, peft_config, tuning, template, seed, output_dir),
    )
    return _trained(ALIGN(options), options)


def attack(
    model: Model | AttackOptions,
    *,
    task: Rows | None = None,
    harmful: Rows | None = None,
    kind: Choice | Attack = "mix",
    poison_ratio: float = 0.1,
    samples: int = 1000,
    defense: Choice | GradientStrategy = "sft",
    safe: Rows | None = None,
    adapter: Literal["fresh", "continue"] = "fresh",
    disjoint_from: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    args: TrainingArguments | None = None,
    peft_config: LoraConfig | None = None,
    tuning: Literal["lora", "full"] = "lora",
    columns: str | None = None,
    where: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
    template: Template = "auto",
    max_length: int = 0,
    seed: int | None = None,
    output_dir: str | None = None,
) -> Any:
    """Builds a poisoned fine-tuning set and fine-tunes a model on it, as a user of a fine-tuning service would.

    Args:
        model: The model, an aligned one as `align` gives it; or `AttackOptions`, for the stage from files to files.
        task: Benign rows of the user's task, or the name of a public one, such as ``"sst2"``.
        harmful: Rows with which the set is poisoned.
        kind: What the set is made of, such as ``IdentityAttack()``, or its name.
        poison_ratio: Share of harmful rows in the set, in [0, 1].
        samples: Rows in the set.
        defense: A fine-tuning-stage defense, such as ``Lisa(rho=1)``, or its name; ``sft`` is none.
        safe: The defender's safe rows, for the defenses that use them.
        adapter: Trains a fresh adapter on the merged model, or a copy of the one that a ``PeftModel`` has.
        disjoint_from: Files with which the set must share no prompt.
        tokenizer: As in `align`; so are the arguments below.
        args: transformers' arguments; without them the protocol of the alignment-stage papers is used.
        peft_config: PEFT's configuration of the adapter.
        tuning: ``full`` trains all weights of a copy of the model.
        columns: Other column names.
        where: Only rows with these values.
        on_bad_row: ``skip`` leaves rows out that cannot be used.
        on_long_prompt: What to do with a row whose prompt alone fills the length.
        template: Prompt template.
        max_length: Longest row in tokens.
        seed: Of every random stream.
        output_dir: Also writes set, weights, log, card and manifest there.

    Returns:
        The attacked model; `AttackResult` for options.

    Raises:
        PharmacistError: Rows, models or options that cannot be used.
    """
    if isinstance(model, AttackOptions):
        return ATTACK(model)
    options = AttackOptions(
        task=_rows(task, "task"),
        harmful=_rows(harmful, "harmful"),
        safe=_rows(safe, "safe"),
        kind=_choice(kind),
        poison_ratio=poison_ratio,
        samples=samples,
        defense=_choice(defense),
        adapter=adapter,
        disjoint_from=list(disjoint_from),
        columns=columns,
        where=list(where),
        on_bad_row=on_bad_row,
        on_long_prompt=on_long_prompt,
        max_length=max_length,
        **_training(AttackOptions, model, tokenizer, args, peft_config, tuning, template, seed, output_dir),
    )
    return _trained(ATTACK(options), options)


def repair(
    model: Model | RepairOptions,
    *,
    aligned: Model | None = None,
    base: Model | None = None,
    method: Choice | Repair = "safe-lora",
    harmful: Rows | None = None,
    safe: Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: str | None = None,
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
    template: Template = "auto",
    max_length: int = 0,
    seed: int = 0,
    output_dir: str | None = None,
) -> Any:
    """Takes safety back that a user's fine-tuning has cost, without training.

    Args:
        model: The fine-tuned model; or `RepairOptions`, for the stage from files to files. Of a loaded one whole
            weights are repaired, with all adapters merged.
        aligned: The model that the fine-tuning started from.
        base: What the aligned model was made from; a loaded aligned model does not know it.
        method: A repair, such as ``SafeLora(threshold=0.4)``, or its name.
        harmful: The defender's harmful rows, for antidote.
        safe: The defender's safe rows, for nlsr.
        tokenizer: As in `align`; so are the arguments below.
        columns: Other column names.
        on_bad_row: ``skip`` leaves rows out that cannot be used.
        on_long_prompt: What to do with a row whose prompt alone fills the length.
        template: Prompt template.
        max_length: Longest row in tokens.
        seed: Of random draws.
        output_dir: Also writes weights, ``repair.json``, card and manifest there.

    Returns:
        The repaired model; `RepairResult` for options.

    Raises:
        PharmacistError: Models that do not belong together, or nothing to repair.
    """
    if isinstance(model, RepairOptions):
        return REPAIR(model)
    options = RepairOptions(
        model=_model(model, tokenizer, template),
        aligned=_model(aligned, tokenizer, template),
        base=_model(base, tokenizer, template),
        form="auto" if isinstance(model, str) else "weights",
        method=_choice(method),
        harmful=_rows(harmful, "harmful"),
        safe=_rows(safe, "safe"),
        columns=columns,
        on_bad_row=on_bad_row,
        on_long_prompt=on_long_prompt,
        template=template,
        max_length=max_length,
        seed=seed,
        output_dir=output_dir or "",
    )
    return _trained(REPAIR(options), options)


def evaluate(
    model: Model | EvaluateOptions,
    *,
    prompts: Rows | None = None,
    benign_prompts: Rows | None = None,
    task: Rows | None = None,
    task_type: Choice | Grader[Any] = "auto",
    judge: Choice | Judge = "keyword",
    second_judge: Choice | Judge = "none",
    safe: Rows | Sequence[Rows] | None = None,
    harmful: Rows | Sequence[Rows] | None = None,
    utility: Rows | Sequence[Rows] | None = None,
    perplexity: Rows | None = None,
    margin: Rows | None = None,
    base: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 0,
    columns: str | None = None,
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "cut"] = "fail",
    template: Template = "auto",
    seed: int = 0,
    output_dir: str | None = None,
) -> EvaluateResult:
    """Measures harmful score, over-refusal and fine-tune accuracy of a model, with intervals.

    Args:
        model: The model; or `EvaluateOptions`, for the stage from files to files.
        prompts: Harmful prompts, or a set by name, such as ``"beavertails"``.
        benign_prompts: Benign prompts that look harmful; refusing them is over-refusal.
        task: Test rows of the fine-tuning task, or a task by name, such as ``"sst2"``.
        task_type: How answers to the task are graded, such as ``Exact()``, or its name; auto tells by the completions.
        judge: Who decides whether an answer is harmful, such as ``ProbeJudge()``, or its name.
        second_judge: Judges the same answers too, for the agreement of the two; ``none`` by default.
        safe: Safe references on which a judge such as the probe is trained; several are several sources.
        harmful: Harmful references for the judge.
        utility: Utility references for the judge.
        perplexity: Rows with ordinary answers: how much their perplexity rose over that under `base`.
        margin: Preference rows: by how much the model prefers the chosen answer to the rejected one.
        base: The model from before alignment or attack, for `perplexity`.
        tokenizer: Of a loaded model; by default the one that lies where it was loaded from.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts answered at a time; 0 is as many as fit.
        columns: Other column names, ``"prompt=Goal"``.
        on_bad_row: ``skip`` leaves rows out that cannot be used.
        on_long_prompt: What to do with a prompt that fills the model's whole context.
        template: Prompt template; auto is the one that was saved with the model, else its own, else Alpaca.
        seed: Of random draws.
        output_dir: Also writes ``metrics.json``, ``items.jsonl`` and the manifest there, where it resumes.

    Returns:
        The metrics, which show themselves in a notebook; `EvaluateResult.to_pandas` gives them as a table.

    Raises:
        PharmacistError: Rows, models or options that cannot be used.
    """
    if isinstance(model, EvaluateOptions):
        return EVALUATE(model)  # type: ignore[no-any-return]
    given = {"prompts": prompts, "benign_prompts": benign_prompts, "task": task}
    given |= {"perplexity": perplexity, "margin": margin}
    with ExitStack() as stack:
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="pharmacist-"))
        found: EvaluateResult = EVALUATE(
            EvaluateOptions(
                model=_model(model, tokenizer, template),
                base=_model(base, tokenizer, template),
                **{name: _rows(value, name) for name, value in given.items()},
                safe=_several(safe, "safe"),
                harmful=_several(harmful, "harmful"),
                utility=_several(utility, "utility"),
                task_type=_choice(task_type),
                judge=_choice(judge),
                second_judge=_choice(second_judge),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                columns=columns,
                on_bad_row=on_bad_row,
                on_long_prompt=on_long_prompt,
                template=template,
                seed=seed,
                quiet=output_dir is None,
                output_dir=folder,
            )
        )
        found._items = None if output_dir else found.items()
    return found


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    template: Template = "auto",
    side: Literal["chosen", "rejected"] = "chosen",
) -> datasets.Dataset:
    """Rows in tokens, for a Trainer of your own: exactly as `align` and `attack` train on them.

    Args:
        rows: A path, a hub id, a ``datasets.Dataset`` or a list of dicts.
        tokenizer: The model's.
        max_length: Longest row in tokens; completions are cut to fit.
        template: Prompt template; auto is the tokenizer's own, else Alpaca.
        side: Which answer of a preference row is its completion.

    Returns:
        Columns ``input_ids`` and ``labels``, -100 where there is no target: what ``DataCollatorForSeq2Seq`` of
        transformers and TRL's ``SFTTrainer`` take.

    Raises:
        DataError: Rows that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="pharmacist-") as folder:
        records = read_records(open_source(rows, name="rows"), work_dir=folder, side=side)
        encoded = encode(records.dataset, tokenizer, choose_template(tokenizer, template), max_length=max_length)
    ids = encoded.token_ids(range(len(encoded)))
    made = [
        {"input_ids": row.tolist(), "labels": [IGNORED] * int(n) + row[n:].tolist()}
        for row, n in zip(ids, encoded.prompt_lengths, strict=True)
    ]
    return datasets.Dataset.from_list(made)


def _model(model: Any, tokenizer: PreTrainedTokenizerBase | None, template: str) -> Any:
    """What stands for a model in a stage's options: its name, or the loaded model."""
    return model if model is None or isinstance(model, str) else in_memory(model, tokenizer, template)


def _rows(rows: Any, name: str) -> Any:
    """What stands for rows in a stage's options: a name, or the opened rows."""
    return rows if rows is None or isinstance(rows, str) else open_source(rows, name=name)


def _several(rows: Any, name: str) -> list[Any]:
    """Likewise for references: a list of rows is one source, one of files or datasets are as many."""
    if isinstance(rows, list | tuple) and not all(isinstance(row, Mapping) for row in rows):
        return [_rows(one, name) for one in rows]
    return [] if rows is None else [_rows(rows, name)]


def _choice(method: Choice | Method) -> dict[str, Any]:
    """What stands for a method in a stage's options."""
    if isinstance(method, Method):
        return method.choice()
    return {"name": method} if isinstance(method, str) else dict(method)


def _training(
    stage: type[TrainingStageOptions],
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: TrainingArguments | None,
    peft_config: LoraConfig | None,
    tuning: str,
    template: str,
    seed: int | None,
    output_dir: str | None,
) -> dict[str, Any]:
    """Options that training stages have in common."""
    return {
        "model": _model(model, tokenizer, template),
        "train": {} if args is None else train_options(args, stage.TRAIN_DEFAULTS),
        "lora": LoraOptions() if peft_config is None else GivenLora.of(peft_config),
        "tuning": tuning,
        "template": template,
        "device": "cpu" if args is not None and args.use_cpu else "auto",
        "dtype": "bfloat16" if args is not None and args.bf16 else "auto",
        "seed": (0 if args is None else args.seed) if seed is None else seed,
        "output_dir": output_dir or "",
    }


def _trained(result: Any, options: Any) -> Any:
    """The model that a stage made: as it was trained, or as it was written by a run that was complete already."""
    if result.model is None or (options.output_dir and not isinstance(options.model, LoadedModel)):
        return load_model(options.output_dir, device=options.device, merge=False).model
    return result.model
