"""General ability: how far a model drifted from its base on ordinary text, and lm-eval's own tasks."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from scipy import stats

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.core.seeding import derive
from pharmacist.data.tokenize import encode
from pharmacist.evaluation.metrics import Metric
from pharmacist.nn.batching import Batch
from pharmacist.nn.losses import row_losses
from pharmacist.nn.models import LoadedModel, tokenizer_fingerprint
from pharmacist.nn.passes import run_pass


FloatArray = npt.NDArray[np.float64]


def perplexity_drift(
    rows: Dataset, model: LoadedModel, base: LoadedModel, *, work: Path, seed: int = 0
) -> Metric:  # fmt: skip
    """How much the perplexity of completions rose over the base's, in percent.

    Both models read the very same tokens: those of the first one's template. Perplexity is over all completion tokens
    together, end-of-sequence included, so that long rows weigh what they are.

    Args:
        rows: Canonical rows.
        model: The one in question.
        base: What it is compared with.
        work: Folder for finished parts.
        seed: Of the bootstrap over rows.

    Raises:
        CompatibilityError: Their tokenizers differ, so that per-token figures could not be compared.
    """
    if tokenizer_fingerprint(model.tokenizer) != tokenizer_fingerprint(base.tokenizer):
        raise CompatibilityError(f"--base {base.name}: has another tokenizer than {model.name}; give its own base")
    length = min(model.max_length, base.max_length)
    encoded = encode(rows, model.tokenizer, model.template, max_length=length, on_long_prompt="skip")
    sums = [
        _sums(encoded, which, work / name) for name, which in (("model", model), ("base", base))
    ]  # fmt: skip
    tokens = (encoded.lengths - encoded.prompt_lengths).astype(np.float64)
    own, before = (float(np.exp(nll.sum() / tokens.sum())) for nll in sums)
    value, low, high = drift(sums[0] - sums[1], tokens, seed)
    return {
        "value": value, "n": len(tokens), "ci95": None if low is None else [low, high], "perplexity": own,
        "base_perplexity": before, "tokens": int(tokens.sum()), "truncated": encoded.truncated,
        "judge": "bootstrap over rows",
    }  # fmt: skip


def _sums(encoded: Any, loaded: LoadedModel, work: Path) -> FloatArray:
    def measure(batch: Batch) -> dict[str, FloatArray]:
        logits = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        losses = row_losses(logits, batch.input_ids, batch.lengths, batch.prompt_lengths)
        return {"nll": (losses.completion.double() * losses.n_completion).cpu().numpy()}

    vocabulary = int(getattr(loaded.model.config, "vocab_size", 32768))
    budget = max(1024, min(65536, 2 ** (25 if loaded.device.type == "cpu" else 30) // vocabulary))
    found = run_pass(
        encoded, measure, work=work, device=loaded.device, tokens_per_batch=budget, description="perplexity"
    )["nll"]
    if not np.isfinite(found).all():
        raise DataError(f"--perplexity: {loaded.name} gives losses that are no numbers; is the model broken?")
    return found


def drift(
    difference: FloatArray, tokens: FloatArray, seed: int = 0, resamples: int = 2000
) -> tuple[float, float | None, float | None]:  # fmt: skip
    """Rise in percent of a ratio of perplexities, with a percentile bootstrap over rows.

    Args:
        difference: Sum of negative log-likelihoods per row, model less base, shape [rows].
        tokens: Tokens per row, shape [rows].
        seed: Of the resampling.
        resamples: Bootstrap samples.
    """

    def statistic(d: FloatArray, t: FloatArray, axis: int = -1) -> FloatArray:
        rise: FloatArray = 100 * np.expm1(d.sum(axis) / t.sum(axis))
        return rise

    value = float(statistic(difference, tokens))
    if len(tokens) < 2:
        return value, None, None
    if not difference.any():
        return value, value, value
    interval = stats.bootstrap(
        (difference, tokens), statistic, paired=True, vectorized=True, method="percentile", n_resamples=resamples,
        rng=np.random.default_rng(derive(seed, "perplexity")), batch=max(1, 2_000_000 // len(tokens)),
    ).confidence_interval  # fmt: skip
    return value, float(interval.low), float(interval.high)


def check_lm_eval(tasks: str) -> list[str]:
    """The names of the tasks; refuses at once where the harness is missing.

    Raises:
        CompatibilityError: lm-eval is not installed.
    """
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise ConfigError(f"--lm-eval {tasks}: give names with commas between them, such as mmlu,arc_easy")
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise CompatibilityError(
            "--lm-eval: the harness is not installed; pip install 'pharmacist[lm-eval]'"
        ) from error
    return names


def lm_eval(names: list[str], loaded: LoadedModel, *, batch_size: int, seed: int) -> dict[str, Metric]:
    """Runs tasks of lm-eval's harness on a loaded model; figures and standard errors are the harness's own.

    Raises:
        DataError: The harness knows no such task, or cannot get its data.
    """
    harness, models = (importlib.import_module(name) for name in ("lm_eval", "lm_eval.models.huggingface"))
    model = models.HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size or 8)
    try:
        found = harness.simple_evaluate(
            model=model, tasks=names, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False,
        )  # fmt: skip
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"--lm-eval {','.join(names)}: the harness cannot run them ({reason})") from error
    version = getattr(harness, "__version__", "unknown")
    return {f"lm_eval_{name}": _harness_metric(found, name, str(version)) for name in found["results"]}


def _harness_metric(found: dict[str, Any], name: str, version: str) -> Metric:
    scores = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    for wanted in ("acc", "exact_match"):
        key = next((key for key in scores if key.split(",")[0] == wanted), None)
        if key is not None:
            break
    else:
        raise DataError(f"--lm-eval {name}: reports neither acc nor exact_match, but {', '.join(scores)}")
    metric, _, filtered = key.partition(",")
    error = scores.get(f"{metric}_stderr,{filtered}")
    value = 100 * scores[key]
    low_high = None if error is None else [value - 196 * error, value + 196 * error]
    return {
        "value": value, "n": (found.get("n-samples", {}).get(name) or {}).get("effective"), "ci95": low_high,
        "measure": key, "judge": f"lm-eval@{version}", "all": scores,
    }  # fmt: skip
