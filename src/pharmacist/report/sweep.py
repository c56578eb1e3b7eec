"""Presentation of a sweep: its findings in sentences, a table of all attacks, and the page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pharmacist.core.console import markdown as escaped
from pharmacist.core.files import read_json
from pharmacist.report import charts
from pharmacist.report.html import write_page
from pharmacist.report.numbers import SHOWN_METRICS, Figure, rate_text


GROUPS = {
    "worst": ("Worst case", "worst case", "var(--compliance)", "star", 15),
    "kept": ("Within the margin", "", "var(--core)", "circle", 9),
    "lost": ("Below the margin", "below margin", "var(--other)", "x", 8),
}
"""Group of attacks -> title, remark in the table, colour, marker and its size."""
_SETTINGS = {"learning_rate": "lr", "poison_ratio": "poison ratio"}
"""Names of settings in the head of the table, where they are others."""


def ordered(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attacks with their ``group``: the worst case first, then those within the margin, then the others; in each group
    by descending harmful score.
    """

    def order(attack: Mapping[str, Any]) -> tuple[int, float]:
        figure = Figure.of(attack.get("harmful_score"))
        return list(GROUPS).index(attack["group"]), 1.0 if figure is None else -figure.mean

    attacks = []
    for attack in summary["attacks"]:
        group = "worst" if attack["name"] == summary["worst"] else "kept" if attack["within_margin"] else "lost"
        attacks.append(attack | {"group": group})
    return sorted(attacks, key=order)


def sentences(summary: Mapping[str, Any]) -> Iterator[str]:
    """The findings of a sweep, a sentence each."""
    judge, attacks = summary["before"]["harmful_score"].get("judge", ""), summary["attacks"]
    worst = next((attack for attack in attacks if attack["name"] == summary["worst"]), None)
    yield f"before any attack: harmful score {rate_text(summary['before']['harmful_score'])} %, judge {judge}"
    if worst is None:
        yield "no worst case: no attack gave both a harmful score and a fine-tune accuracy"
        return
    yield (
        f"worst case: {worst['name']}, harmful score {rate_text(worst['harmful_score'])} %, fine-tune accuracy "
        f"{rate_text(worst['fine_tune_accuracy'])} %; the best accuracy of {len(attacks)} attacks is "
        f"{summary['best_accuracy']:.1f} %, so those at or above "
        f"{summary['best_accuracy'] - summary['margin']:.1f} % count"
    )
    if summary["worst_ci95_of_all"]:
        of_all = Figure(worst["harmful_score"]["value"], *summary["worst_ci95_of_all"])
        yield (
            "it is the highest of many, partly by chance; the interval that holds for all attacks at once is "
            f"{of_all.interval()}"
        )
    if summary["highest_of_all"] > worst["harmful_score"]["value"]:
        yield f"beyond the margin, where the task suffers, the score reaches {summary['highest_of_all']:.1f} %"
    for name, curve in summary["curves"].items():
        levels = "; ".join(reached_in_words(reached, curve["steps"][-1]) for reached in curve["reached"])
        yield f"steps of {name} until the harmful score is at a level: {levels}"


def reached_in_words(reached: Mapping[str, Any], last: int) -> str:
    """The two measured steps between which a harmful score was first reached, as far as it was."""
    level = f"{reached['level']:.0f} %"
    if reached["step"] is None:
        return f"{level} not reached in {last} steps"
    if reached["after"] is None:
        return f"{level} by step {reached['step']} already"
    return f"{level} between steps {reached['after']} and {reached['step']}"


def attack_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of attacks, with the settings that differ between them."""
    attacks, rates = ordered(summary), ("harmful_score", "fine_tune_accuracy")
    settings = [attack["settings"] | {"steps": attack.get("steps")} for attack in attacks]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    varied = [name for name in names if len({setting.get(name) for setting in settings}) > 1] or ["steps"]
    head = [
        *(_SETTINGS.get(name, name) for name in varied),
        *(SHOWN_METRICS[name].title.lower() for name in rates),
        "",
    ]
    lines = [
        [
            *("-" if setting.get(name) is None else f"{setting[name]}" for name in varied),
            *(rate_text(attack.get(name)) for name in rates),
            "diverged" if "failed" in attack else GROUPS[attack["group"]][1],
        ]
        for setting, attack in zip(settings, attacks, strict=True)
    ]
    return head, lines


def markdown(summary: Mapping[str, Any]) -> str:
    """Findings and table of all attacks in Markdown."""
    head, lines = attack_table(summary)
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])
    found = "\n".join(f"- {escaped(line)}" for line in sentences(summary))
    return f"# Attack sweep\n\n{found}\n\n{table}\n\nIn %, with 95 % intervals (Wilson) over prompts.\n"


def trade_off(summary: Mapping[str, Any]) -> charts.Spec:
    """Chart of harmful score over fine-tune accuracy, a point per attack, with intervals and the margin."""
    points = []
    for attack in ordered(summary):
        accuracy, score = (Figure.of(attack.get(name)) for name in ("fine_tune_accuracy", "harmful_score"))
        if accuracy is not None and score is not None:
            _, _, color, symbol, size = GROUPS[attack["group"]]
            points.append(charts.Point(attack["name"], attack["group"], color, symbol, accuracy, score, size))
    groups = [group for group in reversed(GROUPS) if any(point.group == group for point in points)]
    legend = {title: (symbol, color) for name, (title, _, color, symbol, _) in GROUPS.items() if name in groups}
    best = summary["best_accuracy"]
    margin = [] if best is None else charts.dashed(best - summary["margin"])
    return charts.trade_off(points, groups, legend, thickness=1, shapes=margin)


def curves(summary: Mapping[str, Any]) -> charts.Spec:
    """Chart of harmful score over the steps of attacks, with intervals; the worst case is thicker."""
    lines = []
    for name, curve in summary["curves"].items():
        worst = name == summary["worst"]
        values = [value for metric in curve["harmful_score"] if (value := Figure.of(metric)) is not None]
        color = GROUPS["worst" if worst else "kept"][2]
        lines.append(charts.Curve(name, color, curve["steps"], values, width=3 if worst else 1.5))
    return charts.curves(lines, "attack steps", spread="bars", height=430, even=False)


def render_sweep(folder: Path, *, manifest: Mapping[str, Any]) -> None:
    """Writes ``report.html`` into the folder of a sweep, from its ``sweep.json`` and manifest."""
    summary = read_json(folder / "sweep.json")
    attacks = ordered(summary)
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
