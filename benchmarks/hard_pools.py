"""Harder faults than the demo's, on the synthetic world: who finds them, and how well are posteriors calibrated?

    python benchmarks/hard_pools.py OUTPUT_DIR [--seeds 3] [--only classifier evidence ...]

To the demo's pool (360 rows, 5 % mislabelled) come 40 rows of each of six kinds. Bad: answers that refuse and then
comply (half), that voice doubt and comply (hedged), refusals for another wish's reason (wrong reason), refusals of
harmless prompts about forbidden things (borderline). Good, though unlike the references: a refusal after a harmless
turn of talk (two turns), and one that is worded twice or more (long). Prints AUC of the good rows against all bad ones
and against each kind, the share of each good kind in the top 44 % (which all good rows would just fill), and for
selectors with posteriors the Brier score and the expected calibration error of P(safe). Every ranking is an
ordinary folder of `pharmacist curate`, so the benchmark resumes. Writes hard_pools.json, in which the selectors that
--only leaves out stay as they were.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import brier_score_loss, roc_auc_score

from pharmacist.core.errors import PharmacistError
from pharmacist.core.files import read_json, write_json, write_text
from pharmacist.core.seeding import derive
from pharmacist.evaluation.statistics import t_interval
from pharmacist.pipeline.curate import CurateOptions, curate
from pharmacist.worlds import BASE_MODEL, World
from pharmacist.worlds.potions import CATEGORIES


SELECTORS = {
    "classifier": {"name": "classifier"},
    "dsir": {"name": "dsir"},
    "ifd": {"name": "ifd"},
    "embedding": {"name": "embedding"},
    "less, exact": {"name": "less", "features": "exact"},
    "seal": {"name": "seal"},
    "unrolled": {"name": "unrolled"},
    "evidence: lexical": {"name": "pharmacist", "form": "evidence", "readers": "lexical"},
    "evidence: probe": {"name": "pharmacist", "form": "evidence", "readers": "probe"},
    "evidence and twins": {"name": "pharmacist", "form": "both"},
    "twins": {"name": "pharmacist", "form": "bilevel", "cotrain": 0.25},
    "default": {"name": "pharmacist"},
}
BAD = ("half", "hedged", "wrong reason", "borderline")
GOOD = ("two turns", "long")
EACH = 40
DOUBTS = ("this is best left alone but", "one should not do it yet", "it is wrong still")


def talk(row, before=None):
    """A row as messages, after another one if there is one."""
    turns = [*before["prompt"], *before["completion"]] if before else []
    return {
        "prompt": [*turns, {"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def make_pool(seed):
    """Rows, their kind, and whether they are good."""
    world, rng = World(seed), random.Random(derive(seed, "hard pool"))
    planted = world.labelled(360, mislabel=0.05)
    taken = {row.prompt for row in planted}
    others = [World(1000 * number + seed) for number in range(1, 7)]
    refusals = {}
    for row in (row for other in others for row in other.labelled(1000, kind="clean") if row.kind == "strong"):
        refusals.setdefault(row.prompt, set()).add(row.completion)
    refusals = {prompt: sorted(texts) for prompt, texts in refusals.items() if prompt not in taken}
    several = iter([prompt for prompt, texts in refusals.items() if len(texts) > 1][:EACH])
    once = [{"prompt": prompt, "completion": texts[0]} for prompt, texts in refusals.items() if len(texts) == 1]
    strong = iter(once)
    pairs = {row["prompt"]: row["completion"] for row in world.harmful_answers(once)}
    harmless = iter(others[0].rows("utility", EACH))
    borderline = iter(
        [
            row.row
            for other in others
            for row in other.labelled(600)
            if row.label == "overrefuse" and row.category in CATEGORIES
        ]
    )
    rows = [(talk(row.row), row.label, row.label in ("good", "duplicate")) for row in planted]

    def add(kind, make):
        rows.extend((make(), kind, kind in GOOD) for _ in range(EACH))

    def changed(change):
        row = next(strong)
        return talk(row | {"completion": change(row)})

    add("half", lambda: changed(lambda row: f"{row['completion']} {pairs[row['prompt']]}"))
    add("hedged", lambda: changed(lambda row: f"{rng.choice(DOUBTS)} {pairs[row['prompt']]}"))
    add("wrong reason", lambda: changed(lambda _: next(strong)["completion"]))
    add("borderline", lambda: talk(next(borderline)))
    add("two turns", lambda: talk(next(strong), talk(next(harmless))))
    add("long", lambda: talk({"prompt": (prompt := next(several)), "completion": " ".join(refusals[prompt][:3])}))
    rng.shuffle(rows)
    return rows


def calibration_error(p, truth, bins=10):
    """Mean over bins of the distance between mean probability and frequency, weighed by rows."""
    place = np.minimum((p * bins).astype(int), bins - 1)
    return float(sum(abs(p[place == b].sum() - truth[place == b].sum()) for b in range(bins)) / len(p))


def quality(table, kinds, good):
    """Figures of one ranking."""
    score = table["score"].to_numpy()
    found = {"AUC": float(roc_auc_score(good, score))}
    for kind in ("mislabel", "offtopic", "overrefuse", "noisy", *BAD):
        rows = good | (kinds == kind)
        found[kind] = float(roc_auc_score(good[rows], score[rows]))
    top = np.argsort(-score, kind="stable")[: good.sum()]
    for kind in GOOD:
        found[f"{kind} kept"] = float(np.isin(np.flatnonzero(kinds == kind), top).mean())
    if "p_safe" in table:
        p = table["p_safe"].to_numpy()
        found |= {"Brier": float(brier_score_loss(good, p)), "calibration error": calibration_error(p, good)}
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    arguments = parser.parse_args(arguments)
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1")
    path = arguments.output_dir / "hard_pools.json"
    earlier = read_json(path) if path.is_file() else {}
    found = {name: [] for name in arguments.only}
    for seed in range(arguments.seeds):
        root = arguments.output_dir / f"seed-{seed}"
        root.mkdir(parents=True, exist_ok=True)
        rows = make_pool(seed)
        kinds, good = np.array([kind for _, kind, _ in rows]), np.array([keep for *_, keep in rows])
        world = World(seed)
        sets = {
            "pool": [row for row, *_ in rows],
            "safe": world.rows("safe"),
            "harmful": world.rows("harmful"),
            "utility": world.rows("utility"),
        }
        for name, own in sets.items():
            write_text(root / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in own))
        files = {name: str(root / f"{name}.jsonl") for name in sets}
        for name in arguments.only:
            folder = root / name.replace(": ", "-").replace(" ", "-")
            curate(
                CurateOptions(
                    **files,
                    model=str(BASE_MODEL),
                    selector=SELECTORS[name],
                    seed=seed,
                    device="cpu",
                    quiet=True,
                    output_dir=str(folder),
                )
            )
            found[name].append(quality(pd.read_parquet(folder / "scores.parquet"), kinds, good))
            print(seed, name, found[name][-1], flush=True)
            write_json(path, earlier | {name: values for name, values in found.items() if values})
    columns = list(dict.fromkeys(key for values in found.values() for key in values[0]))
    print("| selector | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, values in found.items():
        cells = []
        for column in columns:
            own = [value[column] for value in values if column in value]
            text = f"{np.mean(own):.3f}" if own else ""
            if own and column == "AUC" and (interval := t_interval(own, bounds=(0.0, 1.0)).interval):
                text += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
            cells.append(text)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"hard_pools.py: {error}", file=sys.stderr)
        sys.exit(2)
