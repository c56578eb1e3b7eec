"""Intervals and comparisons: Wilson for rates, Newcombe for paired differences of rates, Student's t over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


RATE, RATE_DIFFERENCE = (0.0, 100.0), (-100.0, 100.0)
"""Bounds of rates and of their differences, in percent."""


def wilson(count: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate, in percent (Wilson 1927).

    Args:
        count: Successes, 0 to `n`; a sum of scores in [0, 1] gives an interval that is too wide rather than too short.
        n: Trials, above 0; may be a fraction if they are worth that many independent ones.
        confidence: Coverage.
    """
    low, high = proportion_confint(count, n, alpha=1 - confidence, method="wilson")
    # Exact ends instead of rounding errors like 3e-16.
    return (100 * float(low) if count else 0.0), (100 * float(high) if count < n else 100.0)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The number; NaN without observations.
        low: Lower end of the interval; NaN if there is none.
        high: Upper end, likewise.
        n: Number of observations.
        missing: Why there is no interval, in a few words; empty if there is one.
    """

    value: float
    low: float
    high: float
    n: int
    missing: str = ""

    @property
    def interval(self) -> list[float] | None:
        """Both ends, as in ``ci95``; None if there is no interval."""
        return None if self.missing else [self.low, self.high]


def with_interval(ends: list[float] | None, missing: str) -> dict[str, Any]:
    """``ci95`` of a metric in a JSON file, and ``no_ci95`` with the reason if there is no interval."""
    return {"ci95": ends} if ends is not None else {"ci95": None, "no_ci95": missing}


def t_interval(values: Sequence[float], bounds: tuple[float, float] = (-inf, inf)) -> Estimate:
    """Mean with Student's t interval, cut at the bounds of the mean, such as `RATE`.

    A single value has no interval, and neither have values that are all the same: they say nothing of the spread.
    """
    data = np.asarray(values, dtype=np.float64)
    mean, n = float(data.mean()), len(data)
    if n < 2:
        return Estimate(mean, nan, nan, n, "one value")
    if float(np.ptp(data)) <= 1e-9 * max(1.0, abs(mean)):  # up to rounding
        return Estimate(mean, nan, nan, n, f"all {n} values are the same")
    half = float(stats.t.ppf(0.975, n - 1) * data.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), n)


def ratio_interval(numerators: npt.NDArray[np.float64], denominators: npt.NDArray[np.float64]) -> Estimate:
    """Ratio of two sums over the same rows, with Student's t interval of its linear part (the ratio estimator)."""
    value, n = float(numerators.sum() / denominators.sum()), len(numerators)
    around = t_interval(((numerators - value * denominators) / denominators.mean()).tolist())
    return Estimate(value, value + around.low, value + around.high, n, around.missing)


def four_counts(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, int, int]:
    """Number of pairs that are true in both entries, in the first only, in the second only, and in neither."""
    both, only_first, only_second = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
    return both, only_first, only_second, len(pairs) - both - only_first - only_second


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> Estimate:
    """Difference of two rates over the same prompts (at least one), first minus second, in percentage points.

    The interval is Newcombe's from Wilson's intervals of the two rates and their correlation (Newcombe 1998, method
    10). It lies within [-100, 100] and has a width also if the two agree on every prompt or on none.
    """
    both, only_first, only_second, neither = four_counts(pairs)
    n, first, second = len(pairs), both + only_first, both + only_second
    margins = first * (n - first) * second * (n - second)
    excess = both * neither - only_first * only_second
    # With Newcombe's correction, which sets a weak positive correlation to 0.
    correlation = (max(excess - n / 2, 0) if excess > 0 else excess) / sqrt(margins) if margins else 0.0
    value = 100 * (first - second) / n
    (low_1, high_1), (low_2, high_2) = wilson(first, n), wilson(second, n)

    def half(own: float, other: float) -> float:
        return sqrt(max(own**2 - 2 * correlation * own * other + other**2, 0.0))

    rate_1, rate_2 = 100 * first / n, 100 * second / n
    low = value - half(rate_1 - low_1, high_2 - rate_2)
    high = value + half(high_1 - rate_1, rate_2 - low_2)
    return Estimate(value, max(low, RATE_DIFFERENCE[0]), min(high, RATE_DIFFERENCE[1]), n)


def curve_area(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a curve over training steps: its area divided by the span of the steps.

    Trapezoids between the points (ascending, at least two), so that unevenly spaced checkpoints count by their span.

    >>> curve_area([0, 10, 40], [0.0, 20.0, 20.0])
    17.5
    """
    x = np.asarray(steps, dtype=np.float64)
    if len(x) < 2 or len(x) != len(values) or not (np.diff(x) > 0).all():
        raise ValueError("curve_area needs at least two ascending steps, and as many values")
    return float(np.trapezoid(np.asarray(values, dtype=np.float64), x) / (x[-1] - x[0]))
