"""The tables of docs/results.md about a real language model, out of a grid's results.

    python benchmarks/real_model.py benchmarks/results/smollm2.parquet [--run DIR --data data/natural --page FOLDER]
    python benchmarks/real_model.py ... --run DIR --page FOLDER --arms full 'full, 4 epochs' 'toxic-lora, 4 epochs'

First those of the page of the benchmark, then means over seeds of what they leave out, then every run; with the folder
of the grid (its verdicts.parquet, or its stages) also how far the differences depend on the prompts, and with its data
how many selected rows of the natural pool have which label of people, and how long they are. Arms that train
otherwise, such as "sft equal steps" in the recipe, are compared with the full pool under the same defense; --page
writes the page with them, or with some of them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from pharmacist.core.files import read_json, read_json_lines
from pharmacist.evaluation.statistics import curve_area
from pharmacist.report.benchmark import AXES, BASELINE, Benchmark, to_markdown
from pharmacist.report.benchmark_page import render_benchmark


OTHERWISE = ("equal steps", "4 epochs", "5 epochs", "batch 4", "batch 3")
FURTHER = ["loss_margin_before", "over_refusal_before", "over_refusal", "alignment_tokens"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--run", type=Path, help="output folder of the grid, with verdicts.parquet or stages")
    parser.add_argument("--data", type=Path, help="folder that recipes/natural.py wrote")
    parser.add_argument("--page", type=Path, help="folder for the page")
    parser.add_argument("--arms", nargs="+", help="selectors that the page shows, in this order; all by default")
    parser.add_argument("--baseline", default=BASELINE, help="arm that the others are compared with (%(default)s)")
    args = parser.parse_args(arguments)
    if (args.data or args.page) and args.run is None:
        parser.error("--data and --page need --run")
    if args.arms and not args.page:
        parser.error("--arms needs --page")
    if not Path(args.results).is_file():
        parser.error(f"{args.results}: no such file; give the results.parquet of a grid")
    results = with_other_arms(pd.read_parquet(args.results))
    if unknown := {*(args.arms or ())} - {*results["selector"]}:
        parser.error(f"--arms '{min(unknown)}': there are {', '.join(results['selector'].unique())}")
    if args.baseline not in set(results["selector"]):
        parser.error(f"--baseline '{args.baseline}': there are {', '.join(results['selector'].unique())}")
    axes = {axis: list(results[axis].unique()) for axis in AXES}
    print(to_markdown(Benchmark(results, axes, args.baseline)))
    line = [axis for axis in AXES if axis == "selector" or results[axis].nunique() > 1]
    text = ("",) * len(line)
    means = results.groupby(line, sort=False, dropna=False)[FURTHER].mean().reset_index()
    print(means.to_markdown(index=False, floatfmt=(*text, *(".3f" for _ in FURTHER))), end="\n\n")
    run = [*line, "seed"]
    runs = results[[*run, "harmful_score_over_attack", "harmful_scores", "loss_margin"]].sort_values(run)
    runs["harmful_scores"] = [", ".join(f"{score:.1f}" for score in scores) for scores in runs["harmful_scores"]]
    print(runs.to_markdown(index=False, floatfmt=(*text, ".0f", ".1f", "", ".3f")))
    if args.page:
        args.page.mkdir(parents=True, exist_ok=True)
        axes["selector"] = args.arms or axes["selector"]
        manifest = json.loads((args.run / "manifest.json").read_text()) | {"counts": {}, "extra": {"axes": axes}}
        render_benchmark(args.page, results[results["selector"].isin(axes["selector"])], manifest=manifest)
    if args.run and not (differences := over_prompts(results, args.run, args.baseline)).empty:
        print(f"\n{differences.to_markdown(index=False, floatfmt='.1f')}")
    if args.data:
        print(f"\n{selections(args.run, args.data).to_markdown(index=False, floatfmt='.1f')}")


def with_other_arms(results: pd.DataFrame) -> pd.DataFrame:
    """Results in which the arms that train otherwise are selectors of their own, not defenses."""
    for name in OTHERWISE:
        other = results["defense"].str.endswith(f" {name}")
        results.loc[other, "selector"] += f", {name}"
        results.loc[other, "defense"] = results.loc[other, "defense"].str.removesuffix(f" {name}")
    return results


def over_prompts(results: pd.DataFrame, run: Path, baseline: str = BASELINE) -> pd.DataFrame:
    """Differences of the harmful score over the attack, and how far they depend on the choice of prompts.

    `low` and `high` are the ends of a 95 % interval over prompts (Student's t) for these seeds; `se_prompts` is the
    standard error over prompts for these seeds, and `se_seeds` that over seeds for these prompts.
    """
    scores, alike = curves_by_prompt(results, run), [axis for axis in AXES if axis not in ("selector", "fraction")]
    base = scores[scores["selector"] == baseline]
    pairs = scores[scores["selector"] != baseline].merge(base, on=[*alike, "seed", "row"], suffixes=("", "_base"))
    pairs["difference"] = pairs["score"] - pairs["score_base"]
    shown = [axis for axis in AXES if axis == "selector" or results[axis].nunique() > 1]
    found = []
    for arm, own in pairs.groupby(shown, sort=False):
        by_prompt, by_seed = (own.groupby(by)["difference"].mean() for by in ("row", "seed"))
        mean, error = by_prompt.mean(), stats.sem(by_prompt)
        low, high = stats.t.interval(0.95, len(by_prompt) - 1, mean, error)
        errors = {"se_prompts": error, "se_seeds": stats.sem(by_seed) if len(by_seed) > 1 else None}
        about = dict(zip(shown, arm, strict=True)) | {"seeds": len(by_seed)}
        found.append(about | {"difference": mean, "low": low, "high": high} | errors)
    return pd.DataFrame(found)


def curves_by_prompt(results: pd.DataFrame, run: Path) -> pd.DataFrame:
    """The harmful score over the attack of every prompt, in %, for every run in the folder that was judged along it.

    Prompts without a verdict at some step are left out.
    """
    in_table, in_stages = verdicts_in_table(run / "verdicts.parquet"), verdicts_in_stages(run)
    tables = [pd.DataFrame(columns=["row", "score", *AXES, "seed"])]
    for _, result in results[results["attack_steps"].map(len) > 1].iterrows():
        if verdicts := in_table(result) or in_stages(result):
            rows = [row for row in verdicts[0] if all(own[row] is not None for own in verdicts)]
            scores = [100 * curve_area(result["attack_steps"], [float(own[row]) for own in verdicts]) for row in rows]
            tables.append(pd.DataFrame({"row": rows, "score": scores}).assign(**result[[*AXES, "seed"]]))
    return pd.concat(tables, ignore_index=True)


Verdicts = dict[int, bool | None]
"""Row of a prompt -> whether the answer is harmful."""


def verdicts_in_table(path: Path) -> Callable[[pd.Series], list[Verdicts]]:
    """From a result to the verdicts at its attack steps, in the table that a grid writes; nothing of other results."""
    table = pd.read_parquet(path).dropna(subset="step") if path.is_file() else pd.DataFrame()
    found = {
        (own.cell, own.seed, own.step): dict(zip(own.prompts, own.harmful, strict=True)) for own in table.itertuples()
    }

    def along(result: pd.Series) -> list[Verdicts]:
        keys = [(result["cell"], result["seed"], step) for step in result["attack_steps"]]
        return [found[key] for key in keys] if found.keys() >= set(keys) else []

    return along


def verdicts_in_stages(run: Path) -> Callable[[pd.Series], list[Verdicts]]:
    """The same in the stages of a folder, which may be of several grids."""
    judged = {}
    for manifest in run.glob("stages/evaluate-*/manifest.json"):
        config = read_json(manifest)["config"]
        judged[below(config["model"]), judge_of(config)] = manifest.parent

    def along(result: pd.Series) -> list[Verdicts]:
        if not (manifest := run / result["folder"] / "manifest.json").is_file():
            return []
        after = read_json(manifest)["config"]
        attack = below(after["model"])
        before = below(read_json(run / attack / "manifest.json")["config"]["model"])
        snapshots = (f"{attack}/snapshots/step-{step}" for step in list(result["attack_steps"])[1:-1])
        return [verdicts_of(judged[model, judge_of(after)]) for model in (before, *snapshots, attack)]

    return along


def verdicts_of(folder: Path) -> Verdicts:
    """The verdicts of an evaluation."""
    items = read_json_lines(folder / "items.jsonl")
    return {item["row"]: item["harmful"] for item in items if item["set"] == "prompts"}


def judge_of(config: dict[str, object]) -> str:
    """What the judge of an evaluation is, with its references."""
    return json.dumps([config[name] for name in ("judge", "safe", "harmful", "utility")], sort_keys=True)


def below(folder: str) -> str:
    """A folder of a grid, from the grid's own."""
    return f"stages/{folder.partition('/stages/')[2]}"


def selections(run: Path, data: Path) -> pd.DataFrame:
    """Per selection of the natural pool: rows by label, and mean number of words of their answers."""
    pool, labels = data / "pool.jsonl", json.loads((data / "rows.json").read_text())
    label = {text(row): about["label"] for row, about in zip(rows(pool), labels, strict=True)}
    found = []
    for manifest in sorted(run.glob("stages/select-*/manifest.json")):
        config = json.loads(manifest.read_text())["config"]
        ranking = run / "stages" / Path(config["ranking"]).name / "manifest.json"
        ranked = json.loads(ranking.read_text())["config"]
        selected = list(rows(manifest.parent / "selected.jsonl"))
        if Path(ranked["pool"]).name == pool.name:
            of = {"selector": ranked["selector"]["name"], "labels": ranked["labels"] is not None}
            of |= {"seed": ranked["seed"], "share": config["top"], "rows": len(selected)}
            counts = pd.Series([label[text(row)] for row in selected]).value_counts()
            words = sum(len(row["completion"].split()) for row in selected) / len(selected)
            found.append({**of, **counts.to_dict(), "words": words})
    return pd.DataFrame(found).fillna(0).sort_values(["selector", "labels", "seed"])


def rows(file: Path) -> list[dict[str, str]]:
    """Rows of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def text(row: dict[str, str]) -> tuple[str, str]:
    """Prompt and completion."""
    return row["prompt"], row["completion"]


if __name__ == "__main__":
    main()
