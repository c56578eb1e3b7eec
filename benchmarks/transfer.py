"""Does a small model's ranking serve a larger one? Agreement of rankings, and alignment on the transferred subset.

    python benchmarks/transfer.py OUTPUT_DIR [--seed 0] [--selectors NAME ...] [--targets llama neox]

On the made-up world, with 5 % of 600 rows mislabelled. The proxy is a Llama of 0.1 million parameters, trained here;
the targets are the world's own Llama of 0.4 million (same family) and a GPT-NeoX of the same width and depth, trained
here (another family). Each target's own ranking is compared with the proxy's: rank correlation and overlap of the top
30 %. Then the target is aligned by SFT on its own top 30 %, on the proxy's and on a random 30 %, and attacked, with
the demo's settings.

A ranking is of rows, not of tokens, so that the proxy may have any tokenizer; with a proxy and a target of your own,
rank with `pharmacist curate --model PROXY` and align the other on its selected.jsonl.

Every step is an ordinary run, so the benchmark resumes. Prints Markdown tables and writes transfer.json.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from compare_selectors import MAIN, POOLS, VARIANTS, align_attack_evaluate, rank, slug, write_world
from scipy.stats import spearmanr
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from pharmacist.core.files import atomic_folder, read_json, write_json
from pharmacist.core.progress import set_quiet
from pharmacist.core.seeding import derive
from pharmacist.pipeline.demo import LORA
from pharmacist.worlds import BASE_MODEL
from pharmacist.worlds.make_base_model import make_tokenizer, train


SELECTORS = {
    "pharmacist": {"name": "pharmacist"},
    "less, exact": VARIANTS["less, exact"],
    "seal": {"name": "seal"},
    "unrolled": {"name": "unrolled"},
    "loss-low": {"name": "perplexity", "keep": "low"},
}
ALIGNED = ("pharmacist", "less, exact")
"""Selectors whose subsets are carried on to an attack."""
NEOX_LORA = LORA | {"target_modules": ["query_key_value", "dense"]}
STEPS = {"proxy": 500, "neox": 500}


def make(name, path):
    """Trains one of the models that the world does not have; returns its folder."""
    if (path / "config.json").is_file():
        return path
    tokenizer = make_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 128,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(derive(0, "transfer", name))
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=48,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                tie_word_embeddings=True,
                **common,
            )
        )
        if name == "proxy"
        else GPTNeoXForCausalLM(
            GPTNeoXConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, **common)
        )
    )
    loss = train(model, tokenizer, STEPS[name], batch_size=64, seed=1)
    print(f"{name}: {model.num_parameters():,} parameters, loss {loss:.3f} nats per token", flush=True)
    with atomic_folder(path) as temporary:
        model.eval().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return path


def agreement(own, other):
    """Rank correlation of two rankings, and the share of the one's selected rows that the other selects."""
    a, b = (pd.read_parquet(folder / "scores.parquet") for folder in (own, other))
    both = (a["selected"] & b["selected"]).sum() / a["selected"].sum()
    return {"spearman": float(spearmanr(a["score"], b["score"]).statistic), "overlap": float(both)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--targets", nargs="+", choices=("llama", "neox"), default=["llama", "neox"])
    arguments = parser.parse_args()
    set_quiet(True)
    root, seed = arguments.output_dir, arguments.seed
    files, labels = write_world(root / f"data-{seed}", POOLS[MAIN], seed, arguments.rows)
    models = {"proxy": make("proxy", root / "proxy"), "llama": BASE_MODEL}
    if "neox" in arguments.targets:
        models["neox"] = make("neox", root / "neox")
    path = root / f"transfer-{seed}.json"
    found = read_json(path) if path.is_file() else {"ranking": {}, "agreement": {}, "aligned": {}}

    def ranked(name, by):
        folder = root / f"rank-{seed}" / by / slug(name)
        key = f"{name} | {by}"
        if key not in found["ranking"]:
            found["ranking"][key] = rank(files, labels, SELECTORS[name], folder, seed, models[by])
            write_json(path, found)
        return folder

    random = root / f"rank-{seed}" / "random"
    rank(files, labels, {"name": "random"}, random, seed)
    for target in arguments.targets:
        for name in arguments.selectors:
            found["agreement"][f"{name} | {target}"] = agreement(ranked(name, target), ranked(name, "proxy"))
            write_json(path, found)
    for target in arguments.targets:
        subsets = {"random": random}
        for name in set(ALIGNED) & set(arguments.selectors):
            subsets |= {f"{name}, own": ranked(name, target), f"{name}, proxy": ranked(name, "proxy")}
        for name, folder in sorted(subsets.items()):
            key = f"{name} | {target}"
            if key not in found["aligned"]:
                found["aligned"][key] = align_attack_evaluate(
                    str(folder / "selected.jsonl"),
                    files,
                    {"name": "sft"},
                    root / f"aligned-{seed}" / target / slug(name),
                    seed,
                    models[target],
                    LORA if target == "llama" else NEOX_LORA,
                )
                write_json(path, found)
    print("| selector | target | AUC: target's own | AUC: proxy's | rank correlation | overlap of the top 30 % |")
    print("|" + "---|" * 6)
    for key, value in found["agreement"].items():
        name, target = key.split(" | ")
        own, proxy = (found["ranking"][f"{name} | {by}"]["auc"] for by in (target, "proxy"))
        print(f"| {name} | {target} | {own:.3f} | {proxy:.3f} | {value['spearman']:.2f} | {value['overlap']:.2f} |")
    print(
        "\n| aligned on 30 % by | target | harmful score over the attack | after it | accuracy | over-refusal before |"
    )
    print("|" + "---|" * 6)
    for key, value in found["aligned"].items():
        name, target = key.split(" | ")
        print(
            f"| {name} | {target} | {value['area']:.1f} | {value['curve'][-1]:.1f} | "
            f"{value['fine_tune_accuracy']:.1f} | {value['over_refusal'][0]:.1f} |"
        )


if __name__ == "__main__":
    main()
