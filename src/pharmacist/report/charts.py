"""Figures of a page. Colours are CSS custom properties that the browser resolves, so that charts follow the theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pharmacist.report import words
from pharmacist.report.numbers import Figure


Spec = dict[str, Any]

_INK, _SOFT, _LINE, _CARD, _CLEAR = "var(--ink)", "var(--soft)", "var(--line)", "var(--card)", "rgba(0,0,0,0)"
_BINS = 60
_SCORE = {"title": {"text": "harmful score, %"}, "range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]}


def _figure(traces: Sequence[Any], height: int, **layout: Any) -> Spec:
    figure = go.Figure(list(traces), layout=go.Layout(template="none", height=height))
    figure.update_layout(
        autosize=True,
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        margin={"l": 64, "r": 24, "t": 44, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        hovermode="closest",
        hoverlabel={"bgcolor": _CARD, "bordercolor": _LINE, "font": {"color": _INK}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": _INK}},
    )
    axis = {
        "gridcolor": _LINE,
        "linecolor": _LINE,
        "zeroline": False,
        "tickcolor": _LINE,
        "automargin": True,
        "tickfont": {"color": _SOFT},
        "title": {"font": {"color": _SOFT, "size": 13}, "standoff": 12},
    }
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(layout)
    spec: Spec = figure.to_plotly_json()
    return {"data": spec["data"], "layout": spec["layout"]}


def _margin(left: int, bottom: int) -> dict[str, int]:
    return {"l": left, "r": 24, "t": 12, "b": bottom}


def dashed(at: float, axis: Literal["x", "y"] = "x", color: str = _INK) -> list[dict[str, Any]]:
    """A dashed line right across a chart, at one value of an axis."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return [{"type": "line", **ends, "line": {"color": color, "width": 1.5, "dash": "dash"}}]


def _error_bars(values: Sequence[Figure], color: str, thickness: float = 1.2) -> dict[str, Any]:
    """Intervals; where a value has none its bar has no length."""
    return {
        "type": "data",
        "symmetric": False,
        "color": color,
        "thickness": thickness,
        "width": 0,
        "array": [0 if value.high is None else value.high - value.mean for value in values],
        "arrayminus": [0 if value.low is None else value.mean - value.low for value in values],
    }


def told(value: Figure, unit: str = "%") -> str:
    """A figure where a pointer rests on it."""
    return value.text(f" {unit}", ends="({} to {})")


# --- rankings -------------------------------------------------------------------------------------------------------


def score_histogram(scores: pd.DataFrame, cut: Mapping[str, Any] | None, judged: bool) -> Spec:
    """Rows per score, stacked by reason, with the cut."""
    values, reasons = scores["score"].to_numpy(), scores["reason"].astype(str)
    edges = np.histogram_bin_edges(values, bins=min(_BINS, max(1, len(values))))
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    ranges = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    traces = []
    for name in words.ordered(reasons, words.REASONS):
        word, counts = words.reason(name, judged), np.histogram(values[(reasons == name).to_numpy()], edges)[0]
        traces.append(
            go.Bar(
                x=middle,
                y=counts.tolist(),
                name=word.title,
                width=float(edges[1] - edges[0]),
                customdata=ranges,
                marker={"color": word.css, "line": {"width": 0}},
                hovertemplate=f"{word.title}<br>score %{{customdata}}<br>%{{y}} rows<extra></extra>",
            )
        )
    extra: dict[str, Any] = {}
    if cut is not None:
        note = {
            "x": cut["score"],
            "y": 1,
            "yref": "paper",
            "text": "selected →",
            "showarrow": False,
            "xanchor": "left",
            "yanchor": "top",
            "xshift": 6,
            "font": {"color": _INK, "size": 12},
            "bgcolor": _CARD,
        }
        extra = {"shapes": dashed(cut["score"]), "annotations": [note]}
    return _figure(
        traces,
        340,
        barmode="stack",
        bargap=0.05,
        showlegend=False,
        margin=_margin(64, 56),
        xaxis={"title": {"text": "score (higher = keep)"}, "showgrid": False},
        yaxis={"title": {"text": "rows"}},
        **extra,
    )


