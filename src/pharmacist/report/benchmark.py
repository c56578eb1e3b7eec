"""Numbers of a benchmark: means over seeds, and paired differences against a baseline, tested against chance.

A series is a selector with its fraction; a setting is a choice on every axis but these, the defense and the judge. Two
runs are a pair where they differ in the series alone: same setting, same defense, same judge, same seed. Judges are
never averaged: a metric that depends on the judge is another metric under each of several.
"""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pharmacist.core.console import markdown, plain
from pharmacist.core.errors import DataError
from pharmacist.report.cautions import cautions
from pharmacist.report.numbers import SHOWN_METRICS, Figure, ShownMetric


_SERIES = ("selector", "fraction")
BASELINE = "full"
"""Selector that the others are compared with by default: the full pool."""
SETTING = ("model", "pool", "attack", "post_alignment_defense", "task")
"""Axes of a setting."""
_CELL = (*SETTING, "defense", *_SERIES)
AXES = (*SETTING, "judge", "defense", *_SERIES)
"""Axes of the table of results."""
LEVEL = 0.05
"""Greatest chance of one or more false differences among all comparisons of a metric."""


@dataclass(frozen=True)
class Value(Figure):
    """A mean over seeds and its difference to the baseline; one seed, or seeds that agree, give no interval."""

    seeds: int = 1
    difference: Figure | None = None
    """Mean of the paired differences, in the metric's unit, with its 95 % interval, not corrected."""
    baseline: float | None = None
    """Mean of the baseline over the seeds of the difference."""
    p: float | None = None
    """p of the paired t test; None where there is no spread to test against (one pair, or all the same)."""
    p_corrected: float | None = None
    """The same after Holm's correction over all comparisons of the metric."""
    verdict: int | None = None
    """1 for a significant difference for the better, -1 for the worse, 0 for none; None where nothing is compared."""


@dataclass(frozen=True)
class Line:
    """A cell of the grid over all its seeds and judges."""

    axes: Mapping[str, Any]
    """Its choice by axis."""
    values: Mapping[str, Value]
    """Key of a metric -> value."""
    runs: pd.DataFrame = field(compare=False)
    """Its rows of the results."""

    @property
    def setting(self) -> tuple[Any, ...]:
        """Its choice on the axes of `SETTING`."""
        return tuple(self.axes[axis] for axis in SETTING)

    def figure(self, metric: ShownMetric, difference: bool) -> Figure | None:
        """The mean of a metric, or its difference to the baseline, where it was measured."""
        value = self.values.get(metric.key)
        return value.difference if difference and value is not None else value

    @property
    def series(self) -> tuple[str, float]:
        """Its selector and fraction."""
        return self.axes["selector"], self.axes["fraction"]


