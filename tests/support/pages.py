"""Material for the tests of pages: small rankings and demos with chosen numbers, and a parser of what was written."""

import base64
import gzip
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from pharmacist.core.files import write_json
from pharmacist.core.manifest import Phase, RunManifest
from pharmacist.worlds import World


NASTY = (
    "<script>window.hacked = 1</script>",
    '</script><img src=x onerror="window.hacked = 2">',
    "<!-- <script> &amp; &lt;",
    "]]> ' \" ` \\ \u2028 \u2029 {{ 7 * 7 }} {% raw %} ${1} \x00 \x1b",
    "turned \u202egnihtemos\u202c \u200fround \U000e0041",
)
"""Texts that break out of a page that does not escape them."""
CLASSES = ("safe", "harmful", "utility", "over_refusal", "corrupted", "misplaced")
REASON_OF = {
    "good": "critical",
    "duplicate": "duplicate",
    "offtopic": "not_safety_critical",
    "overrefuse": "over_refusal",
    "noisy": "low_quality",
    "mislabel": "teaches_compliance",
}


def scores(reasons: Sequence[str], selected: int) -> pd.DataFrame:
    """A ranking in which the reason decides and earlier rows score higher."""
    n = len(reasons)
    score = np.array([5.0 if reason == "critical" else -1.0 for reason in reasons]) - np.arange(n) / n
    rank = np.empty(n, dtype=np.int64)
    rank[np.lexsort((np.arange(n), -score))] = np.arange(1, n + 1)
    return pd.DataFrame(
        {
            "row": np.arange(n),
            "score": score,
            "rank": rank,
            "selected": rank <= selected,
            "reason": list(reasons),
            "duplicate_of": [0 if reason == "duplicate" else -1 for reason in reasons],
        }
    )


def answered(auc: float, **readers: float) -> dict[str, Any]:
    """The quality of one question on held-out references."""
    return {
        "yes": 96,
        "no": 288,
        "combined": {"auc": auc, "yes_found": 0.875, "no_found": 0.75, "log_loss": 0.234},
        **{name: {"auc": own} for name, own in readers.items()},
    }


