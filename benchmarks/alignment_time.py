"""How much shorter is alignment on a subset? The alignments of a finished grid once more, side by side.

    python benchmarks/alignment_time.py GRID_FOLDER OUTPUT_DIR [--seed 0] [--rounds 1] [--selectors full pharmacist]

A grid's own wall times come from different hours of a machine that may do other work. This runs the alignments of one
seed again, with the options and data that the stages had: for each defense all subsets one after the other,
in one process, on one thread, and takes the process's own time of the training, the least of the rounds. Prints a
Markdown table of seconds, and of the difference from the first selector.
"""

import argparse
import time
from pathlib import Path

import torch

from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import set_quiet
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.training.options import LoraOptions


def alignments(grid, seed):
    """(defense, selector) -> options of the grid's alignments of one seed."""
    found = {}
    for folder in sorted((grid / "stages").glob("align-*")):
        config = read_manifest(folder).config
        if config["seed"] == seed:
            selection = read_manifest(grid / "stages" / Path(config["data"]).parent.name)
            ranking = read_manifest(grid / "stages" / Path(selection.config["ranking"]).name)
            found[config["defense"]["name"], ranking.config["selector"]["name"]] = config
    return found


def seconds(config, folder):
    """Process time of the alignment's training, model and rows read before it included."""
    start = time.process_time()
    align(AlignOptions(**config | {
        "output_dir": str(folder), "lora": LoraOptions(**config["lora"]), "quiet": True, "overwrite": True,
    }))  # fmt: skip
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--selectors", nargs="+", default=["full", "pharmacist"])
    arguments = parser.parse_args()
    set_quiet(True)
    torch.set_num_threads(1)
    found = alignments(arguments.grid, arguments.seed)
    seconds(found["sft", arguments.selectors[0]], arguments.output_dir / "warm-up")
    head = [f"{name}, s" for name in arguments.selectors] + [
        f"{name} - {arguments.selectors[0]}" for name in arguments.selectors[1:]
    ]
    print("| defense | " + " | ".join(head) + " |\n|" + "---|" * (len(head) + 1))
    for defense in dict.fromkeys(defense for defense, _ in found):
        least = dict.fromkeys(arguments.selectors, float("inf"))
        for _ in range(arguments.rounds):
            for name in arguments.selectors:
                least[name] = min(least[name], seconds(found[defense, name], arguments.output_dir / defense / name))
        full = least[arguments.selectors[0]]
        cells = [f"{value:.1f}" for value in least.values()]
        cells += [f"{100 * (least[name] / full - 1):+.0f} %" for name in arguments.selectors[1:]]
        print(f"| {defense} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
