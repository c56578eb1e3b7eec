"""The Python interface: functions that take and return objects (datasets, loaded models, methods, results).

Each function is a stage of the command line and takes its options by keyword, with objects instead of names or paths.
Called with the stage's options (``align(AlignOptions(...))``), it runs the stage from files to files.
"""

import inspect
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeAlias, TypeVar

import datasets
import pandas as pd
import torch
from docstring_parser import parse_from_object
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from pharmacist.attacks import Attack
from pharmacist.core.config import docs_of, method_fields
from pharmacist.core.errors import ConfigError
from pharmacist.core.naming import by_arguments, naming_arguments
from pharmacist.core.typed import AtLeast1, checked, cut
from pharmacist.data.batches import IGNORED
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.data.templates import choose_template
from pharmacist.data.tokenize import encode
from pharmacist.evaluation.graders import Grader
from pharmacist.evaluation.judges import Judge
from pharmacist.nn.distributed import barrier, from_main
from pharmacist.nn.models import LoadedModel, load_model, wrap_model
from pharmacist.pipeline.evaluate import EvaluateResult
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stage import Stage
from pharmacist.pipeline.stages.align import ALIGN, AlignOptions
from pharmacist.pipeline.stages.attack import ATTACK, AttackOptions
from pharmacist.pipeline.stages.curate import RANK, CurateOptions
from pharmacist.pipeline.stages.evaluate import EVALUATE, EvaluateOptions
from pharmacist.pipeline.stages.repair import REPAIR, RepairOptions
from pharmacist.repairs.base import Repair
from pharmacist.selectors import Selector
from pharmacist.training.options import PeftLoraOptions, train_options
from pharmacist.training.strategy import GradientStrategy


F = TypeVar("F", bound=Callable[..., Any])
Rows: TypeAlias = str | os.PathLike[str] | datasets.Dataset | pd.DataFrame | Sequence[Mapping[str, Any]]
"""A path, a Hub id, a dataset, a data frame or a list of dicts, in any layout that the commands read."""
Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel | PeftModel
"""A local folder, a Hub id, or a loaded model, which is not modified."""
ByName: TypeAlias = str | Mapping[str, Any]
"""The name of a method, or ``{"name": ..., **options}``."""
Labels: TypeAlias = Mapping[int, str] | Rows
Weights: TypeAlias = str | os.PathLike[str] | Ranking | Iterable[float]
Template: TypeAlias = Literal["auto", "chat", "alpaca"]
OnBadRow: TypeAlias = Literal["fail", "skip"]
Columns: TypeAlias = str | Mapping[str, str] | None
_EXPLAINED = {
    "tokenizer": "Tokenizer of a loaded model; by default the one saved with the model.",
    "labels": 'Human labels of some rows of the pool: ``{12: "good"}``, the entries of a labels.json, or the path of '
    "one. The selector pharmacist learns from them; with every selector, no row labelled bad is selected.",
    "weights": "Weights of the rows' losses: a number for each row, the ranking that `data` was selected from, or the "
    "path of its scores.parquet. Only relative weights matter: the mean over the training rows is set to 1.",
    "columns": 'Other column names, ``{"prompt": "question"}``.',
    "where": 'Only use rows with these values, ``["label=true", "kind=advice"]``, in each set that has the column, or '
    'in one set, ``["harmful:is_safe=false"]``.',
    "args": "transformers' TrainingArguments, without output folder, checkpoints, seeds, device and dtype; by default "
    "the protocol of the alignment-stage papers.",
    "peft_config": "PEFT configuration of the adapter; by default rank 8 on all linear layers.",
}
"""Descriptions of arguments that are not options, or differ from them."""


def explained(options: Any) -> Callable[[F], F]:
    """Explains a function, which has the options of a command as its arguments, in terms of these.

    Its docstring is completed with the descriptions of the options, and its messages and errors name the arguments.
    """

    def complete(function: F) -> F:
        explaining = naming_arguments()(torch.inference_mode(False)(function))  # whatever mode the caller has set
        if function.__doc__:  # not under python -OO
            explaining.__doc__ = _docstring(function, options)
        return explaining

    return complete