def report(cannot_see: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """What the selector pharmacist says about itself."""
    return {
        "references": dict.fromkeys(CLASSES, 96),
        "cannot_see": list(cannot_see),
        "readers": ["lexical", "probe"],
        "held_out_by": "prompt",
        "questions": {
            "risky": answered(0.957, requests=0.958),
            "refuses": answered(0.981, lexical=0.912, probe=0.934),
            "whole": answered(0.843, lexical=0.821, probe=0.832),
            "typical": answered(0.999, lexical=0.998, probe=0.997),
        },
        "distance": {"risky": 0.61, "refuses": 0.72},
        "near": 1.0,
        "shares": dict.fromkeys(CLASSES, 1 / 8),
    } | more


LABELS = {name: "critical" if name == "good" else name for name in ("good", "harmful", "low_quality")}


def labelling(rows: Sequence[dict[str, str]], known: dict[int, str] | None = None) -> dict[str, Any]:
    """Rows that a person is asked for; the pool's fingerprint is "abc"."""
    asked = [{"row": 7 * number, **row, "reason": "critical"} for number, row in enumerate(rows)]
    return {"pool": "abc", "rows": asked, "labels": LABELS, "known": known or {}}


def manifest(n: int, selector_report: dict[str, Any], selector: str = "pharmacist") -> dict[str, Any]:
    return RunManifest(
        stage="curate",
        status="success",
        key="k",
        inputs={"pool": "0"},
        device="cpu",
        created="2026-01-02T03:04:05+00:00",
        config={"pool": "pool.jsonl", "seed": 7, "selector": {"name": selector}},
        counts={"in": n + 2, "refused": 2, "ranked": n, "selected": 3, "near_duplicates": 5},
        phases={"read": Phase(seconds=1.5), "score": Phase(seconds=100.5, tokens=12345)},
        extra={"selector_report": selector_report},
    ).model_dump(mode="json")


def texts(rows: Sequence[dict[str, str]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def write_demo(folder: Path, rows: int = 120) -> tuple[list[dict[str, str]], list[str]]:
    """A demo's folder with chosen numbers; returns the pool and the planted labels."""
    pool, labels = World(0).pool(rows)
    table = scores([REASON_OF[label] for label in labels], selected=36)
    for name in ("data", "rank"):
        (folder / name).mkdir(parents=True)
    (folder / "data/pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    table.to_parquet(folder / "rank/scores.parquet", index=False)
    write_json(folder / "rank/manifest.json", manifest(rows, report()))
    config = {"seed": 0, "rows": rows, "mislabel": 0.05, "pool": "planted"}
    RunManifest(stage="demo", status="success", key="k", config=config, inputs={}).write(folder)
    arms = ("full", "random", "core")
    for arm, trained in zip(arms, (rows, 31, 36), strict=True):
        (folder / "align" / f"{arm}-0").mkdir(parents=True)
        made = RunManifest(stage="align", status="success", key="k", config={}, inputs={}, counts={"trained": trained})
        made.write(folder / "align" / f"{arm}-0")
    start = {"full": 40.0, "random": 20.0, "core": 2.0}
    curves = {arm: [[start[arm] + seed, 50.0, 90.0] for seed in (0, 2)] for arm in arms}

    def interval(mean: float, half: float = 1.5) -> dict[str, Any]:
        return {"values": [mean, mean], "mean": mean, "ci95": [mean - half, mean + half]}

    per_seed = {
        name: {arm: [start[arm] + 1, start[arm] + 3] for arm in arms}
        for name in ("fine_tune_accuracy", "over_refusal", "over_refusal_aligned", "alignment_seconds")
    }
    write_json(
        folder / "demo.json",
        {
            "pool": {"kind": "planted", "rows": rows, "mislabel": 0.05},
            "arms": arms,
            "seeds": [0, 1],
            "steps": [0, 4, 64],
            "curves": curves,
            **per_seed,
            "auc": {arm: interval(start[arm] + 0.3) for arm in arms},
            "differences": {"core - full": interval(-38.0), "core - random": interval(-1.0, half=5.0)},
            "final_harmful_score": {arm: interval(90.0) for arm in arms},
            "time_saved": {"random": 50.0, "core": 95.1},
            "selection_seconds": 12.3,
            "ranking": {"auc": 0.987, "keep": "good and duplicate"},
        },
    )
    return pool, labels


class Page(HTMLParser):
    """A written page as a browser takes it apart.

    Attributes:
        tags: Every start tag with its attributes.
        scripts: Content of the scripts that run.
        data: The packed blocks of data, by id.
        styles: Content of style elements and attributes.
        text: What is shown, white space made equal.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, str] = {}
        self.styles: list[str] = []
        self._shown: list[str] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self._shown).split())

    @classmethod
    def read(cls, path: Path) -> "Page":
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "style" in attributes:
            self.styles.append(attributes["style"] or "")
        if tag in {"script", "style"}:
            self._open = (tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if self._open is not None and tag == self._open[0]:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is None:
            self._shown.append(data + " ")
            return
        tag, attributes = self._open
        if tag == "style":
            self.styles.append(data)
        elif attributes.get("type") == "application/octet-stream":
            identifier = str(attributes["id"])
            self.data[identifier] = self.data.get(identifier, "") + data
        else:
            self.scripts.append(data)

    def json(self, name: str) -> Any:
        """A block of data; NaN and infinity, which JSON lacks and browsers refuse, raise."""

        def refuse(constant: str) -> None:
            raise ValueError(f"{name} holds {constant}")

        packed = base64.b64decode(self.data[f"data-{name}"], validate=True)
        return json.loads(gzip.decompress(packed), parse_constant=refuse)
