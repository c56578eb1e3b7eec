"""Figures of a page. Colours are CSS custom properties that the browser resolves, so that charts follow the theme."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pharmacist.report import words


Spec = dict[str, Any]

_INK, _SOFT, _LINE, _CLEAR = "var(--ink)", "var(--soft)", "var(--line)", "rgba(0,0,0,0)"
_MARKS = {"full": ("square", "dash"), "random": ("diamond", "dot"), "core": ("circle", "solid")}
_BINS = 60


def _figure(traces: Sequence[Any], height: int, **layout: Any) -> Spec:
    figure = go.Figure(list(traces), layout=go.Layout(template="none", height=height))
    figure.update_layout(
        autosize=True,
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        margin={"l": 64, "r": 24, "t": 44, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        hovermode="closest",
        hoverlabel={"bgcolor": "var(--card)", "bordercolor": _LINE, "font": {"color": _INK}},
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


def score_histogram(scores: pd.DataFrame, cut: Mapping[str, Any] | None, judged: bool) -> Spec:
    """Rows per score, stacked by reason, with the cut."""
    values = scores["score"].to_numpy()
    edges = np.histogram_bin_edges(values, bins=min(_BINS, max(1, len(values))))
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    ranges = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    traces = []
    for name, word in _groups(scores["reason"], judged):
        counts = np.histogram(values[(scores["reason"].astype(str) == name).to_numpy()], edges)[0]
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
        at = cut["score"]
        extra["shapes"] = [
            {
                "type": "line",
                "x0": at,
                "x1": at,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": _INK, "width": 1.5, "dash": "dash"},
            }
        ]
        extra["annotations"] = [
            {
                "x": at,
                "y": 1,
                "yref": "paper",
                "text": "selected →",
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "top",
                "xshift": 6,
                "font": {"color": _INK, "size": 12},
                "bgcolor": "var(--card)",
            }
        ]
    return _figure(
        traces,
        340,
        barmode="stack",
        bargap=0.05,
        showlegend=False,
        margin={"l": 64, "r": 24, "t": 16, "b": 56},
        xaxis={"title": {"text": "score (higher = keep)"}, "showgrid": False},
        yaxis={"title": {"text": "rows"}},
        **extra,
    )


def _groups(reasons: "pd.Series[Any]", judged: bool) -> list[tuple[str, words.Word]]:
    present = reasons.astype(str).unique().tolist()
    known = [name for name in words.REASONS if name in present]
    return [(name, words.reason(name, judged)) for name in known + sorted(set(present) - set(known))]


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
                marker={"color": word.css, "line": {"color": "var(--card)", "width": 1}},
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
        margin={"l": 76, "r": 24, "t": 8, "b": 32},
        showlegend=False,
        xaxis={"range": [0, 100], "ticksuffix": " %", "showgrid": False},
        yaxis={"showgrid": False, "tickfont": {"color": _INK}},
    )


def kept(categories: Sequence[Mapping[str, Any]], overall: float) -> Spec:
    """Share of each category that is selected, in percent, beside that of the pool."""
    groups = list(categories)[::-1]
    titles = [_short(words.category(group["name"])) for group in groups]
    trace = go.Bar(
        y=list(range(len(groups))),
        x=[group["kept"] for group in groups],
        orientation="h",
        marker={"color": "var(--accent)", "line": {"width": 0}},
        customdata=[[words.category(group["name"]), group["selected"], group["rows"]] for group in groups],
        hovertemplate="%{customdata[0]}: %{x:.1f} %, %{customdata[1]} of %{customdata[2]} rows<extra></extra>",
        showlegend=False,
    )
    line = {
        "type": "line",
        "x0": overall,
        "x1": overall,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": _INK, "width": 1.5, "dash": "dash"},
    }
    highest = max(overall, *(group["kept"] for group in groups))
    return _figure(
        [trace],
        70 + 26 * len(groups),
        bargap=0.35,
        margin={"l": 76, "r": 24, "t": 8, "b": 40},
        shapes=[line],
        xaxis={"range": [0, min(100.0, 1.1 * highest)], "ticksuffix": " %", "rangemode": "tozero"},
        yaxis={
            "showgrid": False,
            "tickvals": list(range(len(groups))),
            "ticktext": titles,
            "tickfont": {"color": _INK},
        },
    )


def _short(text: str, limit: int = 32) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def attack_curves(steps: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]]) -> Spec:
    """Harmful score in percent over attack steps: the mean over seeds, and the range of the seeds as a band.

    Args:
        steps: At which models were measured.
        curves: Arm -> seed -> score at each step.
    """
    bands, lines = [], []
    # Steps about double from point to point; evenly spaced they leave the beginning of the attack legible.
    ticks = [str(step) for step in steps]
    for arm, seeds in curves.items():
        word, values = words.arm(arm), np.asarray(seeds, dtype=np.float64)
        symbol, dash = _MARKS.get(arm, ("circle", "solid"))
        low, high = values.min(0).tolist(), values.max(0).tolist()
        if len(values) > 1:
            bands.append(
                go.Scatter(
                    x=ticks + ticks[::-1],
                    y=high + low[::-1],
                    fill="toself",
                    fillcolor=word.css,
                    opacity=0.16,
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=arm,
                    mode="lines",
                )
            )
        lines.append(
            go.Scatter(
                x=ticks,
                y=values.mean(0).tolist(),
                name=word.title,
                mode="lines+markers",
                legendgroup=arm,
                line={"color": word.css, "width": 3, "dash": dash},
                marker={"symbol": symbol, "size": 9, "color": word.css},
                customdata=[f"{a:.1f} to {b:.1f}" for a, b in zip(low, high, strict=True)],
                hovertemplate=f"{word.title}, step %{{x}}<br>%{{y:.1f}} %, seeds %{{customdata}}<extra></extra>",
            )
        )
    return _figure(
        [*bands, *lines],
        430,
        xaxis={"title": {"text": "attack steps"}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "harmful score, %"}, "range": [-3, 103]},
    )


def bars(values: Mapping[str, Sequence[float]], unit: str, percent: bool) -> Spec:
    """One bar per arm, its mean, with a point per seed.

    Args:
        values: Arm -> value per seed.
        unit: Shown behind numbers.
        percent: The axis ends at 100.
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
            marker={"color": "var(--card)", "size": 7, "line": {"color": _INK, "width": 1.5}},
            hovertemplate=f"%{{y}}: one seed, %{{x:.1f}} {unit}<extra></extra>",
        ),
    ]
    annotations = [
        {
            "x": max([mean, *values[arm]]),
            "y": title,
            "text": f"{mean:.1f} {unit}",
            "showarrow": False,
            "xanchor": "left",
            "xshift": 10,
            "font": {"color": _INK, "size": 13},
        }
        for title, arm, mean in zip(titles, arms, means, strict=True)
    ]
    return _figure(
        traces,
        200,
        margin={"l": 110, "r": 20, "t": 8, "b": 32},
        annotations=annotations,
        xaxis={
            "range": [0, 122 if percent else 1.28 * top],
            "tickvals": [0, 25, 50, 75, 100] if percent else None,
            "nticks": 5,
        },
        yaxis={"showgrid": False, "tickfont": {"color": _INK}},
    )
