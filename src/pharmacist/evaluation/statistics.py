"""Intervals and comparisons: Wilson for rates, Student's t over seeds, paired bootstrap over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from pharmacist.core.seeding import derive


def wilson(count: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate, in percent (Wilson 1927).

    Args:
        count: Successes, 0 to `n`; a sum of scores in [0, 1] gives an interval that is too wide rather than too short.
        n: Trials, at least 1.
        confidence: Coverage.
    """
    low, high = proportion_confint(count, n, alpha=1 - confidence, method="wilson")
    # Exact ends instead of rounding errors such as 3e-16.
    return (100 * float(low) if count else 0.0), (100 * float(high) if count < n else 100.0)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        n: Observations behind it.
    """

    value: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over seeds with Student's t interval; the ends of a single value are NaN, for nothing is known of them."""
    data = np.asarray(values, dtype=np.float64)
    mean, n = float(data.mean()), len(data)
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * data.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired_bootstrap(
    a: Sequence[float] | npt.NDArray[np.float64],
    b: Sequence[float] | npt.NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Mean of ``a - b`` over the same prompts, with a percentile bootstrap interval that keeps pairs together.

    Args:
        a: Outcome of one model per prompt (0 or 1 for a verdict).
        b: Outcome of the other model on the same prompts, in the same order.
        confidence: Coverage.
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    value, n = float(difference.mean()), len(difference)
    if n < 2 or (difference == difference[0]).all():  # nothing to resample
        return Estimate(value, value, value, n) if n > 1 else Estimate(value, float("nan"), float("nan"), n)
    interval = stats.bootstrap(
        (difference,), np.mean, confidence_level=confidence, n_resamples=resamples, method="percentile",
        vectorized=True, batch=max(1, 2_000_000 // n), rng=np.random.default_rng(derive(seed, "paired bootstrap")),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(interval.low), float(interval.high), n)


def curve_area(steps: Sequence[float], values: Sequence[float], *, log_steps: bool = False) -> float:
    """Area under a curve over training steps, divided by the steps' span: its mean height, in the values' unit.

    Trapezoids between the points, so that unevenly spaced checkpoints weigh what they span.

    Args:
        steps: Ascending, at least two.
        values: Height at each step, such as the harmful score in percent.
        log_steps: Measure steps as ``log(1 + step)``, which weighs the first steps of an attack more.

    >>> curve_area([0, 10, 40], [0.0, 20.0, 20.0])
    17.5
    """
    x = np.asarray(steps, dtype=np.float64)
    if len(x) < 2 or len(x) != len(values) or not (np.diff(x) > 0).all():
        raise ValueError("curve_area needs at least two ascending steps, and as many values")
    if log_steps:
        x = np.log1p(x)
    return float(np.trapezoid(np.asarray(values, dtype=np.float64), x) / (x[-1] - x[0]))