class Benchmark:
    """All lines of a benchmark.

    Args:
        results: Content of ``results.parquet``, with all axes.
        order: Names on each axis in the order of the grid; names that it lacks follow, the full pool first.
        baseline: Selector that the others are compared with, at the same fraction where it has several.

    Raises:
        DataError: There is no row, or two rows are of one cell and seed.
    """

    def __init__(
        self, results: pd.DataFrame, order: Mapping[str, Sequence[Any]] | None = None, baseline: str = BASELINE
    ) -> None:
        if not len(results):
            raise DataError("results.parquet: no cell is finished yet; run the benchmark again to go on with it")
        if (twice := results.duplicated([*AXES, "seed"])).any():
            cell = " / ".join(str(results[twice].iloc[0][axis]) for axis in (*AXES, "seed"))
            raise DataError(f"results.parquet: two rows for {cell}; run the benchmark again")
        results = results.reset_index(drop=True)
        self.baseline, self.baseline_title = baseline, "the full pool" if baseline == BASELINE else baseline
        self.order = {axis: _names(results[axis], (order or {}).get(axis, ())) for axis in AXES}
        positions = [results[axis].map({name: at for at, name in enumerate(self.order[axis])}) for axis in AXES]
        self.results = results.iloc[np.lexsort([results["seed"], *reversed(positions)])]
        self.groups = _groups(results, self.order["judge"])
        """Metrics under a common title: those by each of several judges, and those that need none."""
        self.metrics = [metric for metrics in self.groups.values() for metric in metrics]
        self.has_baseline = baseline in self.order["selector"]
        self.several = [axis for axis in (*SETTING, "defense") if len(self.order[axis]) > 1]
        """Axes besides the series with more than one value; the others need not be shown."""
        self.seeds = sorted(int(seed) for seed in results["seed"].unique())
        self.lines = list(self._lines())
        found = {line.series for line in self.lines}
        self.series = [it for it in itertools.product(*(self.order[axis] for axis in _SERIES)) if it in found]
        """Selectors with their fractions."""
        self.settings = list(dict.fromkeys(line.setting for line in self.lines))
        """Choices on the axes of `SETTING` that occur."""
        values = ((metric.name, line.values.get(metric.key)) for line in self.lines for metric in self.metrics)
        tested = [name for name, value in values if value is not None and value.p is not None]
        self.comparisons = {metric.name: tested.count(metric.name) for metric in self.metrics}
        """Name of a metric -> how many differences were tested, by all judges: the family of Holm's correction."""

    def columns(self, metrics: Iterable[ShownMetric]) -> list[tuple[ShownMetric, bool]]:
        """Columns of a table: each metric, and where it is compared, its difference to the baseline."""
        return [
            (metric, difference)
            for metric in metrics
            for difference in ((False, True) if metric.compared and self.has_baseline else (False,))
        ]

    @cached_property
    def over_defenses(self) -> "Benchmark | None":
        """The benchmark of the means of runs over all defenses; None with one defense.

        Runs that some defense lacks are left out, so that all defenses have the same weight everywhere.
        """
        if (n := len(self.order["defense"])) == 1 or not self.metrics:
            return None
        rest = [axis for axis in (*AXES, "seed") if axis != "defense"]
        groups = self.results.groupby(rest, sort=False)[list(self.comparisons)]
        means = groups.mean().where(groups.count() == n).dropna(how="all").reset_index()
        return Benchmark(means.assign(defense=f"all {n}"), self.order, self.baseline) if len(means) else None

    @cached_property
    def cautions(self) -> list[str]:
        """Sentences about settings and judges by which comparisons say little; those that hold for all name none."""
        if "harmful_scores" not in self.results:
            return []
        views, found = list(itertools.product(self.settings, self.order["judge"])), dict[str, list[str]]()
        for setting, judge in views:
            curves = {}
            for line in [line for line in self.lines if line.setting == setting]:
                name = self.name(line.series) + (f" with {line.axes['defense']}" if "defense" in self.several else "")
                runs = line.runs[line.runs["judge"] == judge].to_dict("records")
                curves[name] = [scores for run in runs if (scores := _along_attack(run))]
            for text in cautions(curves):
                found.setdefault(text, []).append(plain(self.view_name(setting, judge)))
        return [text if len(of) == len(views) else f"{'; '.join(of)}: {text}" for text, of in found.items()]

    def name(self, series: tuple[str, float]) -> str:
        """Name of a series in tables, with the fraction where a selector has several."""
        selector, fraction = series
        several = len({other for name, other in self.series if name == selector}) > 1
        return f"{selector} {100 * fraction:g} %" if several else selector

    def line_name(self, line: Line) -> str:
        """Name of a line's series in tables, with its number of seeds where others have more."""
        own, n = line.runs["seed"].nunique(), len(self.seeds)
        return self.name(line.series) if own == n else f"{self.name(line.series)} ({own} of {n} seeds)"

    def view_name(self, setting: Sequence[Any], judge: str) -> str:
        """Name of a setting and a judge: the axes that have several choices, with the choice on each."""
        chosen = zip((*SETTING, "judge"), (*setting, judge), strict=True)
        return " · ".join(f"{axis.replace('_', ' ')} {name}" for axis, name in chosen if len(self.order[axis]) > 1)

    def _lines(self) -> Iterator[Line]:
        groups = [
            (dict(zip(_CELL, key, strict=True)), group) for key, group in self.results.groupby(list(_CELL), sort=False)
        ]
        fractions = {axes["fraction"] for axes, _ in groups if axes["selector"] == self.baseline}
        alike = [axis for axis in _CELL if axis != "selector" and (axis != "fraction" or len(fractions) > 1)]

        def pair(axes: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple(axes[axis] for axis in alike)

        base = {pair(axes): group for axes, group in groups if axes["selector"] == self.baseline}
        by_metric: dict[str, list[Value | None]] = {}
        for name in dict.fromkeys(metric.name for metric in self.metrics):
            family, values = [metric for metric in self.metrics if metric.name == name], []
            for metric, (axes, group) in itertools.product(family, groups):
                other = base.get(pair(axes)) if metric.compared and axes["selector"] != self.baseline else None
                values.append(_value(metric, group, other))
            values, n = corrected(values, family[0].better), len(groups)
            by_metric |= {metric.key: values[n * at : n * (at + 1)] for at, metric in enumerate(family)}
        for at, (axes, group) in enumerate(groups):
            yield Line(axes, {key: value for key, values in by_metric.items() if (value := values[at])}, group)


def _along_attack(run: Mapping[Hashable, Any]) -> list[float]:
    """Harmful scores of a run from before the attack to its end; without snapshots and a repair, these two."""
    ends: list[float] = [run.get(name, np.nan) for name in ("harmful_score_before", "harmful_score")]
    known = pd.isna(run.get("repair_seconds")) and not pd.isna(ends).any()
    return list(run["harmful_scores"]) or (ends if known else [])


def _names(values: "pd.Series[Any]", known: Sequence[Any]) -> list[Any]:
    present = values.unique().tolist()
    others = sorted((name for name in present if name not in known), key=lambda name: (name != BASELINE, name))
    return [name for name in known if name in present] + others


def _groups(results: pd.DataFrame, judges: Sequence[str]) -> dict[str, list[ShownMetric]]:
    """Title -> metrics that were measured; with one judge all of them under no title."""
    found = [
        metric for metric in SHOWN_METRICS.values() if metric.name in results and results[metric.name].notna().any()
    ]
    if len(judges) == 1:
        return {"": found}
    judged = [metric for metric in found if metric.judged or _differs(metric, results)]
    groups = {
        f"Judge: {judge}": [
            replace(metric, judge=judge)
            for metric in judged
            if results.loc[results["judge"] == judge, metric.name].notna().any()
        ]
        for judge in judges
    }
    groups["Without a judge"] = [metric for metric in found if metric not in judged]
    return {title: metrics for title, metrics in groups.items() if metrics}


def _differs(metric: ShownMetric, results: pd.DataFrame) -> bool:
    """Whether a metric differs between judges, as accuracy does where an option of a judge changes answers."""
    runs = results.groupby([*_CELL, "seed"])[metric.name]
    return bool((runs.max() - runs.min() > 1e-6).any())


def _by_seed(metric: ShownMetric, runs: pd.DataFrame) -> dict[int, float]:
    """A metric by seed, from the rows of its judge or, where it depends on none, from the first that has it."""
    found: dict[int, float] = {}
    for seed, judge, value in zip(runs["seed"], runs["judge"], runs[metric.name], strict=True):
        if metric.judge in (None, judge) and pd.notna(value):
            found.setdefault(seed, float(value))
    return found


def _value(metric: ShownMetric, runs: pd.DataFrame, others: pd.DataFrame | None) -> Value | None:
    """A metric of some runs, and its difference to other runs of the same seeds."""
    measured, baseline = _by_seed(metric, runs), {} if others is None else _by_seed(metric, others)
    if not measured:
        return None
    value = Value(**vars(metric.mean(list(measured.values()))), seeds=len(measured))
    pairs = [(own, baseline[seed]) for seed, own in measured.items() if seed in baseline]
    if not pairs:
        return value
    differences = [own - other for own, other in pairs]
    difference = metric.mean(differences, difference=True)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if difference.low is not None else None
    return replace(value, difference=difference, baseline=float(np.mean([other for _, other in pairs])), p=p)


def corrected(values: Sequence[Value | None], better: int) -> list[Value | None]:
    """Adds corrected p and verdicts to the values of a metric, by Holm's correction (Holm 1979) over those with a p.

    A value is None where nothing was measured; `better` is 1 where higher is better, -1 where lower is.
    """
    tested = [value.p for value in values if value is not None and value.p is not None]
    after = iter(multipletests(tested, alpha=LEVEL, method="holm")[1].tolist() if tested else ())
    result: list[Value | None] = []
    for value in values:
        if value is not None and value.difference is not None:
            p = next(after) if value.p is not None else None
            real = p is not None and p < LEVEL
            value = replace(value, p_corrected=p, verdict=int(np.sign(value.difference.mean)) * better * real)
        result.append(value)
    return result


def verdicts(benchmark: Benchmark) -> list[dict[str, Any]]:
    """How each series differs from the baseline over all settings and defenses.

    Returns:
        Per series but the baseline's: ``name``, ``selector``, and by key of a metric in how many of ``n`` comparisons
        it is ``better`` or ``worse``, and the ``mean`` of the differences with ``low`` and ``high`` of its 95 %
        interval, both over the seeds that all defenses have; where these are fewer than two, or there are several
        settings, the mean is over all comparisons, and the interval None. ``time_saved`` is in percent.
    """
    found = []
    overall = benchmark.over_defenses if len(benchmark.order["defense"]) > 1 else benchmark
    pooled = {line.series: line for line in overall.lines} if overall and len(benchmark.settings) == 1 else {}
    for series in benchmark.series:
        values = [line.values for line in benchmark.lines if line.series == series]
        by_metric = {}
        for metric in benchmark.metrics:
            compared = [it[metric.key] for it in values if metric.key in it]
            differences = [value.difference.mean for value in compared if value.difference]
            if differences:
                signs = [value.verdict for value in compared]
                figure = pooled[series].figure(metric, True) if series in pooled else None
                if figure is None or figure.low is None:
                    figure = Figure(float(np.mean(differences)))
                counts = {"better": signs.count(1), "worse": signs.count(-1), "n": len(differences)}
                by_metric[metric.key] = vars(figure) | counts
        saved = [
            -100 * difference.mean / seconds.baseline
            for it in values
            if (seconds := it.get("alignment_seconds")) and (difference := seconds.difference) and seconds.baseline
        ]
        if by_metric:
            about = {"name": benchmark.name(series), "selector": series[0], "metrics": by_metric}
            found.append(about | {"time_saved": float(np.mean(saved)) if saved else None})
    return found


def summaries(benchmark: Benchmark) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of short tables of each series minus the baseline, starred where significant somewhere.

    Metrics that depend on the judge have tables apart from the others, which keeps them narrow. A mean over fewer
    comparisons than others of its metric says so.
    """
    series = verdicts(benchmark)
    most = {key: max(it["metrics"].get(key, {"n": 0})["n"] for it in series) for it in series for key in it["metrics"]}
    for (title, metrics), judged in itertools.product(benchmark.groups.items(), (True, False)):
        compared = [it for it in metrics if it.compared and (it.judged or it.judge is not None) is judged]
        rows = [
            [it["name"], *(_short(metric, it["metrics"].get(metric.key), most) for metric in compared)]
            for it in series
        ]
        if compared and rows:
            name = f"minus {benchmark.baseline}, mean over defenses and settings; * significant in one or more"
            head = ["aligned on", *(f"{metric.title}, {metric.unit}" for metric in compared)]
            yield f"{title}, {name}" if title else name, head, rows


def _short(metric: ShownMetric, verdict: Mapping[str, Any] | None, most: Mapping[str, int]) -> str:
    if verdict is None:
        return "-"
    star = "*" if verdict["better"] or verdict["worse"] else ""
    few = f" ({verdict['n']} of {most[metric.key]})" if verdict["n"] < most[metric.key] else ""
    return f"{verdict['mean']:+z.{metric.digits}f}{star}{few}"


# --- tables for papers ----------------------------------------------------------------------------------------------


def _cells(benchmark: Benchmark, metrics: Sequence[ShownMetric], minus: str, bold: str) -> pd.DataFrame:
    """A table of texts: means with intervals, and differences, the significant ones in `bold`."""
    heads = [("", axis.replace("_", " ")) for axis in benchmark.several] + [("", "aligned on")]
    columns = benchmark.columns(metrics)
    heads += [(metric.head, f"minus {benchmark.baseline}" if less else "mean") for metric, less in columns]
    rows = []
    for line in benchmark.lines:
        row = [*(plain(line.axes[axis]) for axis in benchmark.several), plain(benchmark.line_name(line))]
        for metric, difference in columns:
            figure, sign = line.figure(metric, difference), "+" if difference else ""
            text = "" if figure is None else figure.text(digits=metric.digits, sign=sign).replace("-", minus)
            row.append(bold.format(text) if difference and figure and line.values[metric.key].verdict else text)
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(heads))


def over_defenses_note(benchmark: Benchmark) -> str:
    """A paragraph that explains the table of `Benchmark.over_defenses`."""
    names = ", ".join(map(plain, benchmark.order["defense"]))
    return f"The same over the defenses {names}: the mean of their runs, seed by seed, and differences of these means."


def note(benchmark: Benchmark) -> str:
    """A paragraph that explains the numbers of a table."""
    n = len(benchmark.seeds)
    if n < 2:
        return "One seed: no intervals and no tests."
    text = f"Means over {n} seeds with 95 % intervals (Student's t); none where all seeds agree to the last digit."
    if benchmark.has_baseline:
        text += " Differences are paired by seed, with 95 % intervals that are not corrected."
    if families := sorted(set(benchmark.comparisons.values()) - {0}):
        family = " to ".join(str(it) for it in dict.fromkeys((families[0], families[-1])))
        text += (
            f" A difference is bold if it is significant (p < {LEVEL}) in a paired t test with Holm's correction over "
            f"the {family} comparisons of its metric. A difference that is the same in every seed has no spread to "
            "test against and is not bold."
        )
    return text


def to_markdown(benchmark: Benchmark) -> str:
    """The table in Markdown, by pandas and tabulate, and that over all defenses where there are several."""
    text, overall = _markdown(benchmark), benchmark.over_defenses
    return text if overall is None else f"{text}\n{markdown(over_defenses_note(benchmark))}\n\n{_markdown(overall)}"


def _markdown(benchmark: Benchmark) -> str:
    text = ""
    for title, metrics in benchmark.groups.items():
        table = _cells(benchmark, metrics, "\N{MINUS SIGN}", "**{}**")
        align = ["right" if head[0] else "left" for head in table.columns]
        # Names are the user's and are escaped; the numbers contain Markdown of this module.
        for head in [head for head in table.columns if not head[0]]:
            table[head] = table[head].map(markdown)
        table.columns = pd.Index([markdown(" ".join(part for part in head if part)) for head in table.columns])
        text += f"{markdown(title)}\n\n" if title else ""
        text += f"{table.to_markdown(index=False, disable_numparse=True, colalign=align)}\n\n"
    return "\n".join([f"{text}{note(benchmark)}\n", *(f"{markdown(caution)}\n" for caution in benchmark.cautions)])


def to_latex(benchmark: Benchmark) -> str:
    """The tables of `to_markdown` in LaTeX, by pandas: one per metric, which fits a page's width.

    Needs the packages booktabs and longtable.
    """
    text, overall = _latex(benchmark, "tab:benchmark", ""), benchmark.over_defenses
    if overall is not None:
        text += f"\\noindent {_latex_text(over_defenses_note(benchmark))}\n"
        text += _latex(overall, "tab:benchmark-overall", ", over all defenses")
    return f"% \\usepackage{{booktabs,longtable}}\n{text}"


_LATEX = str.maketrans(
    {special: f"\\{special}" for special in "&%$#_{}"}
    | {"[": "{[}", "*": "{*}"}  # which a row would take for arguments of the line break before it
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$"}
)


def _latex_text(text: object) -> str:
    return str(text).translate(_LATEX)


def _latex(benchmark: Benchmark, label: str, what: str) -> str:
    text = ""
    for metric in benchmark.metrics:
        table = _cells(benchmark, [metric], "$-$", "\\textbf{{{}}}")
        names = [column[1] for column in table.columns if not column[0]]
        numbers = table.shape[1] - len(names)
        table.columns = table.columns.get_level_values(1)
        judge = "" if metric.judge is None else f"-{benchmark.order['judge'].index(metric.judge) + 1}"
        # Names are the user's and are escaped; the numbers contain LaTeX of this module.
        style = table.style.format(_latex_text, subset=list[Hashable](names))
        text += (
            style.format_index(escape="latex", axis=1)
            .hide(axis="index")
            .to_latex(
                environment="longtable",
                hrules=True,
                column_format="l" * len(names) + "r" * numbers,
                label=f"{label}-{metric.name}{judge}",
                caption=f"{_latex_text(metric.head)}{what}.",
            )
        )
    return f"\\begingroup\\footnotesize\n{text}\\noindent {_latex_text(note(benchmark))}\n\\endgroup\n"
