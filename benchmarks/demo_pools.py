"""The demo's comparison on pools with 0 %, 5 % and 15 % mislabelled rows, and on a clean pool.

    python benchmarks/demo_pools.py OUTPUT_DIR [--seeds 3]

About three minutes per pool on two cores. Prints a Markdown table (for docs/results.md) and writes pools.json. Each
pool's folder is an ordinary folder of `pharmacist demo`; interrupted, the benchmark resumes.
"""

import argparse
from pathlib import Path

from pharmacist.core.files import write_json
from pharmacist.pipeline.demo import DemoOptions, demo


POOLS = {"0 %": {"mislabel": 0.0}, "5 %": {"mislabel": 0.05}, "15 %": {"mislabel": 0.15}, "clean": {"pool": "clean"}}
HEADER = (
    "| mislabelled | aligned on | harmful score, mean over the attack | after attack | fine-tune accuracy "
    "| over-refusal, aligned / attacked | alignment | ranking AUC |\n|---|---|---|---|---|---|---|---|"
)


def mean(values):
    return sum(values) / len(values)


def interval(found):
    ends = "none" if found["ci95"] is None else ", ".join(f"{end:.1f}" for end in found["ci95"])
    return f"{found['mean']:.1f} [{ends}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    pools = {}
    for name, options in POOLS.items():
        folder = arguments.output_dir / name.replace(" %", "-percent")
        result = demo(DemoOptions(output_dir=str(folder), seeds=arguments.seeds, **options))
        pools[name] = result.summary
        write_json(arguments.output_dir / "pools.json", pools)
    print(HEADER)
    for name, found in pools.items():
        for arm in found["arms"]:
            saved = found["time_saved"].get(arm)
            cells = [
                name,
                arm,
                interval(found["auc"][arm]),
                interval(found["final_harmful_score"][arm]),
                f"{mean(found['fine_tune_accuracy'][arm]):.1f}",
                f"{mean(found['over_refusal_aligned'][arm]):.1f} / {mean(found['over_refusal'][arm]):.1f}",
                f"{mean(found['alignment_seconds'][arm]):.1f} s" + (f" ({-saved:+.0f} %)" if saved else ""),
                f"{found['ranking']['auc']:.3f}" if arm == "core" else "",
            ]
            print("| " + " | ".join(cells) + " |")
    print("\n| mislabelled | core - full | core - random |\n|---|---|---|")
    for name, found in pools.items():
        differences = [interval(found["differences"][f"core - {arm}"]) for arm in ("full", "random")]
        print(f"| {name} | {' | '.join(differences)} |")


if __name__ == "__main__":
    main()
