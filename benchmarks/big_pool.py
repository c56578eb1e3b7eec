"""Reads, checks, de-duplicates and writes back a synthetic pool of a million rows, and measures time and memory.

    python benchmarks/big_pool.py --rows 1000000

All phases run in one fresh process, whose peak resident memory (file-backed pages included) is the figure reported.
The pool has rows of 60 words, 5 % of them exact and 5 % near-duplicates of earlier rows, so that what is found can be
checked. Exit code 1 where the limit of memory is passed or planted duplicates are missed.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet")
REFERENCES = 100
"""Rows of the pool whose prompts the overlap check looks for."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def make(path: Path, n: int, seed: int) -> None:
    """Writes the pool (JSON lines) and beside it what was planted."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 4))) for _ in range(20000)
    ]
    recent: list[tuple[str, str]] = []
    planted = {"exact": 0, "near": 0}
    with path.open("w", encoding="utf-8") as file:
        for number in range(n):
            kind = rng.random()
            if recent and kind < 0.10:
                prompt, completion = rng.choice(recent)
                if kind < 0.05:
                    planted["exact"] += 1
                    prompt = prompt.capitalize() + "?"
                else:
                    planted["near"] += 1
                    changed = completion.split()
                    changed[rng.randrange(len(changed))] = rng.choice(words) + "x"
                    completion = " ".join(changed)
            else:
                prompt, completion = " ".join(rng.choices(words, k=20)), " ".join(rng.choices(words, k=40))
                if len(recent) < 5000:
                    recent.append((prompt, completion))
                elif rng.random() < 0.05:
                    recent[rng.randrange(len(recent))] = prompt, completion
            row = {"id": f"row-{number}", "prompt": prompt, "completion": completion, "source": "made up"}
            file.write(json.dumps(row) + "\n")
    path.with_suffix(".planted").write_text(json.dumps(planted))


def convert(source: Path, target: Path) -> None:
    """Writes the pool in another format."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    name = target.name.removeprefix("pool.")
    if name == "jsonl.gz":
        with target.open("wb") as file:
            subprocess.run(["gzip", "-c", str(source)], stdout=file, check=True)
    elif name == "jsonl.zst":
        with pyarrow.CompressedOutputStream(str(target), "zstd") as out, source.open("rb") as file:
            while block := file.read(1 << 20):
                out.write(block)
    elif name == "json":
        with target.open("w", encoding="utf-8") as out, source.open(encoding="utf-8") as file:
            out.write("[")
            for number, line in enumerate(file):
                out.write(("," if number else "") + "\n" + line.rstrip("\n"))
            out.write("\n]\n")
    elif name != "jsonl":
        table = pyarrow.json.read_json(source)
        if name == "csv":
            pyarrow.csv.write_csv(table, target)
        else:
            pyarrow.parquet.write_table(table, target)


def work(pool: Path, folder: Path) -> None:
    """The measured process."""
    import numpy as np

    from pharmacist.data.duplicates import find_duplicates
    from pharmacist.data.formats import open_source, write_rows
    from pharmacist.data.mixing import shared_prompts
    from pharmacist.data.records import read_records, to_dataset

    report: dict[str, object] = {}
    seconds: dict[str, float] = {}
    peak: dict[str, float] = {}

    def done(phase: str, start: float) -> float:
        seconds[phase] = round(time.perf_counter() - start, 1)
        peak[phase] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return time.perf_counter()

    clock = time.perf_counter()
    source = open_source(pool)
    report["sha256"] = source.fingerprint()
    clock = done("fingerprint", clock)
    records = read_records(source, work_dir=folder / "rows", keep=True)
    clock = done("read and check", clock)
    reference = to_dataset([records.dataset[i] for i in range(REFERENCES)])
    report[f"shared with a reference of {REFERENCES} rows"] = len(shared_prompts(reference, records.dataset))
    clock = done("overlap check", clock)
    clusters = find_duplicates(records.dataset, work_dir=folder)
    clock = done("duplicates", clock)
    kept = np.flatnonzero(clusters == np.arange(len(clusters)))
    write_rows(records.source, records.row_numbers[kept].tolist(), folder / f"kept.{pool.name}")
    clock = done("write back", clock)
    report |= {"rows": len(records), "kept": len(kept), "seconds": seconds, "peak MB so far": peak}
    report["total seconds"] = round(sum(seconds.values()), 1)
    report["peak MB"] = max(peak.values())
    print(json.dumps(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-mb", type=float, default=1500.0)
    parser.add_argument("--phase", choices=("make", "work"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows < REFERENCES:
        parser.error(f"--rows {options.rows}: must be at least {REFERENCES}")
    if options.phase == "make":
        made = options.folder / "pool.jsonl"
        make(made, options.rows, options.seed)
        convert(made, options.folder / f"pool.{options.format}")
        return 0
    if options.phase == "work":
        work(options.folder / f"pool.{options.format}", options.folder / "work")
        return 0
    with tempfile.TemporaryDirectory(prefix="big-pool-") as folder:
        # Children of a small parent: the peak of a process counts what it inherits at its start.
        call = [sys.executable, __file__, "--rows", str(options.rows), "--format", options.format]
        call += ["--seed", str(options.seed), "--folder", folder, "--phase"]
        subprocess.run([*call, "make"], check=True)
        size = (Path(folder) / f"pool.{options.format}").stat().st_size
        printed = subprocess.run([*call, "work"], check=True, stdout=subprocess.PIPE, text=True).stdout
        report = json.loads(printed)
        planted = json.loads((Path(folder) / "pool.planted").read_text())
    report |= {"format": options.format, "file MB": round(size / 2**20), "planted": planted}
    found = report["rows"] - report["kept"]
    report["share of planted duplicates found"] = round(found / sum(planted.values()), 4)
    report["limit MB"] = options.limit_mb
    print(json.dumps(report, indent=2))
    return int(report["peak MB"] > options.limit_mb or report["share of planted duplicates found"] < 0.99)


if __name__ == "__main__":
    sys.exit(main())
