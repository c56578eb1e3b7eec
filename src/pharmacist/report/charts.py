"""Charts of a page. Colours are CSS custom properties that the browser resolves, so that charts follow the theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pharmacist.core.console import plain
from pharmacist.core.mappings import merged
from pharmacist.report import words
from pharmacist.report.numbers import Figure


Spec = dict[str, Any]

_INK, _SOFT, _LINE, _CARD, _CLEAR = "var(--ink)", "var(--soft)", "var(--line)", "var(--card)", "rgba(0,0,0,0)"
_BINS = 60
_SCORE = {"title": {"text": "harmful score, %"}, "range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]}
_NAMES = {"showgrid": False, "tickfont": {"color": _INK}}
"""An axis of names."""


def _text(name: str) -> str:
    """A name that plotly shows as it is, whose labels are partly HTML, TeX between dollars, and templates."""
    return escape(plain(name), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def _figure(traces: Sequence[Any], height: int, **layout: Any) -> Spec:
    axis = {
        "gridcolor": _LINE,
        "linecolor": _LINE,
        "zeroline": False,
        "tickcolor": _LINE,
        "automargin": True,
        "tickfont": {"color": _SOFT},
        "title": {"font": {"color": _SOFT, "size": 13}, "standoff": 12},
    }
    usual = {
        "template": "none",
        "height": height,
        "autosize": True,
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "margin": {"l": 64, "r": 24, "t": 44, "b": 56},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": _CARD, "bordercolor": _LINE, "font": {"color": _INK}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": _INK}},
        "xaxis": axis,
        "yaxis": axis,
    }
    spec: Spec = go.Figure(list(traces), merged(usual, layout)).to_plotly_json()
    return spec


def _bar(names: Any, values: Sequence[float | None], color: Any, hover: str, **more: Any) -> go.Bar:
    """Horizontal bars; `more` has options of plotly."""
    marker = {"color": color, "line": {"width": 0}, **more.pop("marker", {})}
    return go.Bar(y=names, x=values, orientation="h", marker=marker, hovertemplate=f"{hover}</extra>", **more)


def _bar_figure(traces: Sequence[Any], height: int, left: int, bottom: int, **layout: Any) -> Spec:
    """A chart without a legend, with room for names on its left."""
    return _figure(traces, height, showlegend=False, margin={"l": left, "r": 24, "t": 12, "b": bottom}, **layout)


def dashed(at: float, axis: Literal["x", "y"] = "x", color: str = _INK) -> list[dict[str, Any]]:
    """A dashed line across the whole chart, at one value of an axis."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return [{"type": "line", **ends, "line": {"color": color, "width": 1.5, "dash": "dash"}}]


def _error_bars(values: Sequence[Figure], color: str, thickness: float = 1.2) -> dict[str, Any]:
    """Error bars of the intervals; of length 0 for a value without one."""
    return {
        "type": "data",
        "symmetric": False,
        "color": color,
        "thickness": thickness,
        "width": 0,
        "array": [0 if value.high is None else value.high - value.mean for value in values],
        "arrayminus": [0 if value.low is None else value.mean - value.low for value in values],
    }


def _hover(value: Figure, unit: str = "%", digits: int = 1) -> str:
    """Text of a figure under the pointer."""
    return value.text(f" {unit}", digits=digits, ends="({} to {})")


# --- rankings -------------------------------------------------------------------------------------------------------


