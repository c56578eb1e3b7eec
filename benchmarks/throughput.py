"""Tokens per second of `curate`'s reading pass over a bare forward loop over the same batches, in one run.

    python benchmarks/throughput.py --model MODEL --rows ROWS.jsonl.gz [--first 100] [--repeats 3] [--dtype auto]
        [--tokens-per-batch 512 4096]

The bare loop calls the model (which makes all logits) and reads nothing of them. The pass is that of the selector
`pharmacist`: hidden states and statistics of token losses, as it runs in `curate`, with its files. Both take turns,
and the ratio is that of the medians of CPU time, for other work on the machine slows both. With --tokens-per-batch the
pass is also timed at other sizes of batch, against its own.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.data.tokenize import encode
from pharmacist.nn.batching import make_batch, plan_pass
from pharmacist.nn.memory import PeakMemory
from pharmacist.nn.models import load_model
from pharmacist.nn.passes import run_pass
from pharmacist.nn.reading import tokens_per_batch
from pharmacist.readers.states import hidden_states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens-per-batch", type=int, nargs="*", default=[])
    options = parser.parse_args()

    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_records(open_source(options.rows), work_dir=folder).dataset
        rows = rows.select(range(min(options.first, len(rows))))
        encoded = encode(rows, loaded.tokenizer, loaded.template, max_length=1024, on_long_prompt="cut")
    own = tokens_per_batch(loaded.model, loaded.device)

    def bare() -> None:
        with torch.inference_mode():
            for rows in plan_pass(encoded, own).batches:
                batch = make_batch(encoded, rows, loaded.device)
                loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    def reading(size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_pass(
                encoded,
                hidden_states(loaded.model),
                work=Path(folder),
                device=loaded.device,
                tokens_per_batch=size,
                description="reading",
            )

    ways = {"bare loop": bare} | {size: lambda size=size: reading(size) for size in (own, *options.tokens_per_batch)}
    seconds, memory = {name: [] for name in ways}, {}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            peak, start = PeakMemory(loaded.device), time.process_time()
            way()
            if loaded.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - start)
                memory[name] = round(peak.megabytes())
    tokens = int(encoded.lengths.sum())
    rate = {name: tokens / median(values) for name, values in seconds.items()}
    found = {
        "model": options.model,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "rows": len(encoded),
        "tokens": tokens,
        "tokens_per_batch": own,
        "tokens_per_second": {str(name): round(value) for name, value in rate.items()},
        "peak_megabytes": {str(name): value for name, value in memory.items()},
        "reading over bare loop": round(rate[own] / rate["bare loop"], 3),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
