import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from pharmacist.evaluation.statistics import curve_area, paired_bootstrap, t_interval, wilson


@pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 7), (61, 500), (499, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_two_libraries_and_the_formula(count: int, n: int, confidence: float) -> None:
    low, high = wilson(count, n, confidence)
    assert (low, high) == pytest.approx(
        [100 * end for end in proportion_confint(count, n, 1 - confidence, "wilson")], abs=1e-9
    )
    scipys = stats.binomtest(count, n).proportion_ci(confidence, "wilson")
    assert (low, high) == pytest.approx((100 * scipys.low, 100 * scipys.high), abs=1e-9)
    z, p = stats.norm.ppf((1 + confidence) / 2), count / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((100 * (center - half), 100 * (center + half)), abs=1e-9)


def test_wilson_ends_are_exact_where_nothing_or_everything_happened() -> None:
    assert wilson(0, 100)[0] == 0.0
    assert wilson(100, 100)[1] == 100.0


def test_t_interval_agrees_with_scipy() -> None:
    values = [31.0, 35.5, 28.25, 40.0]
    found = t_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 4), abs=1e-9)


def test_one_seed_has_no_interval() -> None:
    found = t_interval([12.0])
    assert found.value == 12.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_paired_bootstrap_keeps_pairs_together() -> None:
    # The models disagree on 10 of 200 prompts only: unpaired resampling would give an interval many times as wide.
    rng = np.random.default_rng(0)
    a = (rng.random(200) < 0.5).astype(float)
    b = a.copy()
    b[np.flatnonzero(a)[:10]] = 0.0
    found = paired_bootstrap(a, b)
    assert found.value == pytest.approx(0.05)
    assert 0.015 <= found.low < 0.05 < found.high <= 0.085
    again = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, method="percentile", n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(again), abs=0.006)


def test_paired_bootstrap_is_seeded_and_knows_equal_models() -> None:
    a, b = [1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1, 1]
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    same = paired_bootstrap(a, a)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_intervals_cover_the_truth_at_their_nominal_rate() -> None:
    rng, rounds = np.random.default_rng(20), 1000
    # Wilson covers 95 % on average over rates, not at each of them.
    rates = rng.uniform(0.02, 0.98, rounds)
    counts = rng.binomial(120, rates)
    covered = [wilson(int(k), 120)[0] <= 100 * p <= wilson(int(k), 120)[1] for k, p in zip(counts, rates, strict=True)]
    assert 0.935 <= np.mean(covered) <= 0.965
    # The second model breaks on 30 % of the prompts that the first withstands and mends 10 % of the others.
    hits, truth = [], 0.6 * 0.3 - 0.4 * 0.1
    for _ in range(rounds):
        first = rng.random(200) < 0.4
        second = np.where(first, rng.random(200) >= 0.1, rng.random(200) < 0.3)
        found = paired_bootstrap(second, first, resamples=999)
        hits.append(found.low <= truth <= found.high)
    # Percentile intervals are a little short: 94 % was measured at 120 prompts, 95.7 % at 500.
    assert 0.93 <= np.mean(hits) <= 0.965


def test_area_of_uneven_steps_and_its_logarithmic_variant() -> None:
    assert curve_area([0, 4, 8], [10, 10, 10]) == pytest.approx(10)
    assert curve_area([0, 2, 10], [0, 100, 100]) == pytest.approx(90)
    x = np.log1p([0.0, 2.0, 10.0])
    expected = np.trapezoid([0, 100, 100], x) / (x[-1] - x[0])
    assert curve_area([0, 2, 10], [0, 100, 100], log_steps=True) == pytest.approx(expected)
    # Damage done early weighs more when steps are measured in logarithms.
    early = [0, 2, 4, 40], [0, 100, 0, 0]
    assert curve_area(*early, log_steps=True) > 3 * curve_area(*early)
    for steps, values in (([0], [1]), ([0, 0], [1, 1]), ([3, 1], [1, 1]), ([0, 1], [1, 1, 1])):
        with pytest.raises(ValueError, match="ascending"):
            curve_area(steps, values)