def score_histogram(scores: pd.DataFrame, cut: Mapping[str, Any] | None) -> Spec:
    """Rows per score, stacked by reason, with the cut."""
    values, reasons = scores["score"].to_numpy(), scores["reason"].astype(str)
    edges = np.histogram_bin_edges(values, bins=min(_BINS, max(1, len(values))))
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    ranges = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    traces = []
    for name, word in words.REASONS.of(reasons).items():
        title, counts = _text(word.title), np.histogram(values[(reasons == name).to_numpy()], edges)[0]
        traces.append(
            go.Bar(
                x=middle,
                y=counts.tolist(),
                name=title,
                width=float(edges[1] - edges[0]),
                customdata=ranges,
                marker={"color": word.css, "line": {"width": 0}},
                hovertemplate=f"{title}<br>score %{{customdata}}<br>%{{y}} rows<extra></extra>",
            )
        )
    extra: dict[str, Any] = {}
    if cut is not None:
        note = {"text": "selected →", "showarrow": False, "font": {"color": _INK, "size": 12}, "bgcolor": _CARD}
        note |= {"x": cut["score"], "xanchor": "left", "xshift": 6, "y": 1, "yref": "paper", "yanchor": "top"}
        extra = {"shapes": dashed(cut["score"]), "annotations": [note]}
    x = {"title": {"text": "score (higher = keep)"}, "showgrid": False}
    y = {"title": {"text": "rows"}}
    return _bar_figure(traces, 340, 64, 56, barmode="stack", bargap=0.05, xaxis=x, yaxis=y, **extra)


def composition(groups: Sequence[Mapping[str, Any]]) -> Spec:
    """Two bars, the selected rows and the others, divided by reason or label; in percent."""
    traces = []
    for group in groups:
        word, shares = group["word"], [group["of_left"], group["of_selected"]]
        title = _text(word.title)
        traces.append(
            _bar(
                ["Left out", "Selected"],
                shares,
                word.css,
                f"{title}: %{{x:.1f}} % (%{{customdata}} rows)<extra>%{{y}}",
                name=title,
                customdata=[group["left"], group["selected"]],
                marker={"line": {"color": _CARD, "width": 1}},
                text=[f"{share:.0f} %" if share is not None and share >= 5 else "" for share in shares],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": f"var(--on{word.color[1:]}, var(--on-color))"},
            )
        )
    x = {"range": [0, 100], "ticksuffix": " %", "showgrid": False}
    readable = {"minsize": 10, "mode": "hide"}  # shares for which a segment has no room are told under the pointer
    return _bar_figure(traces, 160, 76, 32, barmode="stack", bargap=0.28, xaxis=x, yaxis=_NAMES, uniformtext=readable)


def kept(categories: Sequence[Mapping[str, Any]], overall: float) -> Spec:
    """Selected share of each category in percent, and that of the pool."""
    groups = list(categories)[::-1]
    positions, shares = list(range(len(groups))), [group["kept"] for group in groups]
    titles = [group["title"] if len(group["title"]) <= 32 else group["title"][:31] + "…" for group in groups]
    trace = _bar(
        positions,
        shares,
        "var(--accent)",
        "%{customdata[0]}: %{x:.1f} %, %{customdata[1]} of %{customdata[2]} rows<extra>",
        customdata=[[_text(group["title"]), group["selected"], group["rows"]] for group in groups],
    )
    x = {"range": [0, min(100.0, 1.1 * max(overall, *shares) or 100.0)], "ticksuffix": " %", "rangemode": "tozero"}
    y = {**_NAMES, "tickvals": positions, "ticktext": [_text(title) for title in titles]}
    height = 70 + 26 * len(groups)
    return _bar_figure([trace], height, 76, 40, bargap=0.35, shapes=dashed(overall), xaxis=x, yaxis=y)


# --- models under attack --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line of a chart: values with intervals, or the range of the seeds, at the measured points."""

    name: str
    color: str
    x: Sequence[float]
    values: Sequence[Figure]
    dash: str = "solid"
    symbol: str = "circle"
    width: float = 2.5


def over_seeds(seeds: Sequence[Sequence[float]]) -> list[Figure]:
    """Means over seeds at each step, with the least and the greatest value where there are several seeds."""
    heights = np.asarray(seeds, dtype=np.float64)
    if len(heights) == 1:
        return [Figure(mean) for mean in heights[0].tolist()]
    return [Figure(*ends) for ends in np.stack([heights.mean(0), heights.min(0), heights.max(0)], axis=1).tolist()]


