"""Throughput of `evaluate`'s generation: batches against one prompt at a time, on the same model in one run.

    python benchmarks/generation.py [--model MODEL] [--prompts 256] [--max-new-tokens 32] [--repeats 3]

The default model is the embedded base model; its prompts are those of the synthetic world. Both ways answer the same
prompts through `pharmacist.evaluation.generate.generate`; the answers are compared, for a faster wrong answer is none.
"""

import argparse
import json
import sys
import time

import torch

from pharmacist.core.errors import PharmacistError
from pharmacist.data.tokenize import prompt_ids
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.generate import ROWS_PER_BATCH, generate
from pharmacist.nn.models import load_model
from pharmacist.worlds.potions import BASE_MODEL, World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE_MODEL))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.prompts < 1 or options.repeats < 1:
        parser.error("--prompts and --repeats must be at least 1")

    loaded = load_model(options.model, device=options.device)
    world = World(0)
    rows = world.rows("utility", options.prompts)
    prompts = prompt_ids(rows, loaded.tokenizer, loaded.template)

    def measure(batch_size: int) -> tuple[float, list[Answer]]:
        best, answers = float("inf"), []
        for _ in range(options.repeats):
            start = time.perf_counter()
            answers = generate(
                loaded.model, loaded.tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=batch_size
            )
            best = min(best, time.perf_counter() - start)
        return best, answers

    measure(ROWS_PER_BATCH)  # warms up
    batched, many = measure(0)
    single, one = measure(1)
    tokens, tokens_of_one = (sum(answer.tokens for answer in answers) for answers in (many, one))
    same = sum(a == b for a, b in zip(many, one, strict=True))
    found = {
        "model": options.model,
        "prompts": len(prompts),
        "tokens": tokens,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rows_per_batch": ROWS_PER_BATCH,
        "batched_tokens_per_second": round(tokens / batched, 1),
        "single_tokens_per_second": round(tokens_of_one / single, 1),
        "ratio": round(single / batched, 2),
        "equal_answers": same,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"generation.py: {error}", file=sys.stderr)
        sys.exit(2)
