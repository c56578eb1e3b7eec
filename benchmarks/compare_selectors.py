"""Every selector on planted pools of the made-up world: quality, cost and memory; and what its core subset is worth.

    python benchmarks/compare_selectors.py OUTPUT_DIR [--seeds 3] [--only NAME ...] [--downstream] [--figure FILE.svg]

Pools with 0 %, 5 % and 15 % mislabelled rows (`pharmacist.worlds`), every selector on every pool and seed; variants
that answer a question about their own method on the 5 % pool alone. A ranking is an ordinary folder of
`pharmacist curate`, made in a process of its own, whose largest memory is the selector's; the libraries are loaded
before the process starts. Cost is the wall time of the selector's phases in units of one LoRA SFT epoch over the same
pool, measured before each pool's rankings, the least of all runs each; and the tokens that go through the model in the
same unit. Interrupted, the benchmark resumes.

With --downstream each core subset (30 % of the 5 % pool, first seed), the full pool and a random subset align a model
by SFT and by Vaccine, which is then attacked: the settings are the demo's.

Writes selectors.json and selectors.md, and the figure where asked for (needs matplotlib).
"""

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from selection_cost import FAULTS, ranking_quality

from pharmacist.core.errors import PharmacistError
from pharmacist.core.files import read_json, write_json, write_text
from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import set_quiet
from pharmacist.evaluation.statistics import curve_area, t_interval
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.pipeline.attack import AttackOptions, attack
from pharmacist.pipeline.curate import CurateOptions, curate
from pharmacist.pipeline.demo import ALIGN, ATTACK, FRACTION, LORA, STEPS
from pharmacist.pipeline.evaluate import EvaluateOptions, evaluate
from pharmacist.selectors import SELECTORS
from pharmacist.training.options import LoraOptions
from pharmacist.worlds import BASE_MODEL, World


POOLS = {"0 %": 0.0, "5 %": 0.05, "15 %": 0.15}
MAIN = "5 %"
VARIANTS = {
    "seal, Alg. 2": {"name": "seal", "auxiliary": False},
    "seal, by logits": {"name": "seal", "rank_by": "logits"},
    "toxic-lora": {"name": "toxic-lora"},
    "less, exact": {"name": "less", "features": "exact"},
    "pharmacist, with twins": {"name": "pharmacist", "form": "both"},
    "pharmacist, contrast alone": {"name": "pharmacist", "form": "bilevel"},
}
LINES = (
    {name: {"name": name} for name in SELECTORS.names()}
    | {"classifier+embedding": {"name": "classifier+embedding"}}
    | VARIANTS
)
ABLATIONS = {"seal, by logits", "pharmacist, contrast alone"}
"""Run on the main pool alone, and not carried on to an attack."""
NOT_THE_SELECTOR = ("read", "find duplicates")
"""Phases of curate that cost the same whatever the selector."""
DEFENSES = {"sft": {"name": "sft"}, "vaccine": {"name": "vaccine", "rho": 0.1}}
"""With the strength of `recipes/embedded.yaml`, which was chosen on another world."""


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace(" %", "-percent")).strip("-")


def write_world(folder, mislabel, seed, rows):
    """Writes one pool and its references; returns their files and the label of each row."""
    world = World(seed)
    pool, labels = world.pool(rows, mislabel=mislabel)
    sets = {
        "pool": pool,
        "safe": world.safe(),
        "harmful": world.harmful(),
        "utility": world.utility(),
        "attack": world.attack_harmful(64, ("potions",)),
        "task": world.task_train(640),
        "task-test": world.task_test(150),
        "prompts": world.eval_prompts(120),
        "borderline": world.borderline(60),
        **{f"judge-{name}": rows for name, rows in world.judge_references().items()},
    }
    for name, items in sets.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    return {name: str(folder / f"{name}.jsonl") for name in sets}, labels


# --- in processes of their own --------------------------------------------------------------------------------------


