"""The metrics of a benchmark, and figures: numbers with their intervals, and how they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from pharmacist.evaluation.metrics import METRICS
from pharmacist.evaluation.statistics import RATE, t_interval


_SECONDS, _ANY = (0.0, inf), (-inf, inf)


@dataclass(frozen=True)
class ShownMetric:
    """A measured quantity, a column of ``results.parquet``."""

    name: str
    title: str
    unit: str
    better: int
    """1 where higher is better, -1 where lower is."""
    bounds: tuple[float, float] = RATE
    """Least and greatest possible value."""
    digits: int = 1
    """After the decimal point, in tables."""
    compared: bool = True
    """Whether differences to a baseline are tested; not those of rankings, which the full pool does not have."""
    judged: bool = False
    """Whether its value depends on the judge."""
    judge: str | None = None
    """The judge whose verdicts it counts, where a benchmark has several judges."""

    @property
    def key(self) -> str:
        """Name, and judge where there is one."""
        return self.name if self.judge is None else f"{self.name} by {self.judge}"

    @property
    def head(self) -> str:
        """Title, judge and unit."""
        return f"{self.title}, {self.unit}" if self.judge is None else f"{self.title} by {self.judge}, {self.unit}"

    def mean(self, values: Sequence[float], *, difference: bool = False) -> "Figure":
        """Mean over seeds of the metric, or of its paired differences, with an interval within the possible range."""
        low, high = self.bounds
        found = t_interval(values, bounds=(low - high, high - low) if difference else (low, high))
        return Figure(found.value, *(found.interval or ()))


_TITLES = {name: kind.title.capitalize() for name, kind in METRICS.items()}
SHOWN_METRICS = {
    metric.name: metric
    for metric in (
        ShownMetric("harmful_score", _TITLES["harmful_score"], "%", -1, judged=True),
        ShownMetric("harmful_score_second", _TITLES["harmful_score_second"], "%", -1, judged=True),
        ShownMetric("harmful_score_over_attack", f"{_TITLES['harmful_score']} over the attack", "%", -1, judged=True),
        ShownMetric("loss_margin", _TITLES["loss_margin"], "nats", 1, _ANY, digits=3),
        ShownMetric("loss_margin_over_attack", f"{_TITLES['loss_margin']} over the attack", "nats", 1, _ANY, digits=3),
        ShownMetric("fine_tune_accuracy", _TITLES["fine_tune_accuracy"], "%", 1),
        ShownMetric("win_rate", _TITLES["win_rate"], "%", 1),
        ShownMetric("over_refusal", _TITLES["over_refusal"], "%", -1, judged=True),
        ShownMetric("perplexity_drift", _TITLES["perplexity_drift"], "%", -1, (-100.0, inf)),
        ShownMetric("ranking_auc", "AUC of the ranking", "%", 1, compared=False),
        ShownMetric("selected_good", "Rows worth keeping among the selected", "%", 1, compared=False),
        ShownMetric("alignment_seconds", "Alignment time", "s", -1, _SECONDS),
        ShownMetric("selection_seconds", "Selection time", "s", -1, _SECONDS, compared=False),
    )
}
"""Metrics that tables and pages show, as far as they were measured, in their order."""


@dataclass(frozen=True)
class Figure:
    """A mean over seeds or a rate over prompts, with the ends of its 95 % interval where there is one."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> "Figure | None":
        """From a JSON object with ``mean`` or ``value`` and ``ci95``; None where it has no value."""
        found = found or {}
        value = found.get("mean", found.get("value"))
        return None if value is None else cls(value, *(found["ci95"] or ()))

    def text(self, unit: str = "", *, digits: int = 1, sign: str = "", ends: str = "[{}, {}]") -> str:
        """The number with its unit and interval; with the `sign` "+" positive numbers have a plus; no minus zero."""
        mean = f"{self.mean:{sign}z.{digits}f}{unit}"
        return f"{mean} {self.interval(digits=digits, ends=ends)}".rstrip()

    def interval(self, *, digits: int = 1, ends: str = "[{}, {}]") -> str:
        """The interval alone; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return ends.format(*(f"{end:z.{digits}f}" for end in (self.low, self.high)))


def rate_text(found: Mapping[str, Any] | None) -> str:
    """The text of `Figure.of` a JSON object; a hyphen where it has no value."""
    figure = Figure.of(found)
    return "-" if figure is None else figure.text()