def _docstring(function: Callable[..., Any], options: Any) -> str:
    """The docstring of a function, with the descriptions of the options that are its arguments."""
    about, _, rest = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    own = {param.arg_name: param.description or "" for param in parse_from_object(function).params}
    docs, lines = docs_of(options) | _EXPLAINED | own, [about, "", "Args:"]
    for name in inspect.signature(function).parameters:
        text = f"{name}: {by_arguments(' '.join(docs[name].split()))}"
        lines.append(textwrap.fill(text, 115, initial_indent=" " * 4, subsequent_indent=" " * 8))
    raises = "    PharmacistError: Rows, a model or an option cannot be used."
    return "\n".join([*lines, "", rest[rest.index("Returns:") :], "", "Raises:", raises])


@explained(CurateOptions)
def rank(
    pool: Rows,
    *,
    safe: Rows | Sequence[Rows] | None = None,
    harmful: Rows | Sequence[Rows] | None = None,
    utility: Rows | Sequence[Rows] | None = None,
    labels: Labels | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    selector: ByName | Selector = "pharmacist",
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
    columns: Columns = None,
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
    overwrite: bool = False,
) -> Ranking:
    """Ranks an alignment pool.

    Args:
        pool: Rows to rank.
        model: Model that reads the pool, by name or loaded. It need not be the model that is aligned later.
        selector: A selector, such as ``PharmacistSelector(folds=3)``, or its name.
        to_label: Number of rows to suggest for labelling, those whose labels are most informative.
        output_dir: Folder for everything that ``pharmacist curate`` writes, in which an interrupted ranking is resumed
            and a finished one is loaded; by default nothing is kept.

    Returns:
        The ranking; `Ranking.select` gives the core subset.
    """
    return RANK(_options(RANK, locals()))  # type: ignore[no-any-return]


@explained(AlignOptions)
def align(
    model: Model | AlignOptions,
    data: Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    defense: ByName | GradientStrategy = "sft",
    harmful: Rows | None = None,
    harmful_batch_size: int = 0,
    pair_by: Literal["prompt", "row", "turn"] = "prompt",
    weights: Weights | None = None,
    args: TrainingArguments | None = None,
    peft_config: LoraConfig | None = None,
    tuning: Literal["lora", "full"] = "lora",
    columns: Columns = None,
    where: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
    template: Template = "auto",
    max_length: int = 0,
    seed: int | None = None,
    output_dir: str | None = None,
    overwrite: bool = False,
) -> Any:
    """Trains a model on an alignment set with an alignment-stage defense.

    Args:
        model: The model; or `AlignOptions`, to run the command with these options.
        data: Alignment set, such as a result of `Ranking.select`.
        defense: A defense, such as ``Vaccine(rho=2)``, or its name.
        seed: Seed of all random number generators; by default the seed of `args`, else 0.
        output_dir: Folder for adapter, log, model card and manifest, in which an interrupted training can be resumed.

    Returns:
        The trained model: a ``PeftModel``, a ``PreTrainedModel`` under full tuning; `ModelResult` for options.
    """
    return _model_from(ALIGN, align, locals())


