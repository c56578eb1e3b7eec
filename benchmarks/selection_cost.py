"""Quality and cost of the selector's parts, against one LoRA SFT epoch over the same pool, in one run.

    python benchmarks/selection_cost.py --pool POOL --safe S --harmful H --utility U --model MODEL \
        --labels LABELS.json --output-dir DIR
    python benchmarks/selection_cost.py --world ROWS --output-dir DIR

LABELS.json lists the known label of every row: good, duplicate (of a good row), offtopic, overrefuse, noisy, mislabel.
With --world the synthetic world's model reads its pool of so many rows (3579 at most), 5 % of them mislabelled.
Prints Markdown tables (for docs/results.md) and writes selection.json. Every ranking is an ordinary folder of
`pharmacist curate`, so the benchmark resumes. Cost is wall time in units of the SFT epoch, and tokens passed through
the model in units of the epoch's tokens (whatever else the machine does); what is spent on training does not grow with
the pool and is shown apart from what is spent per row.
"""

import argparse
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import DataError, PharmacistError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.manifest import read_manifest
from pharmacist.data.formats import open_source
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.pipeline.curate import CurateOptions, curate
from pharmacist.selectors.pharmacist.questions import QUESTIONS, TYPICAL


FAULTS = ("offtopic", "overrefuse", "noisy", "mislabel")
REASONS = {
    "good": {"critical", "duplicate"},
    "duplicate": {"critical", "duplicate"},
    "offtopic": {"not_safety_critical"},
    "overrefuse": {"over_refusal"},
    "noisy": {"low_quality"},
    "mislabel": {"teaches_compliance"},
}
VARIANTS = {
    "lexical": {"form": "evidence", "readers": "lexical"},
    "probe": {"form": "evidence", "readers": "probe"},
    "lexical + probe": {"form": "evidence", "readers": "lexical,probe"},
    "twins, references only": {"form": "bilevel", "cotrain": 0.0},
    "evidence and twins": {"form": "both"},
    "twins, 25 % of the pool": {"form": "bilevel", "cotrain": 0.25},
    "default": {},
}
FILES = ("pool", "safe", "harmful", "utility")
PER_ROW = ("read pool", "answer", "score with twins")
ONCE = ("read references", "train twins")


def ranking_quality(score, labels):
    """AUC, purity of the top 30 % and AUC per fault of a score; `labels` per row."""
    keep = labels.isin(["good", "duplicate"]).to_numpy()
    top = np.argsort(-score, kind="stable")[: round(0.3 * len(score))]
    found = {"auc": float(roc_auc_score(keep, score)), "purity": float(keep[top].mean())}
    for fault in FAULTS:
        bad = (labels == fault).to_numpy()
        if bad.any():
            found[fault] = float(roc_auc_score(keep[keep | bad], score[keep | bad]))
    return found


def reason_quality(table, labels):
    """Share of rows whose reason is right, over all and by label."""
    right = np.array([reason in REASONS[label] for reason, label in zip(table["reason"], labels, strict=True)])
    by_label = {label: float(right[(labels == label).to_numpy()].mean()) for label in REASONS if label in set(labels)}
    return {"reason": float(right.mean()), "reason by label": by_label}


def made_up(rows, folder, seed):
    """Files and labels of a synthetic pool, and the world's model."""
    write_world = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "world_files.py"))["write_world"]
    write_world(folder, rows, seed)
    files = {name: str(folder / f"{name}.jsonl") for name in FILES} | {"model": str(folder / "MODEL")}
    return files, read_json(folder / "labels.json")


def read_labels(path, pool):
    """The known label of every row of a pool."""
    try:
        labels = read_json(path)
    except OSError as error:
        raise DataError(f"--labels {path}: cannot be read ({error.strerror}); check the path") from error
    if not isinstance(labels, list):
        raise DataError(f"--labels {path}: is no JSON list of labels; check the file")
    if unknown := [label for label in labels if label not in tuple(REASONS)]:
        raise DataError(f"--labels {path}: unknown label {unknown[0]!r}; known are {', '.join(REASONS)}")
    if len(labels) != (n := sum(1 for _ in open_source(pool, name="--pool").rows())):
        raise DataError(f"--labels {path}: {len(labels)} labels for {n} rows; give this pool's own")
    if len({label in FAULTS for label in labels}) < 2:
        raise DataError(f"--labels {path}: nothing can be told apart without both good and bad rows")
    return labels


