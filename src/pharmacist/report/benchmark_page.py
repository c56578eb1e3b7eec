"""The page of a benchmark and the tables beside it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from pharmacist.core.files import write_text
from pharmacist.report import charts
from pharmacist.report.benchmark import BASELINE, Benchmark, Line, Value, note, to_latex, to_markdown, verdicts
from pharmacist.report.html import write_page
from pharmacist.report.numbers import Figure


_COLORS = {"full": "full", "random": "random", "pharmacist": "core"}
_FURTHER = ("compliance", "critical", "over-refusal", "low-quality", "strong", "duplicate", "terse", "mild")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon", "triangle-down", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_BANDS = 6  # lines in a chart up to which bands can be told apart
_CROWD = 15  # points from which on their intervals would hide them


def render_benchmark(
    folder: Path, results: pd.DataFrame, *, manifest: Mapping[str, Any], baseline: str | None = None
) -> Benchmark:
    """Writes ``report.html``, ``tables.md`` and ``tables.tex`` of a benchmark, and returns the numbers of the page.

    Selectors are compared with the baseline, by default the full pool. A DataError where the results cannot be used.
    """
    benchmark = Benchmark(results, manifest["extra"].get("axes"), baseline or BASELINE)
    settings, defenses = benchmark.settings, benchmark.order["defense"]
    looks = [Look(benchmark, judge) for judge in benchmark.order["judge"]]
    views, colors = list(itertools.product(settings, looks)), looks[0].colors
    measured = {metric.name for metric in benchmark.metrics}
    curves = bool(results["attack_steps"].map(len).max())
    margins = "loss_margins" in results and bool(results["loss_margins"].map(len).max())
    fractions = len(benchmark.order["fraction"]) > 1 and "harmful_score" in measured
    drawn: dict[str, tuple[Callable[[list[Line], Look], charts.Spec], Sequence[str]]] = {"cost": (cost, defenses)}
    if {"harmful_score", "fine_tune_accuracy"} <= measured:
        drawn["trade_off"] = trade_off, defenses
    for at, defense in enumerate(defenses):
        drawn |= {f"curve-{at}": (partial(over_steps, name="harmful_scores"), [defense])} if curves else {}
        drawn |= {f"margin-{at}": (partial(over_steps, name="loss_margins"), [defense])} if margins else {}
        drawn |= {f"fraction-{at}": (fraction_curves, [defense])} if fractions else {}
    figures = {
        name: [
            figure([it for it in benchmark.lines if it.setting == setting and it.axes["defense"] in shown], look)
            for setting, look in views
        ]
        for name, (figure, shown) in drawn.items()
    }
    write_page(
        folder / "report.html",
        "benchmark.html.j2",
        ["benchmark.js"],
        {"figures": figures, "results": result_table(benchmark, colors)},
        manifest=manifest,
        benchmark=benchmark,
        views=[benchmark.view_name(setting, look.judge) for setting, look in views],
        defenses=defenses,
        charts=figures.keys(),
        note=note(benchmark),
        verdicts=[own | {"color": colors[own["selector"]]} for own in verdicts(benchmark)],
        selectors=[{"name": name, "color": colors[name]} for name in benchmark.order["selector"]],
    )
    write_text(folder / "tables.md", to_markdown(benchmark))
    write_text(folder / "tables.tex", to_latex(benchmark))
    return benchmark


class Look:
    """Appearance of all charts: colour (CSS) and dash of each selector, marker of each defense (as plotly names them);
    and the judge of the harmful scores that they show.
    """

    def __init__(self, benchmark: Benchmark, judge: str) -> None:
        self.benchmark, self.judge = benchmark, judge
        names = benchmark.order["selector"]
        further = [name for name in names if name not in _COLORS]
        colors = _COLORS | {name: _FURTHER[at % len(_FURTHER)] for at, name in enumerate(further)}
        self.colors = {name: f"var(--{color})" for name, color in colors.items()}
        self.dashes = {name: _DASHES[at % len(_DASHES)] for at, name in enumerate(names)}
        self.symbols = {name: _SYMBOLS[at % len(_SYMBOLS)] for at, name in enumerate(benchmark.order["defense"])}

    def curve(self, line: Line, x: Sequence[float], values: Sequence[Figure]) -> charts.Curve:
        """A line of a chart."""
        selector = line.axes["selector"]
        return charts.Curve(self.benchmark.name(line.series), self.colors[selector], x, values, self.dashes[selector])

    def value(self, line: Line, name: str) -> Value | None:
        """A metric of a line, by the judge."""
        found = (it for it in self.benchmark.metrics if it.name == name and it.judge in (None, self.judge))
        return next((line.values.get(metric.key) for metric in found), None)


def trade_off(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Chart of harmful score over fine-tune accuracy, a point per defense and series, with intervals over seeds."""
    points = []
    for line in lines:
        selector, defense = line.axes["selector"], line.axes["defense"]
        accuracy, score = look.value(line, "fine_tune_accuracy"), look.value(line, "harmful_score")
        if accuracy is not None and score is not None:
            name, marker = f"{look.benchmark.name(line.series)}, {defense}", look.symbols[defense]
            points.append(charts.Point(name, selector, look.colors[selector], marker, accuracy, score))
    # The page's legend explains the colours, that of the chart the markers.
    legend = {defense: (symbol, "var(--soft)") for defense, symbol in look.symbols.items()}
    thickness = 1.2 if len(points) <= _CROWD else 0.4
    return charts.trade_off(points, look.benchmark.order["selector"], legend, thickness=thickness)


