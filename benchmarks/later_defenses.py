"""Defenses during and after a user's fine-tuning, on the made-up world: what each takes and what it costs.

    python benchmarks/later_defenses.py OUTPUT_DIR [--seeds 3] [--first-seed 0] [--arms none lisa ...]

For each seed one model is aligned on 300 clean rows and attacked (640 rows, a tenth harmful, 64 steps) with each
fine-tuning-stage defense; repairs start from the undefended attack. The defender's safe rows are the alignment rows.
Prints a Markdown table (for docs/results.md) and writes table.json. Interrupted, the benchmark resumes.
"""

import argparse
import json
from pathlib import Path

from pharmacist.core.files import write_json, write_text
from pharmacist.evaluation.statistics import t_interval
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.pipeline.attack import AttackOptions, attack
from pharmacist.pipeline.demo import ALIGN, ATTACK, LORA
from pharmacist.pipeline.evaluate import EvaluateOptions, evaluate
from pharmacist.pipeline.repair import RepairOptions, repair
from pharmacist.training.options import LoraOptions
from pharmacist.worlds import BASE_MODEL, World


# Chosen on the world of seed 9, which no reported run uses: of a few values each, that with the lowest harmful score
# that keeps accuracy within 3 points of no defense; where none does, the one with the highest accuracy.
DEFENSES = {
    "none": {}, "lisa": {"align_steps": 2, "finetune_steps": 6, "rho": 0.1}, "ldifs": {"lam": 0.3},
    "ewc": {"lam": 1000.0}, "kl": {"lam": 0.25}, "vlguard": {"share": 0.2}, "constrained-sft": {"beta": 0.02},
}  # fmt: skip
REPAIRS = {
    "antidote": {"alpha": 0.05}, "nlsr": {"prune_rate": 0.5}, "safe-lora": {"select": "number", "number": 1},
}  # fmt: skip
MEASURES = {
    "harmful_score": "harmful score", "fine_tune_accuracy": "fine-tune accuracy", "over_refusal": "over-refusal"
}  # fmt: skip


def write_world(folder, seed):
    world = World(seed)
    sets = {
        "aligned": world.clean_pool(300)[0], "harmful": world.harmful(), "attack": world.attack_harmful(64),
        "task": world.task_train(640), "task-test": world.task_test(150), "prompts": world.eval_prompts(120),
        "borderline": world.borderline(60),
        **{f"judge-{name}": rows for name, rows in world.judge_references().items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in sets}


def measure(model, folder, files, common):
    metrics = evaluate(EvaluateOptions(
        model=model, prompts=files["prompts"], benign_prompts=files["borderline"], task=files["task-test"],
        judge={"name": "probe"}, max_new_tokens=32, output_dir=str(folder), **common,
        **{name: files[f"judge-{name}"] for name in ("safe", "harmful", "utility")},
    )).metrics  # fmt: skip
    return {name: metrics[name]["value"] for name in MEASURES}


def run_seed(folder, seed, arms):
    """Figures per arm; the arm 'aligned' is the model before the attack."""
    files = write_world(folder / "data", seed)
    common = {"seed": seed, "device": "cpu", "quiet": True}
    lora = LoraOptions(**LORA)
    aligned = str(folder / "align")
    align(AlignOptions(
        data=files["aligned"], model=str(BASE_MODEL), train=dict(ALIGN), lora=lora, output_dir=aligned, **common
    ))  # fmt: skip
    found = {"aligned": measure(aligned, folder / "evaluate-aligned", files, common)}
    for arm in ["none", *(arm for arm in arms if arm != "none")]:
        model = str(folder / arm)
        if arm in REPAIRS:
            repair(RepairOptions(
                model=str(folder / "none"), aligned=aligned, method={"name": arm, **REPAIRS[arm]},
                form="weights" if arm == "nlsr" else "auto", harmful=files["harmful"], safe=files["aligned"],
                output_dir=model, **common,
            ))  # fmt: skip
        else:
            name = {"none": "sft"}.get(arm, arm)
            attack(AttackOptions(
                model=aligned, task=files["task"], harmful=files["attack"], poison_ratio=0.1, samples=640,
                defense={"name": name, **DEFENSES[arm]}, safe=files["aligned"], train=dict(ATTACK), lora=lora,
                disjoint_from=[files["prompts"], files["task-test"]], output_dir=model, **common,
            ))  # fmt: skip
        found[arm] = measure(model, folder / f"evaluate-{arm}", files, common)
        print(seed, arm, found[arm], flush=True)
    return found


def cell(values):
    estimate = t_interval(values)
    return f"{estimate.value:.1f}" + (f" [{estimate.low:.1f}, {estimate.high:.1f}]" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=[*DEFENSES, *REPAIRS], default=[*DEFENSES, *REPAIRS])
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    found = [run_seed(arguments.output_dir / f"seed-{seed}", seed, arguments.arms) for seed in seeds]
    write_json(
        arguments.output_dir / "table.json", {"seeds": list(seeds), "settings": DEFENSES | REPAIRS, "found": found}
    )
    print("| method | " + " | ".join(MEASURES.values()) + " | harmful score - none | accuracy - none |")
    print("|---" * (len(MEASURES) + 3) + "|")
    for arm in found[0]:
        cells = [cell([one[arm][name] for one in found]) for name in MEASURES]
        changes = [cell([one[arm][name] - one["none"][name] for one in found]) for name in list(MEASURES)[:2]]
        print(
            "| "
            + " | ".join([arm, *cells, *([] if arm == "none" else changes)])
            + (" | | |" if arm == "none" else " |")
        )


if __name__ == "__main__":
    main()
