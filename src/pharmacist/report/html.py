"""Renders pages: one function and one template per kind of page, on a common base.

A page is one file that makes no network request: libraries, styles and data are in it, and a content security policy
forbids everything else, scripts that a row's text might bring included.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pharmacist import __version__
from pharmacist.core.console import plain
from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json, write_text
from pharmacist.core.manifest import read_manifest
from pharmacist.report import charts, tables, words
from pharmacist.report.numbers import METRICS, Figure


if TYPE_CHECKING:
    import datasets
    import pandas as pd

_NARROW = "\N{NARROW NO-BREAK SPACE}"
_MARKS = (("dash", "square"), ("dot", "diamond"), ("solid", "circle"))
"""Dashes and markers of the demo's arms."""


def render_ranking(
    path: Path,
    *,
    scores: "pd.DataFrame",
    texts: "datasets.Dataset",
    manifest: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    categories: Sequence[Sequence[str]] | None = None,
    labelling: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page of a ranking.

    Args:
        path: The HTML file.
        scores: ``scores.parquet``.
        texts: ``prompt`` and ``completion`` of the same rows, in the same order.
        manifest: ``manifest.json`` of the run.
        labels: Known label per row (planted pools).
        categories: Categories of each row, none or several, where the pool tells them.
        labelling: Rows that a person may label on the page: ``pool`` (its fingerprint), ``rows`` (dicts with ``row``,
            ``prompt`` and ``completion``), ``labels`` (label -> reason that it gives) and ``known`` (row -> label).
    """
    ranking, data = _ranking(scores, texts, manifest, labels, categories)
    scripts = ["ranking.js"]
    if labelling is not None and labelling["rows"]:
        ranking["labelling"], data["labelling"] = _labelling(labelling)
        scripts.append("labelling.js")
    write_page(path, "ranking.html.j2", scripts, data, ranking=ranking, manifest=manifest)


def _labelling(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template and what the script need to have rows labelled; a label's key is its first letter."""
    labels = [{"name": name, "key": name[0], "word": words.reason(reason)} for name, reason in given["labels"].items()]
    keys = [{"name": label["name"], "key": label["key"]} for label in labels]
    rows = [[row["row"], row["prompt"], row["completion"]] for row in given["rows"]]
    known = [[row, label] for row, label in sorted(given["known"].items())]
    return {"labels": labels, "rows": len(rows)}, {"pool": given["pool"], "labels": keys, "rows": rows, "known": known}


def render_demo(
    folder: Path, labels: Sequence[str] | None = None, categories: Sequence[Sequence[str]] | None = None
) -> None:
    """Writes ``report.html`` into a demo's folder, out of the files in it.

    Args:
        folder: Holds ``demo.json``, ``data/pool.jsonl`` and ``rank/``.
        labels: Planted label per row of the pool.
        categories: Categories of each row.

    Raises:
        DataError: Scores and pool do not belong together.
    """
    import datasets
    import pandas as pd

    summary, manifest = read_json(folder / "demo.json"), read_manifest(folder / "rank").model_dump(mode="json")
    scores = pd.read_parquet(folder / "rank" / "scores.parquet")
    with open(folder / "data" / "pool.jsonl", encoding="utf-8") as file:
        pool = [json.loads(line) for line in file]
    if scores["row"].tolist() != list(range(len(pool))):
        raise DataError(f"{folder}: rank/scores.parquet does not belong to data/pool.jsonl; run the demo again")
    texts = datasets.Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in pool])
    ranking, data = _ranking(scores, texts, manifest, labels, categories)
    found = {
        "alignment_seconds": METRICS["alignment_seconds"],
        "fine_tune_accuracy": METRICS["fine_tune_accuracy"],
        "over_refusal_aligned": METRICS["over_refusal"],
        "over_refusal": METRICS["over_refusal"],
    }
    data["figures"] |= {name: charts.bars(summary[name], metric.unit) for name, metric in found.items()}
    curves = [
        charts.Curve(words.arm(arm).title, words.arm(arm).css, summary["steps"], charts.over_seeds(seeds), *marks)
        for (arm, seeds), marks in zip(summary["curves"].items(), _MARKS, strict=True)
    ]
    data["figures"]["curves"] = charts.curves(curves, "attack steps", spread="band", height=430, legend=True)
    arms = [
        {
            "word": words.arm(name),
            "name": name,
            "rows": summary["pool"]["rows"] if name == "full" else int(scores["selected"].sum()),
            **{key: Figure.of(summary[key][name]) for key in ("auc", "final_harmful_score")},
            **{key: Figure.of(metric.estimate(summary[key][name])) for key, metric in found.items()},
        }
        for name in summary["arms"]
    ]
    write_page(
        folder / "report.html",
        "demo.html.j2",
        ["ranking.js"],
        data,
        ranking=ranking,
        manifest=manifest,
        demo=summary,
        arms=arms,
    )


