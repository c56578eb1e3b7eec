"""Renders pages, each kind by a function and a template on a common base.

A page is one file that makes no network request: it contains libraries, styles and data, and a content security policy
forbids everything else, such as scripts in the text of a row.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pharmacist import __version__
from pharmacist.core.console import plain
from pharmacist.core.files import read_json, write_text
from pharmacist.core.manifest import read_manifest
from pharmacist.report import charts, tables, words
from pharmacist.report.cautions import cautions
from pharmacist.report.numbers import SHOWN_METRICS, Figure


if TYPE_CHECKING:
    import datasets


_NARROW = "\N{NARROW NO-BREAK SPACE}"
_MARKS = (("dash", "square"), ("dot", "diamond"), ("solid", "circle"))
"""Dashes and markers of the demo's arms."""
_NOT_READERS = ("yes", "no", "combined")  # keys of a selector's report on a question; the others are readers


def render_ranking(
    path: Path,
    *,
    scores: pd.DataFrame,
    texts: "datasets.Dataset",
    manifest: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    categories: Sequence[Sequence[str]] | None = None,
    labelling: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page of a ranking, from the ``scores.parquet`` and ``manifest.json`` of its run.

    `texts` holds ``prompt`` and ``completion`` of the same rows, in the same order; `labels` the known label of each
    row (planted pools) and `categories` its categories, none or several, where the pool tells them. `labelling` is
    about rows that a person may label on the page: ``pool`` (its fingerprint), ``rows`` (dicts with ``row``,
    ``prompt`` and ``completion``), ``labels`` (label -> reason that it gives) and ``known`` (row -> label).
    """
    ranking, data = _ranking(scores, texts, manifest, labels, categories)
    scripts = ["ranking.js"]
    if labelling is not None and labelling["rows"]:
        labels_of = labelling["labels"].items()
        ranking["labelling"] = data["labelling"] = {
            "pool": labelling["pool"],
            "labels": [{"name": name, "key": name[0], "reason": reason} for name, reason in labels_of],
            "rows": [[row["row"], row["prompt"], row["completion"]] for row in labelling["rows"]],
            "known": [[row, label] for row, label in sorted(labelling["known"].items())],
        }
        scripts.append("labelling.js")
    write_page(path, "ranking.html.j2", scripts, data, ranking=ranking, manifest=manifest)


def render_demo(
    folder: Path,
    pool: Sequence[Mapping[str, str]],
    labels: Sequence[str] | None = None,
    categories: Sequence[Sequence[str]] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Writes ``report.html`` into the folder of a demo, from its ``demo.json`` and ``rank/``.

    `labels` are the planted labels of the pool's rows (prompt and completion), `categories` the categories of each,
    `warnings` those of the stages besides the ranking.
    """
    import datasets  # so that the command `label`, which shares this module, starts without it

    summary, manifest = read_json(folder / "demo.json"), read_manifest(folder / "rank").model_dump(mode="json")
    scores = pd.read_parquet(folder / "rank" / "scores.parquet")
    ranking, data = _ranking(scores, datasets.Dataset.from_list(list(pool)), manifest, labels, categories)
    measured = ("alignment_seconds", "fine_tune_accuracy", "over_refusal_aligned", "over_refusal")
    found = {name: SHOWN_METRICS[name.removesuffix("_aligned")] for name in measured}
    data["figures"] |= {name: charts.bars(summary[name], metric.unit) for name, metric in found.items()}
    curves = [
        charts.Curve(words.ARMS[arm].title, words.ARMS[arm].css, summary["steps"], charts.over_seeds(seeds), *marks)
        for (arm, seeds), marks in zip(summary["curves"].items(), _MARKS, strict=True)
    ]
    data["figures"]["curves"] = charts.curves(curves, "attack steps", spread="band", height=430, legend=True)
    arms = [
        {
            "word": words.ARMS[name],
            "rows": read_manifest(folder / "align" / f"{name}-{summary['seeds'][0]}").counts["trained"],
            **{key: Figure.of(summary[key][name]) for key in ("auc", "final_harmful_score")},
            **{key: metric.mean(summary[key][name]) for key, metric in found.items()},
        }
        for name in summary["arms"]
    ]
    context = {"ranking": ranking, "manifest": manifest, "demo": summary, "arms": arms}
    by_title = {words.ARMS[name].title: seeds for name, seeds in summary["curves"].items()}
    context["warnings"] = [*warnings, *cautions(by_title)]
    write_page(folder / "report.html", "demo.html.j2", ["ranking.js"], data, **context)


def _ranking(
    scores: pd.DataFrame,
    texts: "datasets.Dataset",
    manifest: Mapping[str, Any],
    labels: Sequence[str] | None,
    categories: Sequence[Sequence[str]] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ranking's part of a page: numbers for the template, and data (``figures`` and ``rows``) for the scripts."""
    report, selected, cut = manifest["extra"].get("selector_report", {}), scores["selected"], tables.cut(scores)
    questions = report.get("questions") or {}
    reasons = tables.composition(scores["reason"], selected, words.REASONS)
    rows = tables.Rows(scores, texts, labels, report)
    table, pairs = tables.row_table(rows), tables.pairs(rows)
    figures = {"histogram": charts.score_histogram(scores, cut), "reasons": charts.composition(reasons)}
    ranking: dict[str, Any] = {
        "selector": manifest["config"].get("selector", {}).get("name", ""),
        "report": report,
        "judged": bool((scores["reason"] != words.RANKED).any()),
        "finds_critical": bool((scores["reason"] == "critical").any()),
        "questions": questions,
        "readers": [name for name in dict.fromkeys(chain(*questions.values())) if name not in _NOT_READERS],
        "reasons": reasons,
        "cut": cut,
        "labelling": None,
        "labels": None,
        "selected": int(selected.sum()),
        "table": table,
        "pairs": pairs,
        "categories": None,
    }
    if categories is not None:
        ranking["categories"] = tables.categories(categories, selected)
        ranking["several_categories"] = any(len(of_row) > 1 for of_row in categories)
        figures["categories"] = charts.kept(ranking["categories"], 100 * float(selected.mean()))
    if labels is not None:
        ranking["labels"] = tables.composition(labels, selected, words.LABELS)
        ranking["confusion"] = tables.confusion(labels, scores["reason"])
        figures["labels"] = charts.composition(ranking["labels"])
    return ranking, {"figures": figures, "rows": {"table": table, "examples": tables.examples(rows), "pairs": pairs}}


# --- the file -----------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pharmacist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_spelled_out,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "seconds": _seconds, "interval": _with_interval, "signed": _signed}
    environment.globals |= {"version": __version__, "words": words}
    return environment


def _spelled_out(value: Any) -> Any:
    """Names and messages from data without marks that turn text around or cannot be seen; HTML as it is."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def write_page(path: Path, template: str, scripts: Sequence[str], data: Mapping[str, Any], **context: Any) -> None:
    """Writes a page.

    `scripts` are the names of the scripts that follow ``page.js``; they read `data`, in which ``figures`` are the
    charts. `context` are the variables of the template.
    """
    templates = files("pharmacist.report") / "templates"
    tables_library = files("itables") / "html"  # brings DataTables for pages that work offline
    code = [Markup(get_plotlyjs()), *(Markup((templates / name).read_text("utf-8")) for name in ("page.js", *scripts))]
    packed = {**data, "datatables": (tables_library / "dt_bundle.js").read_text("utf-8")}
    page = _environment().get_template(template)
    text = page.render(
        **context,
        scripts=code,
        policy=_policy(code),
        table_style=Markup((tables_library / "dt_bundle.css").read_text("utf-8")),
        style=Markup((templates / "style.css").read_text("utf-8")),
        data={name: _packed(value) for name, value in packed.items()},
    )
    write_text(path, text)


def _packed(value: Any) -> str:
    """JSON, compressed and encoded in base64: small, quick to load, and nothing to escape in HTML."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _policy(scripts: Sequence[str]) -> str:
    """Content security policy: these scripts and no other, nothing from outside.

    ``blob:`` is for DataTables, a module that the page imports from its data.
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
    return _minus(f"{number:+z.{digits}f}")  # no minus zero


def _with_interval(found: Figure | Mapping[str, Any] | None, unit: str) -> Markup:
    found = found if isinstance(found, Figure) else Figure.of(found)
    if found is None:
        return Markup("–")
    mean = Markup('<span class="value">{:z.1f}{}{}</span>').format(found.mean, _NARROW, unit)
    if found.low is None or found.high is None:
        return mean
    ends = [_minus(f"{end:z.1f}") for end in (found.low, found.high)]
    return mean + Markup(' <span class="interval">{} to {}</span>').format(*ends)