def table_line(name, found, rest):
    """Cells are empty where no row has the fault."""
    faults = (f"{found[fault]:.3f}" if fault in found else "" for fault in FAULTS)
    cells = [f"{found['auc']:.3f}", f"{found['purity']:.3f}", *faults]
    return f"| {name} | {' | '.join(cells)} | {' | '.join(rest)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*FILES, "model", "labels"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--world", type=int, metavar="ROWS")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    files = {name: getattr(arguments, name) for name in (*FILES, "model")}
    if arguments.world and (arguments.labels or any(files.values())):
        parser.error("--world makes all files itself; give them, or --world")
    if arguments.world:
        files, labels = made_up(arguments.world, arguments.output_dir / "data", arguments.seed)
    elif arguments.labels and all(files.values()):
        labels = read_labels(arguments.labels, arguments.pool)
    else:
        parser.error("give all files, or --world")
    labels, common = pd.Series(labels), {"model": files.pop("model"), "seed": arguments.seed}
    folder = arguments.output_dir / "sft-epoch"
    epoch = {"num_train_epochs": 1, "per_device_train_batch_size": 16}
    align(AlignOptions(data=files["pool"], train=epoch, on_long_prompt="cut", output_dir=str(folder), **common))
    unit, tokens = (getattr(read_manifest(folder).phases["train"], field) for field in ("seconds", "tokens"))
    print(f"one LoRA SFT epoch over the pool: {unit:.1f} s")
    path = arguments.output_dir / "selection.json"
    found = (read_json(path) if path.is_file() else {}) | {"sft_epoch_seconds": unit}
    for number, name in enumerate(VARIANTS):
        if name not in arguments.only:
            continue
        folder = arguments.output_dir / f"{number}"
        curate(
            CurateOptions(selector={"name": "pharmacist", **VARIANTS[name]}, output_dir=str(folder), **files, **common)
        )
        manifest = read_manifest(folder)
        seconds = {phase: value.seconds for phase, value in manifest.phases.items()}
        table = pd.read_parquet(folder / "scores.parquet").set_index("row")
        known = labels.iloc[table.index].reset_index(drop=True)
        found[name] = (
            ranking_quality(table["score"].to_numpy(), known)
            | reason_quality(table, known)
            | {
                "seconds": seconds,
                "readers": manifest.extra["selector_report"].get("readers"),
                "once": sum(seconds.get(phase, 0.0) for phase in ONCE) / unit,
                "per row": sum(seconds.get(phase, 0.0) for phase in PER_ROW) / unit,
                "tokens": {phase: value.tokens / tokens for phase, value in manifest.phases.items() if value.tokens},
                "signals": {
                    signal: ranking_quality(table[signal].to_numpy(), known)
                    for signal in table
                    if signal.split("_")[0] in (*QUESTIONS, TYPICAL) or signal == "contrast"
                },
            }
        )
        write_json(path, found)
    costs = "| reason right | time: training | time: per row | tokens: training | tokens: per row |"
    print("\n| selector | AUC | good in top 30 % | " + " | ".join(FAULTS) + f" {costs}")
    print("|" + "---|" * (8 + len(FAULTS)))
    for name in arguments.only:
        row = found[name]
        trained, read = (sum(row["tokens"].get(phase, 0.0) for phase in phases) for phases in (ONCE, PER_ROW))
        rest = [row["once"], row["per row"], trained, read]
        print(table_line(name, row, [f"{row['reason']:.3f}", *(f"{value:.2f}" for value in rest)]))
        for signal, alone in row["signals"].items():
            print(table_line(f"{name}: {signal} alone", alone, [""] * 5))


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"selection_cost.py: {error}", file=sys.stderr)
        sys.exit(2)
