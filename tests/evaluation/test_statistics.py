import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from pharmacist.evaluation.statistics import (
    RATE,
    RATE_DIFFERENCE,
    curve_area,
    paired_difference,
    ratio_interval,
    t_interval,
    wilson,
)


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


def test_seeds_that_all_agree_have_no_interval() -> None:
    # 0.1 + 0.2 is not 0.3: what is the same but for rounding is the same.
    for values in ([0.0, 0.0, 0.0], [62.5, 62.5], [0.3, 0.1 + 0.2]):
        found = t_interval(values)
        assert found.interval is None and "the same" in found.missing and math.isnan(found.low)
    assert t_interval([0.0, 0.1]).interval is not None


def test_a_mean_of_rates_has_no_impossible_interval() -> None:
    free, cut = t_interval([0.0, 0.0, 4.0]), t_interval([0.0, 0.0, 4.0], bounds=RATE)
    assert free.low < 0 and (cut.low, cut.high) == (0.0, free.high)
    assert t_interval([100.0, 99.0, 100.0], bounds=RATE).high == 100.0
    assert t_interval([-100.0, -20.0], bounds=RATE_DIFFERENCE).interval == [-100.0, 100.0]


def table(both: int, only_first: int, only_second: int, neither: int) -> list[tuple[bool, bool]]:
    return (
        [(True, True)] * both
        + [(True, False)] * only_first
        + [(False, True)] * only_second
        + [(False, False)] * neither
    )


def test_paired_differences_agree_with_newcombes_paper() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 2635), table III, method 10.
    for counts, low, high in (
        ((36, 12, 2, 0), 5.69, 34.04),
        ((0, 0, 0, 30), -11.35, 11.35),
        ((0, 30, 0, 0), 83.95, 100.0),
    ):
        found = paired_difference(table(*counts))
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_models_that_agree_on_all_prompts_may_still_differ() -> None:
    nothing = paired_difference(table(0, 0, 0, 50))
    assert nothing.value == 0 and (nothing.low, nothing.high) == pytest.approx((-7.13, 7.13), abs=0.01)
    everything = paired_difference(table(0, 3, 0, 0))
    assert everything.value == 100 and 0 < everything.low < 50 and everything.high == 100


def test_every_small_table_has_an_interval_within_what_is_possible() -> None:
    for counts in itertools.product(range(5), repeat=4):
        if not sum(counts):
            continue
        found, turned = paired_difference(table(*counts)), paired_difference([(b, a) for a, b in table(*counts)])
        assert -100 <= found.low <= found.value <= found.high <= 100 and found.high - found.low > 1
        assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_intervals_cover_the_truth_at_their_nominal_rate() -> None:
    rng, rounds = np.random.default_rng(20), 1000
    # Wilson covers 95 % on average over rates, not at each of them.
    rates = rng.uniform(0.02, 0.98, rounds)
    counts = rng.binomial(120, rates)
    covered = [wilson(int(k), 120)[0] <= 100 * p <= wilson(int(k), 120)[1] for k, p in zip(counts, rates, strict=True)]
    assert 0.935 <= np.mean(covered) <= 0.965


@pytest.mark.parametrize(
    ("n", "shares"),
    [
        (50, (0.10, 0.02, 0.00, 0.88)),  # a difference of 2 points at 50 prompts
        (50, (0.30, 0.03, 0.01, 0.66)),
        (50, (0.30, 0.20, 0.10, 0.40)),
        (50, (0.00, 0.50, 0.00, 0.50)),
        (10, (0.30, 0.20, 0.10, 0.40)),
        (200, (0.36, 0.04, 0.18, 0.42)),
    ],
)
def test_paired_intervals_cover_the_truth(n: int, shares: tuple[float, ...]) -> None:
    truth, hits, rounds = 100 * (shares[1] - shares[2]), 0, 4000
    found, times = np.unique(np.random.default_rng(3).multinomial(n, shares, rounds), axis=0, return_counts=True)
    for counts, often in zip(found.tolist(), times.tolist(), strict=True):
        own = paired_difference(table(*counts))
        hits += often * (own.low <= truth + 1e-9 and truth - 1e-9 <= own.high)
    assert hits / rounds >= 0.94  # of 95 %, less what 4000 rounds blur (three standard errors are 1 %)


def test_ratios_are_covered_also_with_few_rows() -> None:
    rng, hits, rounds = np.random.default_rng(7), 0, 2000
    for _ in range(rounds):
        tokens = rng.integers(5, 60, 12).astype(float)
        found = ratio_interval(tokens * rng.normal(0.1, 0.3, 12), tokens)
        hits += found.low <= 0.1 <= found.high
    assert 0.925 <= hits / rounds <= 0.965
    assert ratio_interval(np.array([1.0]), np.array([2.0])).interval is None


def test_area_of_uneven_steps_and_its_logarithmic_variant() -> None:
    assert curve_area([0, 4, 8], [10, 10, 10]) == pytest.approx(10)
    assert curve_area([0, 2, 10], [0, 100, 100]) == pytest.approx(90)
    for steps, values in (([0], [1]), ([0, 0], [1, 1]), ([3, 1], [1, 1]), ([0, 1], [1, 1, 1])):
        with pytest.raises(ValueError, match="ascending"):
            curve_area(steps, values)
