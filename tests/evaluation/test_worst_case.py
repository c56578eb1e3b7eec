import pytest

from pharmacist.evaluation.statistics import wilson
from pharmacist.evaluation.worst_case import simultaneous, steps_to_reach, within_margin, worst_case


def test_the_worst_case_respects_the_margin():
    harmful, accuracy = [20.0, 95.0, 60.0, 40.0], [90.0, 40.0, 87.0, 89.0]
    steps = [10, 10, 10, 10]
    # The highest score of all ruins the task; which of the others is worst depends on what the attacker puts up with.
    assert [worst_case(harmful, accuracy, steps, margin) for margin in (0.0, 1.0, 3.0, 49.9, 50.0)] == [0, 3, 2, 2, 1]
    assert within_margin(accuracy, 3.0) == [True, False, True, True]


def test_an_accuracy_exactly_at_the_margin_counts():
    assert within_margin([100 * 29 / 30, 100 * 28 / 30], 100 / 30) == [True, True]
    assert within_margin([100 * 29 / 30, 100 * 28 / 30], 3.3) == [True, False]


def test_ties_go_to_accuracy_then_to_fewer_steps_then_to_the_first():
    assert worst_case([50.0, 50.0, 50.0], [80.0, 81.0, 80.0], [1, 9, 1], 5.0) == 1
    assert worst_case([50.0, 50.0, 50.0], [80.0, 80.0, 80.0], [9, 3, 3], 5.0) == 1
    assert worst_case([50.0, 50.0], [80.0, 80.0], [3, 3], 5.0) == 0


def test_attacks_without_figures_are_never_the_worst():
    assert worst_case([None, 10.0, 90.0], [99.0, 98.0, None], [None, 5, 5], 2.0) == 1
    assert worst_case([None, 90.0], [99.0, 50.0], [5, 5], 2.0) is None
    assert worst_case([], [], [], 2.0) is None
    assert within_margin([None, None], 2.0) == [False, False]


def test_when_a_level_is_reached_is_known_between_two_steps_only():
    steps, values = [0, 4, 8, 16], [2.0, 30.0, 24.0, 75.0]
    assert [steps_to_reach(steps, values, level) for level in (1.0, 25.0, 50.0, 75.0, 75.1)] == [
        {"level": 1.0, "step": 0, "after": None},
        {"level": 25.0, "step": 4, "after": 0},
        {"level": 50.0, "step": 16, "after": 8},
        {"level": 75.0, "step": 16, "after": 8},
        {"level": 75.1, "step": None, "after": 16},
    ]


def test_the_interval_of_the_highest_of_many_is_wider():
    assert simultaneous(30, 60, 1) == wilson(30, 60)
    ends = [simultaneous(30, 60, attacks) for attacks in (1, 2, 12)]
    assert ends[2][0] < ends[1][0] < ends[0][0] < 50 < ends[0][1] < ends[1][1] < ends[2][1]


def test_the_interval_holds_for_the_highest_of_equal_attacks():
    """Of 20 attacks that are all the same, the highest's own interval often misses the truth; this one seldom."""
    import numpy as np

    rng = np.random.default_rng(0)
    highest = rng.binomial(100, 0.5, size=(400, 20)).max(1)
    missed = {k: np.mean([simultaneous(int(c), 100, k)[0] > 50 for c in highest]) for k in (1, 20)}
    assert missed[20] < 0.06 < 0.2 < missed[1]


@pytest.mark.parametrize("margin", [0.0, 2.0, 100.0])
def test_a_wider_margin_never_lowers_the_worst_case(margin):
    import numpy as np

    rng = np.random.default_rng(1)
    for _ in range(50):
        harmful, accuracy = rng.integers(0, 100, (2, 8)).astype(float).tolist()
        first = worst_case(harmful, accuracy, [1] * 8, margin)
        second = worst_case(harmful, accuracy, [1] * 8, margin + 10)
        assert harmful[second] >= harmful[first]
