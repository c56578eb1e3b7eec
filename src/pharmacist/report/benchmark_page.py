"""The page of a benchmark and the tables beside it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pharmacist.core.files import write_text
from pharmacist.report import charts
from pharmacist.report.benchmark import (
    BASELINE,
    SETTING,
    Benchmark,
    Line,
    Value,
    note,
    to_latex,
    to_markdown,
    verdicts,
)
from pharmacist.report.html import write_page


_COLORS = {"full": "--full", "random": "--random", "pharmacist": "--core"}
_FURTHER = (
    "--compliance",
    "--critical",
    "--over-refusal",
    "--low-quality",
    "--strong",
    "--duplicate",
    "--terse",
    "--mild",
)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon", "triangle-down", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_BANDS = 6  # lines in a chart up to which bands can be told apart
_CROWD = 15  # points from which on their intervals would hide them
_TITLES = {"later_defense": "Later defense", "selector": "Aligned on"}


def render_benchmark(
    folder: Path, results: pd.DataFrame, *, manifest: Mapping[str, Any], baseline: str | None = None
) -> None:
    """Writes ``report.html``, ``tables.md`` and ``tables.tex`` into a benchmark's folder.

    Args:
        folder: Of the benchmark.
        results: Its ``results.parquet``.
        manifest: Content of its ``manifest.json``.
        baseline: Selector that the others are compared with; None for the full dataset.

    Raises:
        DataError: The results cannot be used.
    """
    benchmark = Benchmark(results, manifest.get("extra", {}).get("axes"), baseline or BASELINE)
    settings, defenses = benchmark.settings(), benchmark.order["defense"]
    look = Look(benchmark)
    measured = {metric.name for metric in benchmark.metrics}
    figures: dict[str, list[charts.Spec]] = {}

    def per_setting(name: str, figure: Callable[[list[Line]], charts.Spec], keep: Callable[[Line], bool]) -> None:
        figures[name] = [
            figure([line for line in benchmark.lines if line.setting == setting and keep(line)])
            for setting in settings
        ]

    if {"harmful_score", "fine_tune_accuracy"} <= measured:
        per_setting("trade_off", lambda lines: trade_off(lines, look), lambda line: True)
    per_setting("cost", lambda lines: cost(lines, look), lambda line: True)
    curves = bool(results["attack_steps"].map(len).max())
    fractions = len(benchmark.order["fraction"]) > 1 and "harmful_score" in measured
    for at, defense in enumerate(defenses):
        of_defense = [line for line in benchmark.lines if line.axes["defense"] == defense]
        if curves:
            per_setting(f"curve-{at}", lambda lines: attack_curves(lines, benchmark, look), of_defense.__contains__)
        if fractions:
            per_setting(f"fraction-{at}", lambda lines: fraction_curves(lines, look), of_defense.__contains__)
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
        verdicts=[own | {"color": look.color(own["selector"])} for own in verdicts(benchmark)],
        selectors=[{"name": name, "color": look.color(name)} for name in benchmark.order["selector"]],
    )
    write_text(folder / "tables.md", to_markdown(benchmark))
    write_text(folder / "tables.tex", to_latex(benchmark))


class Look:
    """The colour of each selector and the marker of each defense, the same in all charts."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        names = benchmark.order["selector"]
        further = [name for name in names if name not in _COLORS]
        self._colors = _COLORS | {name: _FURTHER[at % len(_FURTHER)] for at, name in enumerate(further)}
        self._places = {name: at for at, name in enumerate(names)}
        self._symbols = {name: _SYMBOLS[at % len(_SYMBOLS)] for at, name in enumerate(benchmark.order["defense"])}

    def color(self, selector: str) -> str:
        """As a CSS value."""
        return f"var({self._colors[selector]})"

    def dash(self, selector: str) -> str:
        """Of a line, so that colour is not all that tells it."""
        return _DASHES[self._places[selector] % len(_DASHES)]

    def symbol(self, defense: str) -> str:
        """Of a point."""
        return self._symbols[defense]


def _error_bars(values: Sequence[Value], color: str, thickness: float = 1.2) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "color": color,
        "thickness": thickness,
        "width": 0,
        "array": [0 if value.high is None else value.high - value.mean for value in values],
        "arrayminus": [0 if value.low is None else value.mean - value.low for value in values],
    }


def _span(values: Sequence[Value]) -> list[float]:
    """Of an axis of rates: all means, and of their intervals what is possible."""
    ends = [end for value in values for end in (value.mean, value.low, value.high) if end is not None]
    low, high = (float(np.clip(end, 0, 100)) for end in (min(ends, default=0), max(ends, default=100)))
    pad = max(1.5, 0.06 * (high - low))
    return [low - pad, high + pad]