def curves(
    found: Sequence[Curve],
    x: str,
    *,
    spread: Literal["band", "bars", "none"],
    margins: tuple[float, float] | None = None,
    height: int = 320,
    legend: bool = False,
    even: bool = True,
    **layout: Any,
) -> Spec:
    """Harmful score in percent, or loss margin in nats, over `x`, the title of the axis.

    Intervals are drawn as `spread` says. `margins` is the range of the axis where values are loss margins. `even`
    spaces the points evenly: attack steps about double from one to the next, so that the beginning of an attack stays
    legible. `layout` holds options of plotly.
    """
    bands, lines = [], []
    for curve in found:
        ticks = [f"{value:g}" for value in curve.x] if even else list(curve.x)
        name = _text(curve.name)
        common = {"legendgroup": name, "x": ticks, "showlegend": legend}
        low, high = ([getattr(value, end) for value in curve.values] for end in ("low", "high"))
        if spread == "band" and None not in low:
            look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": curve.color, "opacity": 0.15}
            area = {"x": ticks + ticks[::-1], "y": high + low[::-1], "hoverinfo": "skip", "showlegend": False}
            bands.append(go.Scatter(**common | look | area))
        lines.append(
            go.Scatter(
                **common,
                y=[value.mean for value in curve.values],
                name=name,
                mode="lines+markers",
                error_y=_error_bars(curve.values, curve.color) if spread == "bars" else None,
                line={"color": curve.color, "width": curve.width, "dash": curve.dash},
                marker={"symbol": curve.symbol, "size": 3 * curve.width, "color": curve.color},
                customdata=[_hover(value, "nats", 3) if margins else _hover(value) for value in curve.values],
                hovertemplate=f"{name}, {x} %{{x}}<br>%{{customdata}}<extra></extra>",
            )
        )
    axis: dict[str, Any] = {"title": {"text": x}, "rangemode": "tozero"}
    if even:
        steps = [f"{value:g}" for value in sorted({value for curve in found for value in curve.x})]
        axis |= {"type": "category", "showgrid": False, "categoryorder": "array", "categoryarray": steps}
    room = {} if legend else {"margin": {"l": 60, "r": 24, "t": 12, "b": 50}}
    y = {"title": {"text": "loss margin, nats"}, "range": margins} if margins else _SCORE
    return _figure([*bands, *lines], height, **{"xaxis": axis, "yaxis": y, **room, **layout})


@dataclass(frozen=True)
class Point:
    """A model after an attack: fine-tune accuracy and harmful score in percent; points of a group share a colour."""

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
    thickness: float,
    **layout: Any,
) -> Spec:
    """Harmful score over fine-tune accuracy, with intervals that are `thickness` pixels thick.

    The last of the groups of points is in front. `legend` maps a name to marker and colour; `layout` holds options of
    plotly.
    """
    traces = []
    for group in groups:
        members = [point for point in points if point.group == group]
        color = members[0].color if members else _SOFT
        sizes, symbols = [point.size for point in members], [point.symbol for point in members]
        traces.append(
            go.Scatter(
                x=[point.accuracy.mean for point in members],
                y=[point.score.mean for point in members],
                mode="markers",
                showlegend=False,
                error_x=_error_bars([point.accuracy for point in members], color, thickness),
                error_y=_error_bars([point.score for point in members], color, thickness),
                marker={"color": color, "size": sizes, "symbol": symbols, "line": {"color": _CARD, "width": 1}},
                customdata=[[_text(point.name), _hover(point.score), _hover(point.accuracy)] for point in members],
                hovertemplate="%{customdata[0]}<br>harmful score %{customdata[1]}<br>accuracy %{customdata[2]}"
                "<extra></extra>",
            )
        )
    nothing = {"x": [None], "y": [None], "mode": "markers", "hoverinfo": "skip"}
    traces += [
        go.Scatter(**nothing, name=_text(name), marker={"symbol": symbol, "size": 10, "color": color})
        for name, (symbol, color) in legend.items()
    ]
    x = {"title": {"text": "fine-tune accuracy, % (higher is better)"}, "range": _span([it.accuracy for it in points])}
    y = {"title": {"text": "harmful score, % (lower is better)"}, "range": _span([it.score for it in points])}
    return _figure(traces, 480, xaxis=x, yaxis=y, **layout)


