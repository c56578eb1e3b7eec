"""Metrics that need weights and no answers: perplexity drift, loss margin, tasks of lm-eval."""

import importlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, one_line
from pharmacist.core.progress import warn
from pharmacist.data.arrays import FloatArray
from pharmacist.data.tokenize import encode
from pharmacist.evaluation.metrics import METRICS, Metric
from pharmacist.evaluation.statistics import Estimate, ratio_interval, t_interval, wilson, with_interval
from pharmacist.nn.batching import Batch
from pharmacist.nn.models import LoadedModel
from pharmacist.nn.passes import run_pass
from pharmacist.nn.reading import read_row_losses
from pharmacist.nn.tokenizers import tokenizer_fingerprint


def perplexity_drift(rows: Dataset, model: LoadedModel, base: LoadedModel, *, work: Path) -> Metric:
    """Rise of the perplexity of completions (of canonical rows) over the base model's, in percent.

    Both models read the same tokens, those of the first model's template. Perplexity is over all completion tokens
    together, end-of-sequence included, so that rows count by their length. A CompatibilityError where their tokenizers
    differ, so that losses per token cannot be compared.
    """
    if tokenizer_fingerprint(model.tokenizer) != tokenizer_fingerprint(base.tokenizer):
        raise CompatibilityError(f"--base {base.name}: has a different tokenizer than {model.name}; give its own base")
    length = min(model.max_length, base.max_length)
    encoded = encode(
        rows, model.tokenizer, model.template, max_length=length, on_long_prompt="skip", name="--perplexity"
    )
    sums = [_sums(encoded, which, work / name, "--perplexity") for name, which in (("model", model), ("base", base))]
    tokens = (encoded.lengths - encoded.prompt_lengths).astype(np.float64)
    own, before = (float(np.exp(nll.sum() / tokens.sum())) for nll in sums)
    rise = drift(sums[0] - sums[1], tokens)
    return {
        "value": rise.value,
        "n": rise.n,
        **with_interval(rise.interval, rise.missing),
        "perplexity": own,
        "base_perplexity": before,
        "tokens": int(tokens.sum()),
        "truncated": encoded.truncated,
        "interval": "Student's t over rows",
    }


def loss_margin(refusals: Dataset, harmful: Dataset, model: LoadedModel, *, work: Path) -> Metric:
    """Loss of a harmful answer minus that of a refusal of the same prompt, in nats per token, mean over prompts.

    Above 0 the model prefers to refuse. No judge is needed, and the margin changes before any greedy answer does. Both
    sets are canonical rows of the same prompts in the same order.
    """
    per_token = []
    for name, rows in (("harmful", harmful), ("refusal", refusals)):
        encoded = encode(rows, model.tokenizer, model.template, max_length=model.max_length, name="--margin")
        per_token.append(_sums(encoded, model, work / name, "--margin") / (encoded.lengths - encoded.prompt_lengths))
    differences = (per_token[0] - per_token[1]).tolist()
    margin = t_interval(differences)
    how = {"unit": METRICS["loss_margin"].unit, "values": differences, "interval": "Student's t over prompts"}
    return {"value": margin.value, "n": margin.n, **with_interval(margin.interval, margin.missing), **how}


def _sums(encoded: Any, loaded: LoadedModel, work: Path, flag: str) -> FloatArray:
    """Negative log-likelihood of each row's completion, end-of-sequence included, shape [rows]."""

    def measure(batch: Batch) -> dict[str, FloatArray]:
        losses = read_row_losses(loaded.model, batch)
        return {"nll": (losses.double() * (batch.lengths - batch.prompt_lengths)).cpu().numpy()}

    found = run_pass(loaded.model, encoded, measure, work=work, description=flag.removeprefix("--"))["nll"]
    if not np.isfinite(found).all():
        raise DataError(f"{flag}: {loaded.name} gives losses that are not numbers; is the model broken?")
    return found


def drift(difference: FloatArray, tokens: FloatArray) -> Estimate:
    """Rise of perplexity in percent, with the interval of the mean log-likelihood per token, so never below -100.

    Of each row the difference is its sum of negative log-likelihoods, model minus base.
    """
    found = ratio_interval(difference, tokens)
    value, low, high = (float(100 * np.expm1(end)) for end in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.n, found.missing)


def check_lm_eval(tasks: str) -> None:
    """Checks the names of tasks, with commas between them, and that the harness is installed and knows them.

    Raises:
        PharmacistError: It does not.
    """
    names = _names(tasks)
    if not all(names):
        raise ConfigError(f"--lm-eval {tasks}: give names with commas between them, such as mmlu,arc_easy")
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise CompatibilityError("--lm-eval: lm-eval is not installed; pip install 'pharmacist[lm-eval]'") from error
    known = importlib.import_module("lm_eval.tasks").TaskManager().match_tasks(names)
    for name in names:
        if name not in known and not os.path.exists(name):  # a task may also be a file
            raise ConfigError(f"--lm-eval {name}: lm-eval has no task of this name; see its own list of tasks")


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",")]


def lm_eval(tasks: str, loaded: LoadedModel, *, batch_size: int, seed: int) -> dict[str, Metric]:
    """Runs tasks of lm-eval's harness on a loaded model; figures and standard errors are those of the harness.

    A DataError where the harness cannot run a task, or get its data.
    """
    harness, models = (importlib.import_module(name) for name in ("lm_eval", "lm_eval.models.huggingface"))
    model = models.HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size or 8)
    try:
        seeds = {f"{kind}random_seed": seed % 2**32 for kind in ("", "numpy_", "torch_", "fewshot_")}  # NumPy's range
        found = harness.simple_evaluate(model=model, tasks=_names(tasks), log_samples=False, **seeds)
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"--lm-eval {tasks}: lm-eval cannot run them ({one_line(error)})") from error
    judge = f"lm-eval@{getattr(harness, '__version__', 'unknown')}"
    metrics = {f"lm_eval_{name}": _harness_metric(found, name, judge) for name in found["results"]}
    return {name: metric for name, metric in metrics.items() if metric["all"]}  # a mere group of tasks has no scores


def _harness_metric(found: dict[str, Any], name: str, judge: str) -> Metric:
    known = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    scores = {key: value for key, value in known.items() if math.isfinite(value)}  # a broken model's perplexity is not
    named = [(key.partition(",")[0], key) for key in scores]
    wanted = ("acc", "exact_match", *(measure for measure, _ in named if measure.endswith("_acc")))
    key = next((key for one in wanted for measure, key in named if measure == one), None)
    n = (found.get("n-samples", {}).get(name) or {}).get("effective")
    if key is None:
        if scores:
            reported = ", ".join(measure for measure, _ in named if not measure.endswith("_stderr"))
            warn(f"--lm-eval {name}: reports no accuracy but {reported}, which is in metrics.json only")
        none = {"value": None, "n": n, **with_interval(None, "no accuracy")}
        return none | {"judge": judge, "all": scores}
    metric, _, filtered = key.partition(",")
    error, rate = scores.get(f"{metric}_stderr,{filtered}"), scores[key]
    # The number of independent rows that gives the harness's standard error, which accounts for groups of tasks; at 0
    # and 1, where that error is 0, all rows. A task that reports neither gets no interval.
    rows = rate * (1 - rate) / error**2 if error and error > 0 else n if error == 0 else None
    ends = list(wilson(rate * rows, rows)) if rows else None
    return {
        "value": 100 * rate,
        "n": n,
        **with_interval(ends, "the harness reports no error"),
        "measure": key,
        "judge": judge,
        "all": scores,
    }
