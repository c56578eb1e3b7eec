"""The page of a sweep: every attack by what it does to safety and to the task, and the worst one step by step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from pharmacist.core.files import read_json
from pharmacist.report import charts
from pharmacist.report.html import write_page


GROUPS = {
    "worst": ("Worst case", "var(--compliance)", "star", 15),
    "kept": ("Within the margin", "var(--core)", "circle", 9),
    "lost": ("Below the margin", "var(--other)", "x", 8),
}
"""Group of attacks -> title, colour, marker and its size."""


def group_of(attack: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Which of `GROUPS` an attack belongs to."""
    if attack["name"] == summary["worst"]:
        return "worst"
    return "kept" if attack["within_margin"] else "lost"


def measured(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The attacks that have both figures."""
    return [
        attack
        for attack in summary["attacks"]
        if all((attack.get(name) or {}).get("value") is not None for name in ("harmful_score", "fine_tune_accuracy"))
    ]


def trade_off(summary: Mapping[str, Any]) -> charts.Spec:
    """Every attack by fine-tune accuracy and harmful score, with intervals and the margin."""
    traces, found = [], measured(summary)
    for group, (title, color, symbol, size) in reversed(GROUPS.items()):
        members = [attack for attack in found if group_of(attack, summary) == group]
        if not members:
            continue
        x, y = ([attack[name] for attack in members] for name in ("fine_tune_accuracy", "harmful_score"))
        traces.append(
            go.Scatter(
                x=[metric["value"] for metric in x],
                y=[metric["value"] for metric in y],
                mode="markers",
                name=title,
                error_x=_bars(x, color),
                error_y=_bars(y, color),
                marker={"symbol": symbol, "size": size, "color": color, "line": {"color": "var(--card)", "width": 1}},
                customdata=[attack["name"] for attack in members],
                hovertemplate="%{customdata}<br>harmful score %{y:.1f} %<br>accuracy %{x:.1f} %<extra></extra>",
            )
        )
    extra: dict[str, Any] = {}
    if summary["best_accuracy"] is not None:
        at = summary["best_accuracy"] - summary["margin"]
        line = {"color": "var(--ink)", "width": 1.5, "dash": "dash"}
        extra["shapes"] = [{"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}]
    return charts._figure(
        traces,
        430,
        xaxis={"title": {"text": "fine-tune accuracy, %"}},
        yaxis={"title": {"text": "harmful score, %"}, "range": [-3, 103]},
        **extra,
    )


def _bars(metrics: list[Mapping[str, Any]], color: str) -> dict[str, Any]:
    """Intervals as error bars; where a metric has none its bar has no length."""
    ends = [metric["ci95"] or [metric["value"]] * 2 for metric in metrics]
    return {
        "type": "data",
        "symmetric": False,
        "color": color,
        "thickness": 1,
        "width": 0,
        "array": [high - metric["value"] for metric, (_, high) in zip(metrics, ends, strict=True)],
        "arrayminus": [metric["value"] - low for metric, (low, _) in zip(metrics, ends, strict=True)],
    }


def curves(summary: Mapping[str, Any]) -> charts.Spec:
    """Harmful score over the steps of an attack, with intervals; the worst case stands out."""
    traces = []
    for name, curve in summary["curves"].items():
        worst = name == summary["worst"]
        color = GROUPS["worst" if worst else "kept"][1]
        traces.append(
            go.Scatter(
                x=curve["steps"],
                y=[metric["value"] for metric in curve["harmful_score"]],
                mode="lines+markers",
                name=name,
                error_y=_bars(curve["harmful_score"], color),
                showlegend=False,
                opacity=1 if worst else 0.5,
                line={"color": color, "width": 3 if worst else 1.5},
                marker={"size": 9 if worst else 6, "color": color},
                hovertemplate=f"{name}, step %{{x}}<br>%{{y:.1f}} %<extra></extra>",
            )
        )
    return charts._figure(
        traces,
        430,
        xaxis={"title": {"text": "attack steps"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "harmful score, %"}, "range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]},
    )


def render_sweep(folder: Path, *, manifest: Mapping[str, Any]) -> None:
    """Writes ``report.html`` into a sweep's folder, out of its ``sweep.json``.

    Args:
        folder: Of the sweep.
        manifest: Content of its ``manifest.json``.
    """
    summary = read_json(folder / "sweep.json")
    attacks = [{**attack, "group": group_of(attack, summary)} for attack in summary["attacks"]]
    attacks.sort(
        key=lambda own: (list(GROUPS).index(own["group"]), -((own.get("harmful_score") or {}).get("value") or 0))
    )
    figures = {"trade_off": trade_off(summary)} | ({"curves": curves(summary)} if summary["curves"] else {})
    write_page(
        folder / "report.html",
        "sweep.html.j2",
        ["sweep.js"],
        {"figures": figures},
        sweep=summary,
        attacks=attacks,
        manifest=manifest,
        worst=next((attack for attack in attacks if attack["group"] == "worst"), None),
        titles=GROUPS,
    )