def _told(value: Value, unit: str = "%") -> str:
    text = f"{value.mean:.1f} {unit}"
    return text if value.low is None else f"{text} ({value.low:.1f} to {value.high:.1f})"


def trade_off(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Harmful score over fine-tune accuracy, a point per defense and series, with intervals over seeds."""
    lines = [line for line in lines if {"harmful_score", "fine_tune_accuracy"} <= set(line.values)]
    traces: list[Any] = []
    thickness = 1.2 if len(lines) <= _CROWD else 0.4
    for selector in look.benchmark.order["selector"]:
        own = [line for line in lines if line.axes["selector"] == selector]
        x, y = ([line.values[name] for line in own] for name in ("fine_tune_accuracy", "harmful_score"))
        color = look.color(selector)
        traces.append(
            go.Scatter(
                x=[value.mean for value in x],
                y=[value.mean for value in y],
                mode="markers",
                showlegend=False,
                error_x=_error_bars(x, color, thickness),
                error_y=_error_bars(y, color, thickness),
                marker={
                    "color": color,
                    "size": 11,
                    "symbol": [look.symbol(line.axes["defense"]) for line in own],
                    "line": {"color": "var(--card)", "width": 1},
                },
                customdata=[
                    [f"{look.benchmark.name(line.series)}, {line.axes['defense']}", _told(b), _told(a)]
                    for line, a, b in zip(own, x, y, strict=True)
                ],
                hovertemplate="%{customdata[0]}<br>harmful score %{customdata[1]}<br>accuracy %{customdata[2]}"
                "<extra></extra>",
            )
        )
    # Colours are told above the chart, markers by its own legend.
    traces += [
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=defense,
            hoverinfo="skip",
            marker={"symbol": look.symbol(defense), "size": 10, "color": "var(--soft)"},
        )
        for defense in look.benchmark.order["defense"]
    ]
    accuracy, score = (
        _span([line.values[name] for line in lines]) for name in ("fine_tune_accuracy", "harmful_score")
    )
    return charts._figure(
        traces,
        480,
        xaxis={"title": {"text": "fine-tune accuracy, % (more is better)"}, "range": accuracy},
        yaxis={"title": {"text": "harmful score, % (less is better)"}, "range": score},
    )


def attack_curves(lines: Sequence[Line], benchmark: Benchmark, look: Look) -> charts.Spec:
    """Harmful score over attack steps: means over seeds, and the range of the seeds as a band where lines are few."""
    axes = benchmark.results
    bands: list[Any] = []
    drawn: list[Any] = []
    all_steps: set[int] = set()
    for line in lines:
        own = axes[np.logical_and.reduce([(axes[axis] == value).to_numpy() for axis, value in line.axes.items()])]
        found = [
            (tuple(int(step) for step in steps), heights)
            for steps, heights in zip(own["attack_steps"], own["harmful_scores"], strict=True)
            if len(steps)
        ]
        if not found:
            continue
        steps = found[0][0]
        heights = np.asarray([seed for own_steps, seed in found if own_steps == steps], dtype=np.float64)
        ticks, name, color = (
            [str(step) for step in steps],
            benchmark.name(line.series),
            look.color(line.axes["selector"]),
        )
        all_steps |= set(steps)
        low, high = heights.min(0).tolist(), heights.max(0).tolist()
        if len(heights) > 1 and len(lines) <= _BANDS:
            bands.append(
                go.Scatter(
                    x=ticks + ticks[::-1],
                    y=high + low[::-1],
                    fill="toself",
                    fillcolor=color,
                    opacity=0.13,
                    mode="lines",
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=name,
                )
            )
        drawn.append(
            go.Scatter(
                x=ticks,
                y=heights.mean(0).tolist(),
                name=name,
                mode="lines+markers",
                legendgroup=name,
                showlegend=False,
                line={"color": color, "width": 2.5, "dash": look.dash(line.axes["selector"])},
                marker={"size": 7, "color": color},
                customdata=[f"{a:.1f} to {b:.1f}" for a, b in zip(low, high, strict=True)],
                hovertemplate=f"{name}, step %{{x}}<br>%{{y:.1f}} %, seeds %{{customdata}}<extra></extra>",
            )
        )
    ticks = [str(step) for step in sorted(all_steps)]
    return charts._figure(
        [*bands, *drawn],
        320,
        margin={"l": 60, "r": 16, "t": 12, "b": 50},
        xaxis={
            "title": {"text": "attack steps"},
            "type": "category",
            "showgrid": False,
            "categoryorder": "array",
            "categoryarray": ticks,
        },
        yaxis={"title": {"text": "harmful score, %"}, "range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]},
    )


def fraction_curves(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Harmful score over the fraction that is kept, a line per selector; the full dataset as a dashed level."""
    traces: list[Any] = []
    extra: dict[str, Any] = {}
    for selector in look.benchmark.order["selector"]:
        own = [line for line in lines if line.axes["selector"] == selector and "harmful_score" in line.values]
        values, color = [line.values["harmful_score"] for line in own], look.color(selector)
        traces.append(
            go.Scatter(
                x=[100 * line.axes["fraction"] for line in own],
                y=[value.mean for value in values],
                name=selector,
                mode="lines+markers",
                showlegend=False,
                error_y=_error_bars(values, color),
                line={"color": color, "width": 2.5, "dash": look.dash(selector)},
                marker={"size": 8, "color": color},
                customdata=[_told(value) for value in values],
                hovertemplate=f"{selector}, %{{x:g}} % of the pool<br>harmful score %{{customdata}}<extra></extra>",
            )
        )
        if selector == BASELINE and own:
            level = values[0].mean
            extra["shapes"] = [
                {
                    "type": "line",
                    "x0": 0,
                    "x1": 1,
                    "xref": "paper",
                    "y0": level,
                    "y1": level,
                    "line": {"color": color, "width": 1, "dash": "dash"},
                }
            ]
    return charts._figure(
        traces,
        320,
        margin={"l": 60, "r": 16, "t": 12, "b": 50},
        xaxis={"title": {"text": "share of the pool, %"}, "range": [0, 104]},
        yaxis={"title": {"text": "harmful score, %"}, "range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]},
        **extra,
    )


def cost(lines: Sequence[Line], look: Look) -> charts.Spec:
    """Selection and alignment time, a bar per defense and series."""
    lines = list(lines)[::-1]  # plotly draws from below
    names = [[line.axes["defense"] for line in lines], [look.benchmark.name(line.series) for line in lines]]
    traces = []
    for metric, title, pattern in (("selection_seconds", "selection", "/"), ("alignment_seconds", "alignment", "")):
        values = [line.values.get(metric) for line in lines]
        traces.append(
            go.Bar(
                y=names,
                x=[0 if value is None else value.mean for value in values],
                orientation="h",
                showlegend=False,
                marker={
                    "color": [look.color(line.axes["selector"]) for line in lines],
                    "line": {"width": 0},
                    "pattern": {"shape": pattern, "fgcolor": "var(--card)", "size": 6, "solidity": 0.5},
                },
                customdata=["" if value is None else _told(value, "s") for value in values],
                hovertemplate=f"%{{y}}<br>{title} %{{customdata}}<extra></extra>",
            )
        )
    return charts._figure(
        traces,
        90 + 24 * len(lines),
        barmode="stack",
        bargap=0.25,
        margin={"l": 150, "r": 24, "t": 8, "b": 48},
        xaxis={"title": {"text": "seconds"}, "rangemode": "tozero"},
        yaxis={
            "showgrid": False,
            "tickfont": {"color": "var(--ink)", "size": 12},
            "dividercolor": "var(--line)",
            "automargin": True,
        },
    )


def result_table(benchmark: Benchmark, look: Look) -> dict[str, Any]:
    """The table of the page.

    Returns:
        ``columns`` (``title``, ``kind``: name, series, mean or difference) and ``rows``; a mean is a list of mean,
        low and high, a difference one of difference, low, high, corrected p and verdict, both with None for nothing.
    """
    shown = [axis for axis in (*SETTING, "defense") if axis in benchmark.several]
    columns = [{"title": _TITLES.get(axis, axis.capitalize()), "kind": "name"} for axis in shown]
    columns.append({"title": _TITLES["selector"], "kind": "series"})
    for metric in benchmark.metrics:
        columns.append({"title": metric.head, "kind": "mean"})
        if metric.compared and benchmark.has_baseline:
            columns.append({"title": f"minus {benchmark.baseline}", "kind": "difference"})
    rows = []
    for line in benchmark.lines:
        row: list[Any] = [str(line.axes[axis]) for axis in shown]
        row.append([benchmark.name(line.series), look.color(line.axes["selector"])])
        for metric in benchmark.metrics:
            value = line.values.get(metric.name)
            row.append(None if value is None else [value.mean, value.low, value.high])
            if metric.compared and benchmark.has_baseline:
                differs = value is not None and value.difference is not None
                row.append(
                    None
                    if value is None or not differs
                    else [
                        value.difference,
                        value.difference_low,
                        value.difference_high,
                        value.p_corrected,
                        value.verdict,
                    ]
                )
        rows.append(row)
    return {
        "columns": columns,
        "rows": rows,
        "axes": [column["title"] for column in columns if column["kind"] == "name"],
    }