def composition(table: Sequence[Mapping[str, Any]], word_of: Mapping[str, words.Word]) -> Spec:
    """Two bars, the selected rows and the others, divided by reason or label; in percent."""
    bars = {"Left out": "of_left", "Selected": "of_selected"}
    traces = []
    for group in table:
        word, shares = word_of[group["name"]], [group[key] for key in bars.values()]
        traces.append(
            go.Bar(
                y=list(bars),
                x=shares,
                name=word.title,
                orientation="h",
                customdata=[group["left"], group["selected"]],
                marker={"color": word.css, "line": {"color": _CARD, "width": 1}},
                text=[f"{share:.0f} %" if share is not None and share >= 5 else "" for share in shares],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "var(--on-color)"},
                hovertemplate=f"{word.title}: %{{x:.1f}} % (%{{customdata}} rows)<extra>%{{y}}</extra>",
            )
        )
    return _figure(
        traces,
        160,
        barmode="stack",
        bargap=0.28,
        margin=_margin(76, 32),
        showlegend=False,
        xaxis={"range": [0, 100], "ticksuffix": " %", "showgrid": False},
        yaxis={"showgrid": False, "tickfont": {"color": _INK}},
    )


def kept(categories: Sequence[Mapping[str, Any]], overall: float) -> Spec:
    """Share of each category that is selected, in percent, beside that of the pool."""
    groups = list(categories)[::-1]
    places = list(range(len(groups)))
    trace = go.Bar(
        y=places,
        x=[group["kept"] for group in groups],
        orientation="h",
        marker={"color": "var(--accent)", "line": {"width": 0}},
        customdata=[[words.category(group["name"]), group["selected"], group["rows"]] for group in groups],
        hovertemplate="%{customdata[0]}: %{x:.1f} %, %{customdata[1]} of %{customdata[2]} rows<extra></extra>",
        showlegend=False,
    )
    highest = max(overall, *(group["kept"] for group in groups))
    titles = [_short(words.category(group["name"])) for group in groups]
    return _figure(
        [trace],
        70 + 26 * len(groups),
        bargap=0.35,
        margin=_margin(76, 40),
        shapes=dashed(overall),
        xaxis={"range": [0, min(100.0, 1.1 * highest)], "ticksuffix": " %", "rangemode": "tozero"},
        yaxis={"showgrid": False, "tickvals": places, "ticktext": titles, "tickfont": {"color": _INK}},
    )