@explained(AttackOptions)
def attack(
    model: Model | AttackOptions,
    *,
    task: Rows | None = None,
    harmful: Rows | None = None,
    kind: ByName | Attack = "mix",
    poison_ratio: float = 0.1,
    samples: int = 1000,
    defense: ByName | GradientStrategy = "sft",
    safe: Rows | None = None,
    adapter: Literal["fresh", "continue"] = "fresh",
    disjoint_from: Sequence[Rows] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    args: TrainingArguments | None = None,
    peft_config: LoraConfig | None = None,
    tuning: Literal["lora", "full"] = "lora",
    columns: Columns = None,
    where: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
    template: Template = "auto",
    max_length: int = 0,
    seed: int | None = None,
    output_dir: str | None = None,
    overwrite: bool = False,
) -> Any:
    """Builds a poisoned fine-tuning set and fine-tunes a model on it, as a user of a fine-tuning service would.

    Args:
        model: The model, such as a result of `align`; or `AttackOptions`, to run the command with these options.
        task: Benign rows of the user's task, or the name of a public one, such as ``"sst2"``.
        kind: Kind of attack, such as ``IdentityAttack()``, or its name.
        defense: A fine-tuning-stage defense, such as ``Lisa(rho=1)``, or its name; ``sft`` is none.
        output_dir: Folder for attack set, weights, log, model card and manifest, in which an interrupted training can
            be resumed.

    Returns:
        The attacked model; `ModelResult` for options.
    """
    return _model_from(ATTACK, attack, locals())


@explained(RepairOptions)
def repair(
    model: Model | RepairOptions,
    *,
    aligned: Model | None = None,
    base: Model | None = None,
    method: ByName | Repair = "safe-lora",
    harmful: Rows | None = None,
    safe: Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: Columns = None,
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "skip", "cut"] = "fail",
    template: Template = "auto",
    max_length: int = 0,
    seed: int = 0,
    output_dir: str | None = None,
    overwrite: bool = False,
) -> Any:
    """Restores the safety of a fine-tuned model, without training.

    Args:
        model: The fine-tuned model; or `RepairOptions`, to run the command with these options. For a loaded model,
            full weights are repaired, with all adapters merged.
        base: The base model of the aligned model; needed if that is a loaded model.
        method: A repair, such as ``SafeLora(threshold=0.4)``, or its name.
        output_dir: Folder for weights, ``repair.json``, model card and manifest.

    Returns:
        The repaired model; `ModelResult` for options.
    """
    arguments = locals() | {"form": "auto" if isinstance(model, str | os.PathLike) else "weights"}
    return _model_from(REPAIR, repair, arguments)


@explained(EvaluateOptions)
def evaluate(
    model: Model | EvaluateOptions | None = None,
    *,
    prompts: Rows | None = None,
    benign_prompts: Rows | None = None,
    answers: Rows | None = None,
    task: Rows | None = None,
    task_type: ByName | Grader = "auto",
    judge: ByName | Judge = "keyword",
    second_judge: ByName | Judge = "none",
    safe: Rows | Sequence[Rows] | None = None,
    harmful: Rows | Sequence[Rows] | None = None,
    utility: Rows | Sequence[Rows] | None = None,
    perplexity: Rows | None = None,
    margin: Rows | None = None,
    base: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 0,
    columns: Columns = None,
    on_bad_row: OnBadRow = "fail",
    on_long_prompt: Literal["fail", "cut"] = "fail",
    template: Template = "auto",
    seed: int = 0,
    output_dir: str | None = None,
    overwrite: bool = False,
) -> EvaluateResult:
    """Measures harmful score, over-refusal and fine-tune accuracy of a model, with intervals.

    Args:
        model: The model; or `EvaluateOptions`, to run the command with these options. Left out where there are
            `answers`.
        task_type: Grader of the answers to the task, such as ``Exact()``, or its name; auto chooses a grader itself.
        judge: The judge that decides whether an answer is harmful, such as ``ProbeJudge()``, or its name.
        output_dir: Folder for ``metrics.json``, ``items.jsonl`` and the manifest, in which an interrupted run can be
            resumed.

    Returns:
        The metrics, displayed as a table in a notebook; `EvaluateResult.to_pandas` returns them as a data frame.
    """
    arguments = locals()
    if isinstance(model, EvaluateOptions):
        return EVALUATE(_alone(evaluate, arguments))  # type: ignore[no-any-return]
    with tempfile.TemporaryDirectory(prefix="pharmacist-") as temporary:
        own = {"output_dir": output_dir or from_main(temporary), "quiet": output_dir is None}
        found: EvaluateResult = EVALUATE(_options(EVALUATE, arguments | own))
        barrier()  # the first process's folder holds the answers of all, until all have read them
        if not output_dir:
            found = EvaluateResult(found.metrics, None, found.items())
        barrier()
    return found


