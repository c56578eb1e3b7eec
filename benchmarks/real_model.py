"""The tables of docs/results.md about a real language model, out of a grid's results.

    python benchmarks/real_model.py benchmarks/results/smollm2.parquet

First those of the page of the benchmark, then means over seeds of what they leave out.
"""

import argparse

import pandas as pd

from pharmacist.report.benchmark import AXES, Benchmark, to_markdown


FURTHER = ["loss_margin_before", "over_refusal_before", "over_refusal", "alignment_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    results = pd.read_parquet(parser.parse_args().results)
    print(to_markdown(Benchmark(results, {axis: list(results[axis].unique()) for axis in AXES})))
    means = results.groupby(["defense", "judge", "selector"], sort=False)[FURTHER].mean()
    print(means.reset_index().to_markdown(index=False, floatfmt=".3f"))


if __name__ == "__main__":
    main()
