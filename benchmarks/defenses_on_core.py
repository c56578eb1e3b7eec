"""Every alignment-stage defense on a curated core subset of your own pool: loss, time and memory.

    python benchmarks/defenses_on_core.py --pool POOL --safe S --harmful H --utility U --model MODEL --output-dir DIR

The pool is ranked by the selector's evidence form, and each defense trains on the top 30 % in a process of its own,
one after the other. Its time is that of the training alone, its memory the process's largest; the loss is the plain
one over the core subset and over the harmful references, before and after, so that it means the same in all lines.
RepNoise pairs rows by number: pools seldom hold harmful answers to their own prompts.
Every line is an ordinary folder of `pharmacist align`, so the benchmark resumes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from pharmacist.core.files import read_json, write_json
from pharmacist.core.manifest import read_manifest
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.data.tokenize import encode
from pharmacist.nn.batching import make_batch
from pharmacist.nn.losses import row_losses
from pharmacist.nn.models import load_model
from pharmacist.pipeline.curate import CurateOptions, curate


LINES = {
    "sft": [],
    "vaccine": [],
    "t-vaccine": ["--defense.layers", "1"],
    "repnoise": ["--pair-by", "row"],
    "booster": [],
    "tar, 16 inner steps": ["--defense.inner_steps", "16"],
    "tar, one step": ["--defense.form", "one-step"],
}


@torch.inference_mode()
def mean_loss(model, rows):
    """Mean loss per completion token of the rows' means, in nats."""
    loaded = load_model(str(model))
    encoded = encode(rows, loaded.tokenizer, loaded.template, max_length=loaded.max_length, on_long_prompt="cut")
    losses = []
    for start in range(0, len(encoded), 20):
        batch = make_batch(encoded, range(start, min(start + 20, len(encoded))), loaded.device)
        logits = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        losses += row_losses(logits, batch.input_ids, batch.lengths, batch.prompt_lengths).completion.tolist()
    return sum(losses) / len(losses)


def run(command, record):
    """Runs a command in a process of its own and keeps the most memory that it took, in bytes."""
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    before = read_json(record)["bytes"] if record.exists() else 0
    write_json(record, {"bytes": max(before, used.ru_maxrss * 1024)})  # a resumed run counts both its processes
    return read_json(record)["bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pool", "safe", "harmful", "utility", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES))
    arguments = parser.parse_args()
    root = arguments.output_dir
    curate(
        CurateOptions(
            pool=arguments.pool,
            safe=arguments.safe,
            harmful=arguments.harmful,
            utility=arguments.utility,
            model=arguments.model,
            selector={"name": "pharmacist", "form": "evidence", "readers": "lexical,probe"},
            top=0.3,
            output_dir=str(root / "core"),
        )
    )
    core = str(root / "core" / "selected.jsonl")
    sets = {
        "core": read_records(open_source(core), work_dir=root / "rows-core").dataset,
        "harmful": read_records(open_source(arguments.harmful), work_dir=root / "rows-harmful").dataset,
    }
    found = {"before": {name: mean_loss(arguments.model, rows) for name, rows in sets.items()}}
    for line in arguments.only:
        folder = root / line.replace(", ", "-").replace(" ", "-")
        command = [
            sys.executable,
            "-m",
            "pharmacist",
            "align",
            "--data",
            core,
            "--model",
            arguments.model,
            "--defense",
            line.split(",")[0],
            *LINES[line],
            "--train.max_steps",
            str(arguments.steps),
            "--train.learning_rate",
            "5e-4",
            "--train.logging_steps",
            "10",
            "--on-long-prompt",
            "cut",
            "--output-dir",
            str(folder),
            "--quiet",
        ]
        if line != "sft":
            command += ["--harmful", arguments.harmful]
        memory = run(command, root / f"{folder.name}.json")
        manifest = read_manifest(folder)
        found[line] = {name: mean_loss(folder, rows) for name, rows in sets.items()} | {
            "seconds": manifest.phases["train"].seconds,
            "bytes": memory,
            "counts": manifest.counts,
        }
        write_json(root / "defenses.json", found)
    print("| defense | loss, core | loss, harmful references | time | time / SFT | peak memory |\n" + "|---" * 6 + "|")
    first = found["before"]
    print(f"| before alignment | {first['core']:.3f} | {first['harmful']:.3f} |  |  |  |")
    for line in arguments.only:
        own = found[line]
        ratio = f"{own['seconds'] / found['sft']['seconds']:.2f}" if "sft" in found else ""
        print(
            f"| {line} | {own['core']:.3f} | {own['harmful']:.3f} | {own['seconds']:.0f} s | {ratio} | "
            f"{own['bytes'] / 2**20:.0f} MB |"
        )


if __name__ == "__main__":
    main()
