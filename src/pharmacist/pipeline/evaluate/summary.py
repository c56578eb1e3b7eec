"""The summary that `evaluate` prints: metrics, remarks on them, and the first answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pharmacist.core.console import plain
from pharmacist.core.files import read_json_lines
from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import console, print_table, say
from pharmacist.evaluation.metrics import NAMES
from pharmacist.evaluation.text import missing
from pharmacist.pipeline.stages.evaluate import EvaluateOptions
from pharmacist.report.numbers import Figure


_MANY_ALARMS = 20  # percent
_SHOWN = 3
_SHOWN_CHARACTERS = 100


def summarise(metrics: Mapping[str, Any], folder: Path, options: EvaluateOptions) -> None:
    """Prints the result of one model; answers that are not judged harmless are hidden without ``--show-harmful``."""
    if options.quiet or console().quiet:
        return
    rows = [cells for name, metric in metrics.items() for cells in _lines(NAMES.get(name, name), metric)]
    head = ["metric", "%", "95 % interval", "count", "by"]
    lines = [*_remarks(metrics), *_examples(folder, options.show_harmful)]
    if template := read_manifest(folder).extra.get("template_origin"):
        lines.append(f"prompts are rendered by {template}")
    lines += [f"metrics {plain(folder)}/metrics.json", f"answers and verdicts {plain(folder)}/items.jsonl"]
    print_table(plain(options.model or options.answers), head, rows, text=(0, 4))
    say("\n".join(lines))


def _lines(name: str, metric: Mapping[str, Any]) -> list[tuple[str, ...]]:
    by = plain(metric.get("judge") or metric.get("matching") or metric.get("interval", ""))
    lines = [_line(name, metric, by)]
    if "base_perplexity" in metric:
        lines.append(("  perplexity, base model's", f"{metric['perplexity']:.3g}, {metric['base_perplexity']:.3g}"))
    published = metric.get("published")
    if published and published["count"] != metric["count"]:
        lines.append(_line(f"{name}, as often published", published, published["matching"]))
    if metric.get("without_form"):
        lines.append(("  neither label nor number", "", "", str(metric["without_form"])))
    if "kappa" in metric:
        lines.append(("  Cohen's kappa", "undefined" if metric["kappa"] is None else f"{metric['kappa']:.2f}"))
    if "outcomes" in metric:
        counts = " / ".join(str(metric["outcomes"][which]) for which in ("won", "tied", "lost"))
        lines.append(("  won / tied / lost", "", "", counts, f"against {plain(metric['against'])}"))
    if metric.get("unscored"):
        lines.append((f"  unscored by {by}", "", "", str(metric["unscored"]), "counted in no rate"))
    if metric.get("unanswered"):
        unanswered = str(metric["unanswered"])
        lines.append(
            ("  of them without an answer", "", "", unanswered)
            if metric.get("unscored")
            else ("  without an answer", "", "", unanswered, "counted in no rate")
        )
    return lines


def _line(name: str, metric: Mapping[str, Any], by: str) -> tuple[str, ...]:
    if (figure := Figure.of(metric)) is None:
        return name, "-", metric.get("no_ci95", "-"), count_of(metric), by
    digits = 3 if "unit" in metric else 1
    interval = figure.interval(digits=digits) or metric.get("no_ci95", "-")
    return name, f"{figure.mean:.{digits}f}", interval, count_of(metric), by


def count_of(metric: Mapping[str, Any]) -> str:
    """Count and number of outcomes as tables show them."""
    return f"{metric['count']} / {metric['n']}" if "count" in metric else str(metric["n"])


def _remarks(metrics: Mapping[str, Any]) -> list[str]:
    lines = []
    accuracy, alarms = metrics.get("fine_tune_accuracy", {}), metrics.get("benign_flagged_rate", {})
    if accuracy.get("n") and accuracy.get("without_form") == accuracy["n"]:
        labels = plain(", ".join(accuracy.get("labels", ())[:10]))
        known = f"one of the labels {labels}" if labels else "a number"
        lines.append(f"--task: no answer is {known}: are these the answers that the model was trained to give?")
    judged = metrics.get("harmful_score") or alarms
    if str(judged.get("judge")).startswith("keyword@"):
        lines.append(
            "judge keyword: every answer that does not begin like a refusal counts as harmful, whatever it says; "
            "--judge probe with --safe and --harmful references looks for compliance"
        )
    elif (alarms.get("value") or 0) > _MANY_ALARMS:
        share = f"{alarms['value']:.0f} % of the answers to benign prompts"
        lines.append(f"the judge flags {share}, so the harmful score is likely too high")
    return lines


def _examples(folder: Path, show_harmful: bool) -> list[str]:
    lines = ["first answers:"]
    for item in [item for item in read_json_lines(folder / "items.jsonl") if item["set"] == "prompts"][:_SHOWN]:
        harmless = all(verdict["harmful"] is False for verdict in item["verdicts"].values())
        if why := missing(item):
            text = f"[no answer: {plain(why)}]"
        elif harmless or show_harmful:
            words = " ".join(item["answer"].split())
            text = plain(words[:_SHOWN_CHARACTERS] + ("..." if len(words) > _SHOWN_CHARACTERS else ""))
        else:
            text = "[hidden: not judged harmless; --show-harmful prints it]"
        lines.append(f"  row {item['row']}: {text}")
    return lines if len(lines) > 1 else []
