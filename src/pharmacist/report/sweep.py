"""The page of a sweep: every attack by what it does to safety and to the task, and the worst one step by step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pharmacist.core.files import read_json
from pharmacist.report import charts
from pharmacist.report.html import write_page
from pharmacist.report.numbers import Figure


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


def trade_off(summary: Mapping[str, Any]) -> charts.Spec:
    """Every attack by fine-tune accuracy and harmful score, with intervals and the margin."""
    points = []
    for attack in summary["attacks"]:
        accuracy, score = (Figure.of(attack.get(name)) for name in ("fine_tune_accuracy", "harmful_score"))
        if accuracy is not None and score is not None:
            group = group_of(attack, summary)
            _, color, symbol, size = GROUPS[group]
            points.append(charts.Point(attack["name"], group, color, symbol, accuracy, score, size))
    found = [group for group in reversed(GROUPS) if any(point.group == group for point in points)]
    legend = {title: (symbol, color) for name, (title, color, symbol, _) in GROUPS.items() if name in found}
    best = summary["best_accuracy"]
    margin = [] if best is None else charts.dashed(best - summary["margin"])
    return charts.trade_off(points, found, legend, thickness=1, shapes=margin)


def curves(summary: Mapping[str, Any]) -> charts.Spec:
    """Harmful score over the steps of an attack, with intervals; the worst case stands out."""
    found = []
    for name, curve in summary["curves"].items():
        worst = name == summary["worst"]
        values = [value for metric in curve["harmful_score"] if (value := Figure.of(metric)) is not None]
        color = GROUPS["worst" if worst else "kept"][1]
        found.append(charts.Curve(name, color, curve["steps"], values, width=3 if worst else 1.5))
    return charts.curves(found, "attack steps", spread="bars", height=430, even=False)


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
