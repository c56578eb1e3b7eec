"""Tokens per second of our passes over those that one would write by hand, in one run.

    python benchmarks/throughput.py --model MODEL --rows ROWS.jsonl.gz [--first 100] [--repeats 3] [--dtype auto]
        [--tokens-per-batch 512 4096] [--train-steps 4 --max-length 200]

*Reading*: `curate`'s pass over a bare forward loop over the same batches.

The bare loop calls the model (which makes all logits) and reads nothing of them. The pass is that of the selector
`pharmacist`: hidden states and statistics of token losses, as it runs in `curate`, with its files. Both take turns,
and the ratio is that of the medians of CPU time, for other work on the machine slows both; on a GPU by the clock. With
--tokens-per-batch the pass is also timed at other sizes of batch, against its own.

*Training* (with --train-steps): LoRA steps of our Trainer with plain SFT over those of the stock Trainer, on the same
batches of 8 rows.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from pharmacist.core.errors import PharmacistError
from pharmacist.data.batches import IGNORED
from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.data.tokenize import Encoded, encode
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.nn.batching import make_batch, plan_pass
from pharmacist.nn.memory import PeakMemory
from pharmacist.nn.models import LoadedModel, load_model
from pharmacist.nn.passes import run_pass
from pharmacist.nn.reading import tokens_per_batch
from pharmacist.readers.states import hidden_states
from pharmacist.training.trainer import StrategyTrainer, token_mean_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens-per-batch", type=int, nargs="*", default=[])
    parser.add_argument("--train-steps", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    if options.first < 1 or options.repeats < 1:
        parser.error("--first and --repeats must be at least 1")

    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_records(open_source(options.rows), work_dir=folder).dataset
        rows = rows.select(range(min(options.first, len(rows))))
        encoded = encode(rows, loaded.tokenizer, loaded.template, max_length=options.max_length, on_long_prompt="cut")
    own = tokens_per_batch(loaded.model, loaded.device)

    def bare() -> None:
        with torch.inference_mode():
            for rows in plan_pass(encoded, own).batches:
                batch = make_batch(encoded, rows, loaded.device)
                loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    def reading(size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            measure = hidden_states(loaded.model)
            run_pass(loaded.model, encoded, measure, work=Path(folder), description="reading", tokens=size)

    ways = {"bare loop": bare} | {size: lambda size=size: reading(size) for size in (own, *options.tokens_per_batch)}
    seconds, memory = timed(ways, options.repeats, loaded.device)
    tokens = int(encoded.lengths.sum())
    rate = {name: tokens / value for name, value in seconds.items()}
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
    if options.train_steps:
        seconds, memory = timed(trainings(loaded, encoded, options.train_steps), options.repeats, loaded.device)
        found["training"] = {
            "seconds_per_step": {name: round(value / options.train_steps, 2) for name, value in seconds.items()},
            "peak_megabytes": memory,
            "ours over stock": round(seconds["stock"] / seconds["ours"], 3),
        }
    print(json.dumps(found, indent=2))


def timed(
    ways: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device
) -> tuple[dict[Any, float], dict[Any, int]]:
    """Seconds (median) and peak memory in MB of each way; they take turns, and the first round warms up."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    memory = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            peak, start = PeakMemory(device), clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - start)
                memory[name] = round(peak.megabytes())
    return {name: median(values) for name, values in seconds.items()}, memory


def trainings(loaded: LoadedModel, encoded: Encoded, steps: int) -> dict[str, Callable[[], object]]:
    """Some steps of LoRA training by the stock Trainer and by ours."""
    items = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * prompt + list(ids[prompt:])}
        for ids, prompt in zip(encoded.token_ids(range(len(encoded))), encoded.prompt_lengths, strict=True)
    ]
    model = get_peft_model(loaded.model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    precision = {"bf16": loaded.model.dtype == torch.bfloat16, "use_cpu": loaded.device.type == "cpu"}

    def train(cls: type[Trainer], **more: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **precision,
            )
            collator = DataCollatorForSeq2Seq(loaded.tokenizer)
            cls(model=model, args=arguments, train_dataset=items, data_collator=collator, **more).train()

    return {
        "stock": lambda: train(Trainer),
        "ours": lambda: train(StrategyTrainer, strategy=SFT(), compute_loss_func=token_mean_loss),
    }


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        sys.exit(2)
