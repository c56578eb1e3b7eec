"""The tables of docs/results.md about a real language model, out of a grid's results.

    python benchmarks/real_model.py benchmarks/results/smollm2.parquet

First those of the page of the benchmark, then means over seeds of what they leave out, then every run.
"""

import argparse

import pandas as pd

from pharmacist.report.benchmark import AXES, Benchmark, to_markdown


RUN = ["defense", "judge", "selector", "seed"]
FURTHER = ["loss_margin_before", "over_refusal_before", "over_refusal", "alignment_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    results = pd.read_parquet(parser.parse_args().results)
    print(to_markdown(Benchmark(results, {axis: list(results[axis].unique()) for axis in AXES})))
    means = results.groupby(RUN[:-1], sort=False)[FURTHER].mean()
    print(means.reset_index().to_markdown(index=False, floatfmt=".3f"), end="\n\n")
    runs = results[[*RUN, "harmful_score_over_attack", "harmful_scores", "loss_margin"]].sort_values(RUN)
    runs["harmful_scores"] = [", ".join(f"{score:.1f}" for score in scores) for scores in runs["harmful_scores"]]
    print(runs.to_markdown(index=False, floatfmt=("", "", "", ".0f", ".1f", "", ".3f")))


if __name__ == "__main__":
    main()
