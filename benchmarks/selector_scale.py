"""Wall time and memory of selectors on pools of random rows, each in a process of its own.

Usage: python benchmarks/selector_scale.py FOLDER [--rows 10000 100000] [--selectors k-center el2n ...]

The model is a random one-layer Llama of width 256, so that states are as wide as points can be. Memory is the peak
resident size of the process while it ranks, less what it had before; pages of memory-mapped files count too.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil


WORDS = [f"w{i}" for i in range(500)]


def make_model(folder: Path) -> None:
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
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(n):
            prompt, completion = (" ".join(rng.choice(WORDS, size=rng.integers(3, 8))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def measure(name: str, rows: int, folder: Path, results: "multiprocessing.Queue[dict[str, object]]") -> None:
    from pharmacist.core.progress import set_quiet
    from pharmacist.core.rundir import RunDir, RunOptions
    from pharmacist.data.formats import open_source
    from pharmacist.data.records import read_records
    from pharmacist.selectors import SELECTORS
    from pharmacist.selectors.base import SelectionContext

    set_quiet(True)
    work = folder / f"work-{name}-{rows}"
    run = RunDir.open(RunOptions(output_dir=str(work)), stage="scale", version=1, inputs={})

    def records(path: Path) -> object:
        return read_records(open_source(str(path), name=path.stem), work_dir=run.work("data", path.stem))

    context = SelectionContext(
        run=run, pool=records(folder / f"pool-{rows}.jsonl"),
        references={kind: records(folder / f"{kind}.jsonl") for kind in ("safe", "harmful")},
        model_name=str(folder / "model"), seed=0, fraction=0.3, device="cpu",
    )  # fmt: skip
    _ = context.encoded_pool
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    scores = SELECTORS.build_from({"name": name}).rank(context)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    run.close()
    shutil.rmtree(work)
    assert np.isfinite(scores.score).all()
    results.put({
        "selector": name, "rows": rows, "seconds": round(seconds, 1), "peak_mib": round((peak[0] - before) / 2**20),
        "whole_process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    names = ["embedding", "k-center", "facility-location", "el2n", "grand", "deita", "loss-low+embedding"]
    parser.add_argument("--selectors", nargs="+", default=names)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    if not (options.folder / "model" / "config.json").is_file():
        maker = spawn.Process(target=make_model, args=(options.folder / "model",))
        maker.start()
        maker.join()
        for seed, kind in enumerate(("safe", "harmful")):
            write_rows(options.folder / f"{kind}.jsonl", 64, 100 + seed)
    for rows in options.rows:
        if not (options.folder / f"pool-{rows}.jsonl").is_file():
            write_rows(options.folder / f"pool-{rows}.jsonl", rows, 0)
    for name in options.selectors:
        for rows in options.rows:
            results = spawn.Queue()
            worker = spawn.Process(target=measure, args=(name, rows, options.folder, results))
            worker.start()
            worker.join()
            print(json.dumps(results.get()) if worker.exitcode == 0 else f"{name}, {rows} rows: failed", flush=True)


if __name__ == "__main__":
    main()