@naming_arguments()
def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    template: Template = "auto",
    side: Literal["chosen", "rejected"] = "chosen",
) -> datasets.Dataset:
    """Tokenises rows for your own Trainer, exactly as `align` and `attack` do.

    Args:
        rows: A path, a Hub id, a ``datasets.Dataset``, a pandas ``DataFrame`` or a list of dicts.
        tokenizer: Tokenizer of the model.
        max_length: Longest row in tokens; completions are truncated to fit.
        template: Prompt template; auto is the tokenizer's chat template, else Alpaca.
        side: Which answer of a preference row is the completion.

    Returns:
        A dataset with the columns ``input_ids`` and ``labels`` (-100 where there is no target), for transformers'
        ``DataCollatorForSeq2Seq`` and TRL's ``SFTTrainer``.

    Raises:
        ConfigError: An argument cannot be used.
        DataError: Rows cannot be used.
    """
    checked("side", Literal["chosen", "rejected"], side)
    checked("max_length", AtLeast1, max_length)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"tokenizer: must be a loaded tokenizer, not {cut(repr(tokenizer))}")
    with tempfile.TemporaryDirectory(prefix="pharmacist-") as folder:
        records = read_records(open_source(rows, name="rows"), work_dir=folder, side=side)
        encoded = encode(records.dataset, tokenizer, choose_template(tokenizer, template), max_length=max_length)
    ids = encoded.token_ids(range(len(encoded)))
    made = [
        {"input_ids": row.tolist(), "labels": [IGNORED] * int(n) + row[n:].tolist()}
        for row, n in zip(ids, encoded.prompt_lengths, strict=True)
    ]
    return datasets.Dataset.from_list(made)


