"""Every selector on pools of 10 000 and 100 000 synthetic rows: time, memory, disk, and what grows with the pool.

    python benchmarks/selector_scale.py FOLDER [--only less k-center] [--rows 10000] [--table]

Each cell runs in a process of its own that has ranked 300 rows before, so that libraries are loaded; a record of each
is kept in FOLDER/records and is not measured again. The model is a random one-layer Llama: of width 256 for what
compares hidden states, so that points are as wide as they can be, and of width 16 for all others, so that training
over 100 000 rows ends; `less`, `seal`, `unrolled` and `toxic-lora` take batches of 512, and `less` and `seal` train
for one epoch. Rows have about 12 tokens. Lines that begin with `curate` are the whole command, page included.

Seconds are of processor time, in all threads: OMP_NUM_THREADS=1 makes them those of one core. The records have the
seconds by the clock as well.

Memory is the largest anonymous resident memory of the process while it ranks (read every 50 ms), less what it had
before; pages of files that the system can drop at any time are not in it, but in `with_files_mib` of the records.
"""

import argparse
import json
import multiprocessing
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np

from pharmacist.core.errors import PharmacistError
from pharmacist.core.files import atomic_write, read_json, write_json
from pharmacist.core.progress import silenced
from pharmacist.selectors import SELECTORS


WORDS = [f"w{i}" for i in range(60)]
WIDE, NARROW = 256, 16
FLAT = 320
"""Bytes of memory per row, 40 numbers, up to which growth counts as flat: scores and signals are about ten."""
WARM_UP = 300
GEOMETRIC = ("embedding", "k-center", "facility-location", "deita")
BRIEF = {"batch_size": 512, "epochs": 1}
"""What trains on the pool, in brief: what grows with the pool is the same after one epoch, and in batches of 16 (the
default) a model this small spends its time between them."""
LINES = {name: {"name": name} for name in SELECTORS.names()} | {
    "classifier+embedding": {"name": "classifier+embedding"},
    "less": {"name": "less", **BRIEF},
    "less, exact": {"name": "less", "features": "exact", **BRIEF},
    "seal": {"name": "seal", **BRIEF},
    "seal, Alg. 2": {"name": "seal", "auxiliary": False, **BRIEF},
    "unrolled": {"name": "unrolled", "batch_size": 512},
    "toxic-lora": {"name": "toxic-lora", "batch_size": 512},
    "grand, by lora": {"name": "grand", "by": "lora"},
    "pharmacist, lexical + probe": {"name": "pharmacist", "form": "evidence", "readers": "lexical,probe"},
}
COMMANDS = {
    "curate length": {},
    "curate length, near-duplicates": {"diversity": "near-duplicates"},
    "curate length, k-center": {"diversity": "k-center"},
    "curate length, facility-location": {"diversity": "facility-location"},
    "curate length, balance": {"balance": "category"},
}


def width(name: str) -> int:
    """Of the model that a line is measured with."""
    return WIDE if name in COMMANDS or any(part in GEOMETRIC for part in LINES[name]["name"].split("+")) else NARROW


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- what is ranked -------------------------------------------------------------------------------------------------