def _span(values: Sequence[Figure]) -> list[float]:
    """Range of an axis of rates, at least 20 points: all means, and the parts of their intervals within 0 and 100."""
    ends = [end for value in values for end in (value.mean, value.low, value.high) if end is not None]
    low, high = (float(np.clip(end, 0, 100)) for end in (min(ends, default=0), max(ends, default=100)))
    high = max(high, min(low + 20, 100))
    low = min(low, high - 20)
    pad = max(1.5, 0.06 * (high - low))
    return [low - pad, high + pad]


def bars(values: Mapping[str, Sequence[float]], unit: str) -> Spec:
    """A bar for the mean of each arm, and a point per seed; an axis of percent ends at 100."""
    arms = [(words.ARMS[arm], seeds, float(np.mean(seeds))) for arm, seeds in list(values.items())[::-1]]
    bar = _bar(
        [word.title for word, _, _ in arms],
        [mean for _, _, mean in arms],
        [word.css for word, _, _ in arms],
        f"%{{y}}: mean %{{x:.1f}} {unit}<extra>",
        width=0.5,
    )
    points = go.Scatter(
        y=[word.title for word, seeds, _ in arms for _ in seeds],
        x=[value for _, seeds, _ in arms for value in seeds],
        mode="markers",
        marker={"color": _CARD, "size": 7, "line": {"color": _INK, "width": 1.5}},
        hovertemplate=f"%{{y}}: one seed, %{{x:.1f}} {unit}<extra></extra>",
    )
    note = {"showarrow": False, "xanchor": "left", "xshift": 10, "font": {"color": _INK, "size": 13}}
    notes = [
        {"x": max([mean, *seeds]), "y": word.title, "text": f"{mean:.1f} {unit}", **note} for word, seeds, mean in arms
    ]
    top = max(1e-9, *(max(seeds) for seeds in values.values()))
    scale = {"range": [0, 130], "tickvals": [0, 25, 50, 75, 100]} if unit == "%" else {"range": [0, 1.28 * top]}
    return _bar_figure([bar, points], 200, 110, 32, annotations=notes, xaxis={"nticks": 5, **scale}, yaxis=_NAMES)


def cost(
    names: tuple[Sequence[str], Sequence[str]], colors: Sequence[str], parts: Mapping[str, Sequence[Figure | None]]
) -> Spec:
    """Stacked bars of seconds with names on two levels; the first of the parts is hatched."""
    traces = [
        _bar(
            [[_text(name) for name in level] for level in names],
            [0 if value is None else value.mean for value in values],
            list(colors),
            f"%{{y}}<br>{title} %{{customdata}}<extra>",
            marker={"pattern": {"shape": "" if at else "/", "fgcolor": _CARD, "size": 6, "solidity": 0.5}},
            customdata=["" if value is None else _hover(value, "s") for value in values],
        )
        for at, (title, values) in enumerate(parts.items())
    ]
    x = {"title": {"text": "seconds"}, "rangemode": "tozero", "nticks": 4}
    y = {"showgrid": False, "tickfont": {"color": _INK, "size": 12}, "dividercolor": _LINE, "automargin": True}
    return _bar_figure(traces, 90 + 24 * len(colors), 150, 48, barmode="stack", bargap=0.25, xaxis=x, yaxis=y)
