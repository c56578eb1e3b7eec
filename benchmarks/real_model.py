"""The tables of docs/results.md about a real language model, out of a grid's results.

    python benchmarks/real_model.py benchmarks/results/smollm2.parquet

Means over seeds with 95 % intervals (Student's t); differences to the full pool are paired by seed. Harmful scores are
per judge; what needs no judge stands in the second table.
"""

import argparse
from collections.abc import Sequence
from math import inf

import pandas as pd

from pharmacist.evaluation.statistics import t_interval


def cell(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean and interval, ``1.0 [0.5, 1.5]``; the mean alone of one value."""
    found = t_interval(list(values), bounds=(-inf, inf))
    low_high = ", ".join(f"{end:.{digits}f}" for end in found.interval or ())
    return f"{found.value:{sign}.{digits}f}" + (f" [{low_high}]" if low_high else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    table = pd.read_parquet(parser.parse_args().results).set_index("seed")
    scores, others = [], []
    for arm in table["selector"].unique():
        row, own = {"aligned on": arm}, table[table["selector"] == arm]
        for judge in table["judge"].unique():
            mine, full = (of[of["judge"] == judge] for of in (own, table[table["selector"] == "full"]))
            over = mine["harmful_score_over_attack"]
            row |= {f"{judge}, over the attack": cell(over), f"{judge}, at the end": cell(mine["harmful_score"])}
            if arm != "full":
                row[f"{judge}, minus full"] = cell(over - full["harmful_score_over_attack"].loc[mine.index], sign="+")
        scores.append(row)
        rest = {"aligned on": arm, "seeds": len(mine), "margin, aligned": cell(mine["loss_margin_before"], 3)}
        rest["margin, at the end"] = cell(mine["loss_margin"], 3)
        if arm != "full":
            rest["minus full"] = cell(mine["loss_margin"] - full["loss_margin"].loc[mine.index], 3)
        first = own[own["judge"] == table["judge"].iloc[0]]
        rest["fine-tune accuracy"] = cell(mine["fine_tune_accuracy"])
        rest["over-refusal"] = f"{first['over_refusal_before'].mean():.0f} / {first['over_refusal'].mean():.0f}"
        for name in ("alignment_tokens", "alignment_seconds", "selection_seconds"):
            rest[name.replace("_", " ")] = f"{mine[name].mean():.0f}"
        others.append(rest)
    for rows in (scores, others):
        print(pd.DataFrame(rows).fillna("").to_markdown(index=False), end="\n\n")


if __name__ == "__main__":
    main()