def make_model(folder: Path, hidden: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with atomic_write(path, "w") as file:
        for _ in range(n):
            prompt, completion = (" ".join(rng.choice(WORDS, size=rng.integers(3, 8))) for _ in range(2))
            row = {"prompt": prompt, "completion": completion, "category": f"c{rng.integers(20)}"}
            file.write(json.dumps(row) + "\n")


def prepare(folder: Path, sizes: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for hidden in (WIDE, NARROW):
        if not (folder / f"model-{hidden}" / "tokenizer.json").is_file():
            make_model(folder / f"model-{hidden}", hidden)
    for seed, kind in enumerate(("safe", "harmful", "utility")):
        if not (folder / f"{kind}.jsonl").is_file():
            write_rows(folder / f"{kind}.jsonl", 64, 100 + seed)
    for n in (WARM_UP, *sizes):
        if not (folder / f"pool-{n}.jsonl").is_file():
            write_rows(folder / f"pool-{n}.jsonl", n, 0)


# --- measuring ------------------------------------------------------------------------------------------------------


class Cost:
    """Time of this process inside the block, and its largest resident memory in MiB more than before it."""

    def __enter__(self) -> "Cost":
        self._done, self._clock = threading.Event(), (time.process_time(), time.perf_counter())
        self._start = self._peak = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        clock = time.process_time(), time.perf_counter()
        self._done.set()
        self._thread.join()
        seconds = [round(end - start, 1) for end, start in zip(clock, self._clock, strict=True)]
        mib = [round((peak - start) / 1024) for peak, start in zip(self._peak, self._start, strict=True)]
        self.found = {"seconds": seconds[0], "by_clock": seconds[1], "memory_mib": mib[0], "with_files_mib": mib[1]}

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._peak = tuple(map(max, self._peak, self._now()))

    @staticmethod
    def _now() -> tuple[int, ...]:
        status = Path("/proc/self/status").read_text()
        own, every = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("RssAnon", "VmRSS"))
        return own, every


def by_selector(name: str, rows: int, folder: Path, work: Path) -> dict[str, float]:
    from pharmacist.core.rundir import RunDir, RunOptions
    from pharmacist.data.formats import open_source
    from pharmacist.data.records import read_records
    from pharmacist.selectors.base import SelectionContext

    run = RunDir.open(RunOptions(output_dir=str(work)), stage="scale", version=1, inputs={})

    def records(path: Path) -> object:
        return read_records(open_source(str(path), name=path.stem), work_dir=run.work("data", path.stem))

    context = SelectionContext(
        run=run,
        pool=records(folder / f"pool-{rows}.jsonl"),
        references={kind: records(folder / f"{kind}.jsonl") for kind in ("safe", "harmful", "utility")},
        model_name=str(folder / f"model-{width(name)}"),
        seed=0,
        device="cpu",
    )
    selector = SELECTORS.build_from(LINES[name])
    if selector.needs & {"model", "embedder"} or LINES[name]["name"] == "pharmacist":
        _ = context.encoded_pool
    before = _size(work)
    with Cost() as cost:
        scores = selector.rank(context)
    run.close()
    assert np.isfinite(scores.score).all()
    assert len(scores.score) == rows
    return cost.found | {"disk_mib": round((_size(work) - before) / 2**20)}


def by_command(name: str, rows: int, folder: Path, work: Path) -> dict[str, float]:
    from pharmacist.pipeline.curate import CurateOptions, curate

    with Cost() as cost:
        curate(
            CurateOptions(
                pool=str(folder / f"pool-{rows}.jsonl"),
                model=str(folder / f"model-{width(name)}"),
                device="cpu",
                selector={"name": "length"},
                quiet=True,
                output_dir=str(work),
                **COMMANDS[name],
            )
        )
    return cost.found | {"disk_mib": round(_size(work) / 2**20)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@silenced()
def cell(name: str, rows: int, folder: Path, record: Path) -> None:
    measure = by_command if name in COMMANDS else by_selector
    work = folder / f"work-{record.stem}"
    found = {}
    for size in (WARM_UP, rows):
        shutil.rmtree(work, ignore_errors=True)
        try:
            found = measure(name, size, folder, work)
        except PharmacistError as error:
            found = {"refused": str(error)}
    shutil.rmtree(work, ignore_errors=True)
    write_json(record, {"line": name, "rows": rows, "width": width(name)} | found)


# --- the table ------------------------------------------------------------------------------------------------------


def table(folder: Path, names: list[str], sizes: list[int]) -> str:
    head = ["selector", "width"]
    for kind in ("s", "MiB", "disk MiB"):
        head += [f"{kind}, {n} rows" for n in sizes]
    lines = ["| " + " | ".join([*head, "memory flat?"]) + " |", "|---|" + "---:|" * (len(head) - 1) + "---|"]
    for name in names:
        paths = [folder / "records" / f"{slug(name)}-{n}.json" for n in sizes]
        got = [read_json(path) if path.is_file() else {} for path in paths]
        if not any(got):
            continue
        row = [name, str(width(name))]
        for key, places in (("seconds", 1), ("memory_mib", 0), ("disk_mib", 0)):
            row += [f"{one[key]:.{places}f}" if key in one else "refused" * ("refused" in one) for one in got]
        first, last = got[0], got[-1]
        flat = next((one["refused"] for one in got if "refused" in one), "")
        if "memory_mib" in first and "memory_mib" in last and sizes[-1] > sizes[0]:
            more = last["memory_mib"] - first["memory_mib"]
            per_row = more * 2**20 / (sizes[-1] - sizes[0])
            flat = f"{'yes' if per_row <= FLAT else 'no'}: {more:+d} MiB, {max(0, per_row):.0f} bytes per row"
        lines.append("| " + " | ".join([*row, flat]) + " |")
    return "\n".join(lines)


def main() -> None:
    every = [*LINES, *COMMANDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="LINE")
    parser.add_argument("--table", action="store_true", help="print what is recorded, and measure nothing")
    options = parser.parse_args()
    sizes = sorted(options.rows)
    failed = False
    if not options.table:
        prepare(options.folder, sizes)
        (options.folder / "records").mkdir(exist_ok=True)
        # A fork of a process that has the libraries loaded, but has never used them.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["pharmacist.nn.models", "pharmacist.nn.adapters", "datasets", "sklearn"])
        for rows in sizes:
            for name in options.only:
                record = options.folder / "records" / f"{slug(name)}-{rows}.json"
                if not record.is_file():
                    worker = processes.Process(target=cell, args=(name, rows, options.folder, record))
                    worker.start()
                    worker.join()
                    failed |= not record.is_file()
                    said = json.dumps(read_json(record)) if record.is_file() else f"{name}, {rows} rows: failed"
                    print(said, flush=True)
    print(table(options.folder, options.only, sizes))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
