"""Figures as people read them: one list of metrics with their names, one way to write a number with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from pharmacist.evaluation.statistics import RATE, RATE_DIFFERENCE, Estimate, t_interval


@dataclass(frozen=True)
class Metric:
    """A measured quantity, a column of results."""

    name: str
    title: str
    unit: str
    better: int
    """1 where higher is better, -1 where lower is."""
    compared: bool = True
    """Whether differences are tested. Ranking is work that the full dataset does not need at all."""

    @property
    def head(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}"

    def estimate(self, values: Sequence[float], *, difference: bool = False) -> Estimate:
        """Mean over seeds of the metric, or of its paired differences, with an interval within what is possible."""
        bounds = (RATE_DIFFERENCE if difference else RATE) if self.unit == "%" else (-inf if difference else 0.0, inf)
        return t_interval(values, bounds=bounds)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("harmful_score", "Harmful score", "%", -1),
        Metric("harmful_score_over_attack", "Harmful score over the attack", "%", -1),
        Metric("fine_tune_accuracy", "Fine-tune accuracy", "%", 1),
        Metric("over_refusal", "Over-refusal", "%", -1),
        Metric("ranking_auc", "AUC of the ranking", "%", 1, compared=False),
        Metric("selected_good", "Rows worth keeping among the selected", "%", 1, compared=False),
        Metric("alignment_seconds", "Alignment time", "s", -1),
        Metric("selection_seconds", "Selection time", "s", -1, compared=False),
    )
}
"""What tables and pages show, as far as it was measured."""


@dataclass(frozen=True)
class Figure:
    """A number, a mean over seeds or a rate over prompts, and the ends of its 95 % interval where it has one."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, found: Estimate | Mapping[str, Any] | None) -> "Figure | None":
        """An estimate, or a figure of a JSON file with ``mean`` or ``value`` and ``ci95``; None without a value."""
        if not isinstance(found, Mapping):
            return None if found is None else cls(found.value, *(found.interval or ()))
        value = found.get("mean", found.get("value"))
        return None if value is None else cls(value, *(found["ci95"] or ()))

    def text(self, unit: str = "", *, sign: str = "", ends: str = "[{}, {}]") -> str:
        """The number with one digit and its unit, and its interval where it has one; `sign` "+" writes a plus too."""
        mean = f"{self.mean:{sign}.1f}{unit}"
        if self.low is None or self.high is None:
            return mean
        return f"{mean} {ends.format(f'{self.low:.1f}', f'{self.high:.1f}')}"