def _model_from(stage: Stage, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The model of a stage that was just run, or the one that a complete run wrote earlier."""
    if isinstance(arguments["model"], stage.options):
        return stage(_alone(function, arguments))
    options = _options(stage, arguments)
    model = stage(options).model
    if model is None or (options.output_dir and not isinstance(options.model, LoadedModel)):
        return load_model(options.output_dir, device=options.device, dtype=options.dtype, merge=False).model
    return model


def _alone(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The options of a stage that a function was given, beside which nothing else may stand."""
    _, *others = inspect.signature(function).parameters.values()
    for other in others:
        value = arguments[other.name]
        if value is not other.default and (not isinstance(value, type(other.default)) or value != other.default):
            raise ConfigError(f"{other.name}: has no effect beside {type(arguments['model']).__name__}; set it there")
    return arguments["model"]


def _options(stage: Stage, arguments: dict[str, Any]) -> Any:
    """A stage's options from the arguments of its function; None stands for the default."""
    if (args := arguments.get("args")) is not None:
        if not isinstance(args, TrainingArguments):
            raise ConfigError(f"args: must be transformers' TrainingArguments, not {cut(repr(args))}")
        arguments["train"] = train_options(args, stage.options.TRAIN_DEFAULTS)
        arguments |= {"device": "cpu" if args.use_cpu else "auto", "dtype": "bfloat16" if args.bf16 else "auto"}
        arguments["seed"] = args.seed if arguments["seed"] is None else arguments["seed"]
    if (lora := arguments.get("peft_config")) is not None:
        if not isinstance(lora, LoraConfig):
            raise ConfigError(f"peft_config: must be a LoraConfig of PEFT, not {cut(repr(lora))}")
        if arguments["tuning"] == "full" or arguments.get("adapter") == "continue":
            raise ConfigError("peft_config: has no effect where no new adapter is trained; leave it out")
        arguments["lora"] = PeftLoraOptions.of(lora)
    models = [arguments.get(name) for name in stage.models]
    if arguments["tokenizer"] is not None and all(isinstance(one, str | os.PathLike | None) for one in models):
        raise ConfigError("tokenizer: is that of a loaded model; one that is given by name comes with its own")
    arguments["output_dir"] = arguments["output_dir"] or ""
    values: dict[str, Any] = {}
    for item in fields(stage.options):
        value: Any = arguments.get(item.name)
        if value is None and not (item.default is MISSING and item.default_factory is MISSING):
            continue
        if item.name in stage.models and not isinstance(value, str | os.PathLike):
            value = wrap_model(value, arguments["tokenizer"], arguments["template"])
        elif item.name == "labels":
            value = _labels(value)
        elif item.name == "weights":
            value = _weights(value, arguments["data"])
        elif item.name in stage.files:
            value = _rows(value, item.name, several=item.default_factory is list)
        elif item.name in method_fields(stage.options):
            value = _choice(item.name, value)
        elif item.name == "columns" and not isinstance(value, str):
            value = _columns(value)
        values[item.name] = value
    return stage.options(**values)


def _rows(rows: Any, name: str, *, several: bool) -> Any:
    """Rows as a stage's options hold them; where there may be several sources, a list of rows is one of them."""
    if several:
        one = not isinstance(rows, list | tuple) or (rows and all(isinstance(row, Mapping) for row in rows))
        return [_rows(source, name, several=False) for source in ([rows] if one else rows)]
    return rows if rows is None or isinstance(rows, str) else open_source(rows, name=name)


def _labels(labels: Any) -> Any:
    """Labels as a stage's options hold them: a path, or entries of that file."""
    if isinstance(labels, str | os.PathLike):
        return labels
    if isinstance(labels, Mapping):
        labels = [{"row": row, "label": label} for row, label in labels.items()]
    return open_source(labels, name="labels")


def _weights(weights: Any, data: Any) -> Any:
    """Weights of the rows of `data` as a stage's options hold them: a path, or a row for each of those."""
    if isinstance(weights, str | os.PathLike):
        return weights
    numbers: Any = weights.weights(data) if isinstance(weights, Ranking) else weights
    try:
        if isinstance(numbers, Mapping):  # it would be read by its keys
            raise TypeError
        return open_source([{"weight": float(number)} for number in numbers], name="weights")
    except (TypeError, ValueError) as error:
        shown = cut(repr(weights))
        raise ConfigError(f"weights: must be a path, a Ranking or a number for each row, not {shown}") from error


def _columns(columns: Any) -> str | None:
    """Other column names as an option holds them."""
    if not isinstance(columns, Mapping):
        raise ConfigError(f'columns: must be a mapping such as {{"prompt": "question"}}, not {cut(repr(columns))}')
    for name in columns.values():
        if set(",=") & set(str(name)):
            raise ConfigError(f"columns: the name {name!r} holds a comma or an equals sign; rename that column")
    return ",".join(f"{name}={column}" for name, column in columns.items()) or None


_KINDS: dict[str, type[Any]] = {
    "selector": Selector,
    "defense": GradientStrategy,
    "kind": Attack,
    "method": Repair,
    "task_type": Grader,
    "judge": Judge,
    "second_judge": Judge,
}
"""Arguments that hold methods, and the base class of these."""


def _choice(argument: str, method: Any) -> dict[str, Any]:
    if isinstance(method, _KINDS[argument]):
        return method.choice()  # type: ignore[no-any-return]
    if isinstance(method, str):
        return {"name": method}
    if isinstance(method, Mapping) and isinstance(method.get("name"), str):
        return dict(method)
    kind = _KINDS[argument].__name__
    raise ConfigError(f"{argument}: must be a {kind}, its name, or a mapping with its 'name', not {cut(repr(method))}")