def _short(text: str, limit: int = 32) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- models under attack --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: In legend and under the pointer.
        color: CSS value.
        x: Where it was measured.
        values: Harmful score there, with an interval or the range of the seeds.
        dash: Of the line, so that colour is not all that tells it.
        symbol: Of its points.
        width: Of the line.
    """

    name: str
    color: str
    x: Sequence[float]
    values: Sequence[Figure]
    dash: str = "solid"
    symbol: str = "circle"
    width: float = 2.5


def over_seeds(seeds: Sequence[Sequence[float]]) -> list[Figure]:
    """Means over seeds at each step, with the least and the greatest seed where there are several."""
    heights = np.asarray(seeds, dtype=np.float64)
    means = heights.mean(0).tolist()
    if len(heights) == 1:
        return [Figure(mean) for mean in means]
    ends = zip(means, heights.min(0).tolist(), heights.max(0).tolist(), strict=True)
    return [Figure(mean, low, high) for mean, low, high in ends]


def curves(
    found: Sequence[Curve],
    x: str,
    *,
    spread: Literal["band", "bars", "none"],
    height: int = 320,
    legend: bool = False,
    even: bool = True,
    **layout: Any,
) -> Spec:
    """Harmful score in percent over something.

    Args:
        found: The lines.
        x: What it is over.
        spread: How intervals are drawn.
        height: In pixels.
        legend: Whether there is one.
        even: Draw the places at even distances: steps about double from one to the next, and evenly spaced they leave
            the beginning of an attack legible.
        **layout: Of plotly, over what is usual.
    """
    bands, lines = [], []
    for curve in found:
        ticks = [f"{value:g}" for value in curve.x] if even else list(curve.x)
        common = {"legendgroup": curve.name, "x": ticks, "showlegend": legend}
        low, high = ([getattr(value, end) for value in curve.values] for end in ("low", "high"))
        if spread == "band" and None not in low:
            look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": curve.color, "opacity": 0.15}
            area = {"x": ticks + ticks[::-1], "y": high + low[::-1], "hoverinfo": "skip", "showlegend": False}
            bands.append(go.Scatter(**common | look | area))
        lines.append(
            go.Scatter(
                **common,
                y=[value.mean for value in curve.values],
                name=curve.name,
                mode="lines+markers",
                error_y=_error_bars(curve.values, curve.color) if spread == "bars" else None,
                line={"color": curve.color, "width": curve.width, "dash": curve.dash},
                marker={"symbol": curve.symbol, "size": 3 * curve.width, "color": curve.color},
                customdata=[told(value) for value in curve.values],
                hovertemplate=f"{curve.name}, {x} %{{x}}<br>%{{customdata}}<extra></extra>",
            )
        )
    axis: dict[str, Any] = {"title": {"text": x}, "rangemode": "tozero"}
    if even:
        places = [f"{value:g}" for value in sorted({value for curve in found for value in curve.x})]
        axis |= {"type": "category", "showgrid": False, "categoryorder": "array", "categoryarray": places}
    margin = {} if legend else {"margin": _margin(60, 50)}
    return _figure([*bands, *lines], height, **{"xaxis": axis, "yaxis": _SCORE, **margin, **layout})


@dataclass(frozen=True)
class Point:
    """A model after an attack.

    Attributes:
        name: Under the pointer.
        group: What it shares its colour with.
        color: CSS value.
        symbol: Of its marker.
        accuracy: Fine-tune accuracy in percent.
        score: Harmful score in percent.
        size: Of its marker.
    """

    name: str
    group: str
    color: str
    symbol: str
    accuracy: Figure
    score: Figure
    size: float = 11


def trade_off(
    points: Sequence[Point],
    groups: Sequence[str],
    legend: Mapping[str, tuple[str, str]],
    *,
    thickness: float = 1.2,
    **layout: Any,
) -> Spec:
    """Harmful score over fine-tune accuracy, with intervals.

    Args:
        points: The models.
        groups: Of the points, those in front last.
        legend: Name -> marker and colour.
        thickness: Of the intervals.
        **layout: Of plotly, over what is usual.
    """
    traces = []
    for group in groups:
        own = [point for point in points if point.group == group]
        color = own[0].color if own else _SOFT
        traces.append(
            go.Scatter(
                x=[point.accuracy.mean for point in own],
                y=[point.score.mean for point in own],
                mode="markers",
                showlegend=False,
                error_x=_error_bars([point.accuracy for point in own], color, thickness),
                error_y=_error_bars([point.score for point in own], color, thickness),
                marker={
                    "color": color,
                    "size": [point.size for point in own],
                    "symbol": [point.symbol for point in own],
                    "line": {"color": _CARD, "width": 1},
                },
                customdata=[[point.name, told(point.score), told(point.accuracy)] for point in own],
                hovertemplate="%{customdata[0]}<br>harmful score %{customdata[1]}<br>accuracy %{customdata[2]}"
                "<extra></extra>",
            )
        )
    nothing = {"x": [None], "y": [None], "mode": "markers", "hoverinfo": "skip"}
    traces += [
        go.Scatter(**nothing, name=name, marker={"symbol": symbol, "size": 10, "color": color})
        for name, (symbol, color) in legend.items()
    ]
    x, y = (span([getattr(point, name) for point in points]) for name in ("accuracy", "score"))
    return _figure(
        traces,
        480,
        xaxis={"title": {"text": "fine-tune accuracy, % (more is better)"}, "range": x},
        yaxis={"title": {"text": "harmful score, % (less is better)"}, "range": y},
        **layout,
    )


def span(values: Sequence[Figure]) -> list[float]:
    """Of an axis of rates: all means, and of their intervals what is possible."""
    ends = [end for value in values for end in (value.mean, value.low, value.high) if end is not None]
    low, high = (float(np.clip(end, 0, 100)) for end in (min(ends, default=0), max(ends, default=100)))
    pad = max(1.5, 0.06 * (high - low))
    return [low - pad, high + pad]


def bars(values: Mapping[str, Sequence[float]], unit: str) -> Spec:
    """One bar per arm, its mean, with a point per seed.

    Args:
        values: Arm -> value per seed.
        unit: Shown behind numbers; an axis of percent ends at 100.
    """
    arms = list(values)[::-1]
    titles = [words.arm(arm).title for arm in arms]
    means = [float(np.mean(values[arm])) for arm in arms]
    top = max(1e-9, *(max(own) for own in values.values()))
    traces = [
        go.Bar(
            y=titles,
            x=means,
            orientation="h",
            width=0.5,
            marker={"color": [words.arm(arm).css for arm in arms], "line": {"width": 0}},
            hovertemplate=f"%{{y}}: mean %{{x:.1f}} {unit}<extra></extra>",
            showlegend=False,
        ),
        go.Scatter(
            y=[title for title, arm in zip(titles, arms, strict=True) for _ in values[arm]],
            x=[value for arm in arms for value in values[arm]],
            mode="markers",
            showlegend=False,
            marker={"color": _CARD, "size": 7, "line": {"color": _INK, "width": 1.5}},
            hovertemplate=f"%{{y}}: one seed, %{{x:.1f}} {unit}<extra></extra>",
        ),
    ]
    note = {"showarrow": False, "xanchor": "left", "xshift": 10, "font": {"color": _INK, "size": 13}}
    percent = unit == "%"
    return _figure(
        traces,
        200,
        margin=_margin(110, 32),
        annotations=[
            {"x": max([mean, *values[arm]]), "y": title, "text": f"{mean:.1f} {unit}", **note}
            for title, arm, mean in zip(titles, arms, means, strict=True)
        ],
        xaxis={
            "range": [0, 122 if percent else 1.28 * top],
            "tickvals": [0, 25, 50, 75, 100] if percent else None,
            "nticks": 5,
        },
        yaxis={"showgrid": False, "tickfont": {"color": _INK}},
    )


def cost(
    names: tuple[Sequence[str], Sequence[str]], colors: Sequence[str], parts: Mapping[str, Sequence[Figure | None]]
) -> Spec:
    """Bars of seconds, made up of parts; the first is hatched.

    Args:
        names: Two levels of them, from below.
        colors: One per bar.
        parts: Title -> seconds per bar.
    """
    traces = [
        go.Bar(
            y=list(names),
            x=[0 if value is None else value.mean for value in values],
            orientation="h",
            showlegend=False,
            marker={
                "color": list(colors),
                "line": {"width": 0},
                "pattern": {"shape": "" if at else "/", "fgcolor": _CARD, "size": 6, "solidity": 0.5},
            },
            customdata=["" if value is None else told(value, "s") for value in values],
            hovertemplate=f"%{{y}}<br>{title} %{{customdata}}<extra></extra>",
        )
        for at, (title, values) in enumerate(parts.items())
    ]
    return _figure(
        traces,
        90 + 24 * len(colors),
        barmode="stack",
        bargap=0.25,
        margin=_margin(150, 48),
        xaxis={"title": {"text": "seconds"}, "rangemode": "tozero"},
        yaxis={"showgrid": False, "tickfont": {"color": _INK, "size": 12}, "dividercolor": _LINE, "automargin": True},
    )