def _ranking(
    scores: "pd.DataFrame",
    texts: "datasets.Dataset",
    manifest: Mapping[str, Any],
    labels: Sequence[str] | None,
    categories: Sequence[Sequence[str]] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the ranking part of a page shows: its numbers, and its data, which are figures and rows."""
    import pandas as pd

    for name, found in {"texts": texts, "labels": labels, "categories": categories}.items():
        if found is not None and len(found) != len(scores):
            raise ValueError(f"{len(scores)} scores, but {len(found)} {name}")
    report = manifest.get("extra", {}).get("selector_report", {})
    judgement = tables.Judgement.of(report)
    reasons, cut = tables.composition(scores["reason"], scores["selected"], words.REASONS), tables.cut(scores)
    rows = tables.Rows(scores, texts, labels, judgement)
    table, pairs = tables.row_table(rows), tables.pairs(rows)
    word_of = {group["name"]: words.reason(group["name"], judgement.judged) for group in reasons}
    figures = {
        "histogram": charts.score_histogram(scores, cut, judgement.judged),
        "reasons": charts.composition(reasons, word_of),
    }
    ranking: dict[str, Any] = {
        "selector": manifest["config"].get("selector", {}).get("name", ""),
        "judged": judgement.judged,
        "reasons": [group | {"word": word_of[group["name"]]} for group in reasons],
        "cannot_see": [words.reason(name) for name in judgement.blind],
        "fallback": report.get("fallback"),
        "cut": cut,
        "warnings": [plain(warning) for warning in manifest.get("warnings", ())],
        "quality": tables.held_out_quality(report),
        "questions": words.QUESTIONS,
        "classes": words.CLASSES,
        "make_up": tables.make_up(report),
        "compared": "distance" in report,
        "distance": report.get("distance"),
        "near": report.get("near"),
        "gain": report.get("labels"),
        "changed": report.get("changed"),
        "labelling": None,
        "phases": tables.phases(manifest),
        "seconds": sum(phase["seconds"] for phase in manifest.get("phases", {}).values()),
        "counts": manifest.get("counts", {}),
        "labels": None,
        "selected": int(scores["selected"].sum()),
        "table": table,
        "pairs": pairs,
        "categories": None,
    }
    if categories is not None:
        found = tables.categories(categories, scores["selected"])
        figures["categories"] = charts.kept(found, 100 * float(scores["selected"].mean()))
        ranking["categories"] = [group | {"title": words.category(group["name"])} for group in found]
        ranking["several_categories"] = any(len(own) > 1 for own in categories)
    if labels is not None:
        series = pd.Series(list(labels), dtype=str)
        planted = tables.composition(series, scores["selected"].reset_index(drop=True), words.LABELS)
        label_of = {group["name"]: words.label(group["name"]) for group in planted}
        figures["labels"] = charts.composition(planted, label_of)
        ranking["labels"] = [group | {"word": label_of[group["name"]]} for group in planted]
        confusion = tables.confusion(series, scores["reason"].reset_index(drop=True))
        ranking["confusion"] = confusion | {
            "labels": [words.label(name) for name in confusion["labels"]],
            "reasons": [words.reason(name, judgement.judged) for name in confusion["reasons"]],
        }
    return ranking, {"figures": figures, "rows": {"table": table, "examples": tables.examples(rows), "pairs": pairs}}


# --- the file -----------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pharmacist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "seconds": _seconds, "interval": _with_interval, "signed": _signed}
    return environment


def write_page(path: Path, template: str, scripts: Sequence[str], data: Mapping[str, Any], **context: Any) -> None:
    """Writes a page.

    Args:
        path: The HTML file.
        template: Its template.
        scripts: Its scripts, which run after ``page.js``.
        data: What the scripts read, by name; ``figures`` are those of the template's charts.
        **context: For the template.
    """
    from plotly.offline import get_plotlyjs

    code = [Markup(get_plotlyjs()), *(Markup(_template_file(name)) for name in ("page.js", *scripts))]
    text = (
        _environment()
        .get_template(template)
        .render(
            **context,
            version=__version__,
            scripts=code,
            policy=_policy(code),
            table_style=Markup(_datatables("css")),
            style=Markup(_template_file("style.css")),
            data={name: _packed(value) for name, value in {**data, "datatables": _datatables("js")}.items()},
        )
    )
    write_text(path, text)


def _packed(value: Any) -> str:
    """JSON, compressed and in letters that mean nothing to HTML: small, quick to load, and nothing to escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _template_file(name: str) -> str:
    return files("pharmacist.report").joinpath("templates", name).read_text(encoding="utf-8")


def _datatables(kind: str) -> str:
    """The DataTables bundle that itables brings, for pages that work offline."""
    return files("itables").joinpath("html", f"dt_bundle.{kind}").read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Content security policy: these scripts and no other, nothing from outside.

    ``blob:`` is for DataTables, a module that the page imports from its own data.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return f"default-src 'none'; script-src {hashes} blob:; style-src 'unsafe-inline'; img-src data:"


def _count(number: int) -> str:
    return f"{number:,}".replace(",", _NARROW)


def _seconds(seconds: float) -> str:
    if seconds < 99.95:
        return f"{seconds:.1f}{_NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_NARROW}h {minutes}{_NARROW}min" if hours else f"{minutes}{_NARROW}min {rest}{_NARROW}s"


def _minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _signed(number: float, digits: int = 1) -> str:
    return _minus(f"{round(number, digits) + 0.0:+.{digits}f}")  # no minus zero


def _with_interval(found: Figure | Mapping[str, Any] | None, unit: str) -> Markup:
    found = found if isinstance(found, Figure) else Figure.of(found)
    if found is None:
        return Markup("–")
    mean = Markup('<span class="value">{:.1f}{}{}</span>').format(found.mean, _NARROW, unit)
    if found.low is None or found.high is None:
        return mean
    ends = [_minus(f"{end:.1f}") for end in (found.low, found.high)]
    return mean + Markup(' <span class="interval">{} to {}</span>').format(*ends)
