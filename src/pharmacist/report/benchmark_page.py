"""The page of a benchmark and the tables beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pharmacist.core.files import write_text
from pharmacist.report import charts
from pharmacist.report.benchmark import BASELINE, SETTING, Benchmark, Line, note, to_latex, to_markdown, verdicts
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
) -> None:
    """Writes ``report.html``, ``tables.md`` and ``tables.tex`` of a benchmark, out of results and manifest.

    Selectors are compared with the baseline, by default the full dataset.

    Raises:
        DataError: The results cannot be used.
    """
    benchmark = Benchmark(results, manifest["extra"].get("axes"), baseline or BASELINE)
    settings, defenses, look = benchmark.settings(), benchmark.order["defense"], Look(benchmark)
    measured = {metric.name for metric in benchmark.metrics}
    curves = bool(results["attack_steps"].map(len).max())
    fractions = len(benchmark.order["fraction"]) > 1 and "harmful_score" in measured
    drawn: dict[str, tuple[Callable[[list[Line], Look], charts.Spec], Sequence[str]]] = {"cost": (cost, defenses)}
    if {"harmful_score", "fine_tune_accuracy"} <= measured:
        drawn["trade_off"] = trade_off, defenses
    for at, defense in enumerate(defenses):
        drawn |= {f"curve-{at}": (attack_curves, [defense])} if curves else {}
        drawn |= {f"fraction-{at}": (fraction_curves, [defense])} if fractions else {}
    lines = {setting: [line for line in benchmark.lines if line.setting == setting] for setting in settings}
    figures = {
        name: [figure([line for line in own if line.axes["defense"] in shown], look) for own in lines.values()]
        for name, (figure, shown) in drawn.items()
    }
    write_page(
        folder / "report.html",
        "benchmark.html.j2",
        ["benchmark.js"],
        {"figures": figures, "results": result_table(benchmark, look)},
        manifest=manifest,
        benchmark=benchmark,
        settings=[benchmark.setting_name(setting) for setting in settings],
        defenses=defenses,
        curves=curves,
        fractions=fractions,
        trade_off="trade_off" in figures,
        note=note(benchmark),
        verdicts=[own | {"color": look.colors[own["selector"]]} for own in verdicts(benchmark)],
        selectors=[{"name": name, "color": look.colors[name]} for name in benchmark.order["selector"]],
    )
    write_text(folder / "tables.md", to_markdown(benchmark))
    write_text(folder / "tables.tex", to_latex(benchmark))


class Look:
    """Colour and dash of each selector, marker of each defense, as CSS and plotly call them: alike in all charts."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
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


def trade_off(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Harmful score over fine-tune accuracy, a point per defense and series, with intervals over seeds."""
    points = []
    for line in lines:
        selector, defense = line.axes["selector"], line.axes["defense"]
        if {"harmful_score", "fine_tune_accuracy"} <= line.values.keys():
            name, marker = f"{look.benchmark.name(line.series)}, {defense}", look.symbols[defense]
            accuracy, score = line.values["fine_tune_accuracy"], line.values["harmful_score"]
            points.append(charts.Point(name, selector, look.colors[selector], marker, accuracy, score))
    # Colours are told above the chart, markers by its own legend.
    legend = {defense: (symbol, "var(--soft)") for defense, symbol in look.symbols.items()}
    thickness = 1.2 if len(points) <= _CROWD else 0.4
    return charts.trade_off(points, look.benchmark.order["selector"], legend, thickness=thickness)


def attack_curves(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Harmful score over attack steps: means over seeds, and the range of the seeds as a band where lines are few."""
    curves = []
    for line in lines:
        found = zip(line.runs["attack_steps"].map(list), line.runs["harmful_scores"].map(list), strict=True)
        seeds = [(steps, scores) for steps, scores in found if steps]
        if seeds:
            steps = seeds[0][0]
            values = charts.over_seeds([scores for own_steps, scores in seeds if own_steps == steps])
            curves.append(look.curve(line, steps, values))
    return charts.curves(curves, "attack steps", spread="band" if len(lines) <= _BANDS else "none")


def fraction_curves(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Harmful score over the fraction that is kept, a line per selector; the full dataset as a dashed level."""
    curves, level = [], []
    for selector in look.benchmark.order["selector"]:
        own = [line for line in lines if line.axes["selector"] == selector and "harmful_score" in line.values]
        values = [line.values["harmful_score"] for line in own]
        fractions = [100 * line.axes["fraction"] for line in own]
        curves += [replace(look.curve(own[0], fractions, values), name=selector)] if own else []
        if selector == BASELINE and own:
            level = charts.dashed(values[0].mean, "y", look.colors[selector])
    title = "share of the pool, %"
    return charts.curves(
        curves, title, spread="bars", even=False, xaxis={"title": {"text": title}, "range": [0, 104]}, shapes=level
    )


def cost(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Selection and alignment time, a bar per defense and series."""
    lines = list(lines)[::-1]  # plotly draws from below
    names = [line.axes["defense"] for line in lines], [look.benchmark.name(line.series) for line in lines]
    colors = [look.colors[line.axes["selector"]] for line in lines]
    parts = {part: [line.values.get(f"{part}_seconds") for line in lines] for part in ("selection", "alignment")}
    return charts.cost(names, colors, parts)


def result_table(benchmark: Benchmark, look: Look) -> dict[str, Any]:
    """The table of the page.

    Returns:
        ``columns`` (``title``, ``kind``: name, series, mean or difference) and ``rows``; a mean is a list of mean,
        low and high, a difference one of difference, low, high, corrected p and verdict, both with None for nothing.
    """
    shown = [axis for axis in (*SETTING, "defense") if axis in benchmark.several]
    names = [axis.replace("_", " ").capitalize() for axis in shown]
    columns = [{"title": name, "kind": "name"} for name in names] + [{"title": "Aligned on", "kind": "series"}]
    for metric, difference in benchmark.columns:
        title, kind = (f"minus {benchmark.baseline}", "difference") if difference else (metric.head, "mean")
        columns.append({"title": title, "kind": kind})
    rows = []
    for line in benchmark.lines:
        row: list[Any] = [str(line.axes[axis]) for axis in shown]
        row.append([benchmark.name(line.series), look.colors[line.axes["selector"]]])
        for metric, difference in benchmark.columns:
            figure, value = line.figure(metric, difference), line.values.get(metric.name)
            tested = [value.p_corrected, value.verdict] if difference and value is not None else []
            row.append(None if figure is None else [figure.mean, figure.low, figure.high, *tested])
        rows.append(row)
    return {"columns": columns, "rows": rows, "axes": names}
