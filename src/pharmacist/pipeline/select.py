"""The stage `select`: another share of a pool that was ranked before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pharmacist.core.env import rank
from pharmacist.core.files import atomic_path
from pharmacist.core.hashing import sha256_file
from pharmacist.data.formats import write_rows
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.choosing import choose
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stages.curate import SELECT, SelectOptions
from pharmacist.selectors.base import scaled_to_mean_1


WEIGHTS = "weights.parquet"
"""File with the weights of the selected rows, if the ranking has weights."""


def chosen_rows(table: pd.DataFrame, config: Mapping[str, Any], options: SelectOptions) -> npt.NDArray[np.int64]:
    """Positions of the selected rows in the ranking's table, ascending; `config` holds the ranking's options."""
    share = config["balance_share"] if config["balance"] is not None else 0.0
    return choose(table, options.top, None, None, config["diversity"], share=share, fill=options.fill)


def select(options: SelectOptions) -> Path:
    """Writes ``selected.jsonl``, the ranking's best rows unchanged and in input order; returns that file.

    Diversity and balance are those of the ranking. If the ranking has weights, those of the selected rows are written
    to `WEIGHTS`, with mean 1.

    Raises:
        DataError: The folder holds no finished ranking, or its pool has changed.
        ConfigError: The ranking's diversity needs distances between rows, which a folder does not hold.
    """
    ranking = Ranking.load(options.ranking)
    table, config = ranking.table, ranking.manifest["config"]
    scores = sha256_file(Path(options.ranking) / "scores.parquet")
    inputs = {"ranking": scores, "pool": ranking.manifest["inputs"]["pool"]}
    with SELECT.open(options, inputs=inputs) as run:
        path = run.path("selected.jsonl")
        if rank() == 0 and not run.complete:
            with run.phase("select"):
                chosen = chosen_rows(table, config, options)
                rows = table["row"].to_numpy()[chosen]
                write_rows(ranking.source, rows.tolist(), path, format="jsonl")
                if "weight" in table:
                    own = scaled_to_mean_1(table["weight"].to_numpy()[chosen], np.ones(len(chosen), dtype=bool))
                    with atomic_path(run.path(WEIGHTS)) as temporary:
                        pd.DataFrame({"row": rows, "weight": own}).to_parquet(temporary, index=False)
            outputs = [path.name, *([WEIGHTS] if "weight" in table else [])]
            run.finish(outputs=outputs, counts={"ranked": len(table), "selected": len(rows)})
        barrier()
        return path