def over_steps(lines: Sequence[Line], look: Look, name: Literal["harmful_scores", "loss_margins"]) -> charts.Spec:
    """Chart of a column over attack steps: means over seeds, and their range as a band where lines are few.

    The axis of loss margins has the range of the whole benchmark.
    """
    curves: list[charts.Curve] = []
    margins: tuple[float, float] | None = None
    if name == "loss_margins":
        every = np.concatenate([np.asarray(values, dtype=np.float64) for values in look.benchmark.results[name]])
        pad = 0.06 * (float(np.ptp(every)) or 1.0)
        margins = float(every.min()) - pad, float(every.max()) + pad
    for line in lines:
        runs = line.runs[line.runs["judge"] == look.judge]
        found = zip(runs["attack_steps"].map(list), runs[name].map(list), strict=True)
        seeds = [(steps, values) for steps, values in found if values]
        if seeds:
            # An attack measured in epochs can be a few steps longer with one seed than with another: ends are one.
            last = max(steps[-1] for steps, _ in seeds)
            measured = [dict(zip([*steps[:-1], last], values, strict=True)) for steps, values in seeds]
            common = [step for step in measured[0] if all(step in own for own in measured)]
            values = charts.over_seeds([[own[step] for step in common] for own in measured])
            curves.append(look.curve(line, common, values))
    spread: Literal["band", "none"] = "band" if len(lines) <= _BANDS else "none"
    return charts.curves(curves, "attack steps", spread=spread, margins=margins)


def fraction_curves(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Chart of harmful score over the selected fraction, a line per selector; the full pool as a dashed level."""
    curves, level = [], []
    for selector in look.benchmark.order["selector"]:
        of_selector = [line for line in lines if line.axes["selector"] == selector]
        scored = [(line, score) for line in of_selector if (score := look.value(line, "harmful_score"))]
        values, fractions = [score for _, score in scored], [100 * line.axes["fraction"] for line, _ in scored]
        curves += [replace(look.curve(scored[0][0], fractions, values), name=selector)] if scored else []
        if selector == BASELINE and scored:
            level = charts.dashed(values[0].mean, "y", look.colors[selector])
    title = "share of the pool, %"
    return charts.curves(
        curves, title, spread="bars", even=False, xaxis={"title": {"text": title}, "range": [0, 104]}, shapes=level
    )


def cost(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Chart of selection and alignment time, a bar per defense and series."""
    lines = list(lines)[::-1]  # plotly draws from below
    names = [line.axes["defense"] for line in lines], [look.benchmark.name(line.series) for line in lines]
    colors = [look.colors[line.axes["selector"]] for line in lines]
    parts = {part: [look.value(line, f"{part}_seconds") for line in lines] for part in ("selection", "alignment")}
    return charts.cost(names, colors, parts)


def result_table(benchmark: Benchmark, colors: Mapping[str, str]) -> dict[str, Any]:
    """Data of the table on the page.

    Returns:
        ``columns`` (``title``, ``kind``: name, series, mean or difference, ``metric`` and ``digits`` of numbers) and
        ``rows``; a mean is a list of mean, low and high, a difference one of difference, low, high, corrected p and
        verdict, both with None for nothing.
    """
    names = [axis.replace("_", " ").capitalize() for axis in benchmark.several]
    columns: list[dict[str, Any]] = [{"title": name, "kind": "name"} for name in names]
    columns.append({"title": "Aligned on", "kind": "series"})
    numbers = benchmark.columns(benchmark.metrics)
    for metric, difference in numbers:
        title, kind = (f"minus {benchmark.baseline}", "difference") if difference else (metric.head, "mean")
        columns.append({"title": title, "kind": kind, "metric": metric.name, "digits": metric.digits})
    rows = []
    for line in benchmark.lines:
        row: list[Any] = [str(line.axes[axis]) for axis in benchmark.several]
        row.append([benchmark.line_name(line), colors[line.axes["selector"]]])
        for metric, difference in numbers:
            figure, value = line.figure(metric, difference), line.values.get(metric.key)
            tested = [value.p_corrected, value.verdict] if difference and value is not None else []
            row.append(None if figure is None else [figure.mean, figure.low, figure.high, *tested])
        rows.append(row)
    return {"columns": columns, "rows": rows}