def job(record, function, *arguments):
    """Runs a function, adds the largest memory of this process to what it returns, and writes it."""
    set_quiet(True)
    try:
        found = function(*arguments)
    except PharmacistError as error:
        found = {"skipped": str(error)}
    write_json(record, found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def sft_epoch(files, folder, seed):
    epoch = {"num_train_epochs": 1, "per_device_train_batch_size": 16}
    align(
        AlignOptions(
            data=files["pool"], model=str(BASE_MODEL), train=epoch, seed=seed, quiet=True, output_dir=str(folder)
        )
    )
    phase = read_manifest(folder).phases["train"]
    return {"seconds": phase.seconds, "tokens": phase.tokens}


def rank(files, labels, choice, folder, seed, model=BASE_MODEL):
    references = {name: files[name] for name in ("safe", "harmful", "utility")}
    curate(
        CurateOptions(
            pool=files["pool"],
            model=str(model),
            selector=choice,
            top=FRACTION,
            seed=seed,
            quiet=True,
            output_dir=str(folder),
            **references,
        )
    )
    table = pd.read_parquet(folder / "scores.parquet")
    phases = read_manifest(folder).phases
    return ranking_quality(table["score"].to_numpy(), pd.Series(labels)) | {
        "seconds": sum(phase.seconds for name, phase in phases.items() if name not in NOT_THE_SELECTOR),
        "tokens": sum(phase.tokens for phase in phases.values()),
    }


def align_attack_evaluate(data, files, defense, folder, seed, model=BASE_MODEL, lora=LORA):
    """Harmful score over the attack's steps, accuracy and over-refusal of a model aligned on `data`, in percent."""
    common = {"seed": seed, "quiet": True}
    aligned = align(
        AlignOptions(
            data=data,
            model=str(model),
            defense=dict(defense),
            train=dict(ALIGN),
            lora=LoraOptions(**lora),
            output_dir=str(folder / "align"),
            **common,
        )
    )
    attacked = folder / "attack"
    attack(
        AttackOptions(
            model=str(folder / "align"),
            task=files["task"],
            harmful=files["attack"],
            poison_ratio=0.1,
            samples=640,
            snapshots=list(STEPS[1:-1]),
            train=dict(ATTACK),
            lora=LoraOptions(**lora),
            output_dir=str(attacked),
            **common,
        )
    )
    models = {0: folder / "align", **{step: attacked / "snapshots" / f"step-{step}" for step in STEPS[1:-1]}}
    metrics = []
    for step, place in (models | {STEPS[-1]: attacked}).items():
        ends = {"benign_prompts": files["borderline"], "task": files["task-test"]} if step in (0, STEPS[-1]) else {}
        judge = {name: files[f"judge-{name}"] for name in ("safe", "harmful", "utility")}
        metrics.append(
            evaluate(
                EvaluateOptions(
                    model=str(place),
                    prompts=files["prompts"],
                    judge={"name": "probe"},
                    max_new_tokens=32,
                    output_dir=str(folder / f"evaluate-{step}"),
                    **ends,
                    **judge,
                    **common,
                )
            ).metrics
        )
    curve = [point["harmful_score"]["value"] for point in metrics]
    return {
        "curve": curve,
        "area": curve_area(STEPS, curve),
        "align_seconds": aligned.seconds,
        "fine_tune_accuracy": metrics[-1]["fine_tune_accuracy"]["value"],
        "over_refusal": [metrics[0]["over_refusal"]["value"], metrics[-1]["over_refusal"]["value"]],
    }


# --- the grid -------------------------------------------------------------------------------------------------------


def measured(processes, record, function, *arguments):
    """What `function` found, from its record where it is done already, else in a process of its own."""
    if not record.is_file():
        process = processes.Process(target=job, args=(record, function, *arguments))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{record.stem}: failed")
    return read_json(record)


def cells(name, seeds):
    """Pools and seeds that a selector is run on."""
    return [(pool, seed) for pool in POOLS for seed in seeds if pool == MAIN or name not in ABLATIONS]


def run_rankings(root, names, seeds, rows, processes):
    found, least = {name: {} for name in names}, float("inf")
    for pool, mislabel in POOLS.items():
        for seed in seeds:
            folder = root / f"{slug(pool)}-{seed}"
            files, labels = write_world(folder / "data", mislabel, seed, rows)
            epoch = measured(processes, folder / "sft.json", sft_epoch, files, folder / "sft", seed)
            least = min(least, epoch["seconds"])
            for name in names:
                if (pool, seed) not in cells(name, seeds):
                    continue
                record = folder / f"rank-{slug(name)}.json"
                start = time.perf_counter()
                got = measured(processes, record, rank, files, labels, LINES[name], folder / slug(name), seed)
                print(f"{pool}, seed {seed}: {name}: {time.perf_counter() - start:.0f} s", flush=True)
                if "skipped" in got:
                    print(f"  left out: {got['skipped']}", flush=True)
                else:
                    passes = got["tokens"] / epoch["tokens"]
                    found[name].setdefault(pool, []).append(got | {"passes": passes, "seed": seed})
    for name in names:
        for run in every_run(found[name]):
            run["cost"] = run["seconds"] / least  # the pools are of one size
    return {name: pools for name, pools in found.items() if pools}


def run_downstream(root, names, seed, rows, processes, found):
    folder = root / f"{slug(MAIN)}-{seed}"
    files, _ = write_world(folder / "data", POOLS[MAIN], seed, rows)
    for defense in DEFENSES:
        for name in names:
            data = files["pool"] if name == "full" else str(folder / slug(name) / "selected.jsonl")
            if not Path(data).is_file():
                continue
            place = folder / "downstream" / f"{slug(name)}-{defense}"
            record = place.with_suffix(".json")
            place.parent.mkdir(exist_ok=True)
            start = time.perf_counter()
            got = measured(processes, record, align_attack_evaluate, data, files, DEFENSES[defense], place, seed)
            print(f"{defense} on {name}: {time.perf_counter() - start:.0f} s", flush=True)
            found.setdefault(name, {})[defense] = got


# --- tables and figure ----------------------------------------------------------------------------------------------


def with_interval(values):
    """Mean and interval of three seeds or more, else the values themselves."""
    if len(values) < 3:
        return " / ".join(f"{value:.3f}" for value in values)
    estimate = t_interval(values, bounds=(0.0, 1.0))
    return f"{estimate.value:.3f} " + ("" if estimate.missing else f"[{estimate.low:.3f}, {estimate.high:.3f}]")


def average(runs, key):
    values = [run[key] for run in runs if key in run]
    return f"{np.mean(values):.3f}" if values else ""


def in_order(rankings):
    return sorted(rankings, key=lambda name: -np.mean([run["auc"] for run in rankings[name][MAIN]]))


def every_run(pools):
    return [run for runs in pools.values() for run in runs]


def ranking_table(rankings):
    head = [
        "selector",
        *(f"AUC, {pool}" for pool in POOLS),
        f"good in top 30 %, {MAIN}",
        *FAULTS,
        "SFT epochs",
        "passes",
        "peak MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in in_order(rankings):
        pools, main = rankings[name], rankings[name][MAIN]
        cell = [name, *(with_interval([run["auc"] for run in pools[pool]]) if pool in pools else "" for pool in POOLS)]
        cell += [average(main, key) for key in ("purity", *FAULTS)]
        runs = every_run(pools)
        # The least: whatever else the machine does can only make a run longer.
        cell += [f"{min(run[key] for run in runs):.2f}" for key in ("cost", "passes")]
        cell += [f"{max(run['peak_mb'] for run in runs):.0f}"]
        lines.append("| " + " | ".join(cell) + " |")
    return "\n".join(lines)


def downstream_table(downstream):
    head = ["aligned on"]
    for defense in DEFENSES:
        head += [f"{defense}: harmful score over the attack", "after it", "accuracy", "over-refusal, before / after"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in sorted(downstream, key=lambda name: downstream[name]["sft"]["area"]):
        cell = [name if name == "full" else f"30 % by {name}"]
        for defense in DEFENSES:
            got = downstream[name].get(defense)
            if got is None:
                cell += [""] * 4
                continue
            before, after = got["over_refusal"]
            cell += [
                f"{got['area']:.1f}",
                f"{got['curve'][-1]:.1f}",
                f"{got['fine_tune_accuracy']:.1f}",
                f"{before:.1f} / {after:.1f}",
            ]
        lines.append("| " + " | ".join(cell) + " |")
    return "\n".join(lines)


def draw(rankings, path):
    """Quality against cost: AUC on the 5 % pool (dot: mean over seeds, line: range) over SFT epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "selectors"
    figure, axes = plt.subplots(figsize=(10, 6))
    texts = []
    for name in in_order(rankings):
        values = [run["auc"] for run in rankings[name][MAIN]]
        cost = max(0.01, min(run["cost"] for run in every_run(rankings[name])))
        color = "#00796b" if name.startswith("pharmacist") else "#5f6b7a"
        axes.plot([cost, cost], [min(values), max(values)], color=color, linewidth=1)
        axes.plot(cost, np.mean(values), "o", color=color, markersize=5)
        texts.append(
            axes.annotate(
                name,
                (cost, np.mean(values)),
                xytext=(7, -3),
                textcoords="offset points",
                fontsize=8,
                color=color,
                arrowprops={"arrowstyle": "-", "color": "#b0b7c0", "linewidth": 0.5},
            )
        )
    axes.axhline(0.5, color="#b0b7c0", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("cost in LoRA SFT epochs over the pool (0.01: that or less)")
    axes.set_ylabel(f"AUC of good rows against faults, {MAIN} mislabelled")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.canvas.draw()
    placed = []
    for text in texts:  # from the top: each label goes down until it covers no other (the line to its dot may)
        while any(Text.get_window_extent(text).overlaps(other) for other in placed):
            x, y = text.get_position()
            text.set_position((x, y - 3))
        placed.append(Text.get_window_extent(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--downstream", action="store_true")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    root, seeds = arguments.output_dir, list(range(arguments.seeds))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pharmacist.nn.models", "pharmacist.nn.adapters", "datasets", "sklearn", "trl"])
    n_rankings = sum(len(cells(name, seeds)) for name in arguments.only)
    print(f"{n_rankings} rankings" + (f", {len(arguments.only) * len(DEFENSES)} alignments" * arguments.downstream))
    rankings = run_rankings(root, arguments.only, seeds, arguments.rows, processes)
    result = {"rows": arguments.rows, "seeds": seeds, "rankings": rankings, "downstream": {}}
    write_json(root / "selectors.json", result)
    tables = [ranking_table(rankings)]
    if arguments.downstream:
        run_downstream(
            root,
            [name for name in rankings if name not in ABLATIONS],
            seeds[0],
            arguments.rows,
            processes,
            result["downstream"],
        )
        write_json(root / "selectors.json", result)
        tables.append(downstream_table(result["downstream"]))
    text = "\n\n".join(tables) + "\n"
    write_text(root / "selectors.md", text)
    print(text)
    if arguments.figure is not None:
        draw(rankings, arguments.figure)


if __name__ == "__main__":
    main()
