"""The stage `select`: another share of a pool that was ranked before, without ranking it again."""

from dataclasses import dataclass
from pathlib import Path

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.rundir import RunDir, RunOptions


STAGE_VERSION = 3
WEIGHTS = "weights.parquet"
"""Of the selected rows, where the ranking has weights."""


@dataclass(kw_only=True)
class SelectOptions(RunOptions):
    """Write the top of a ranking."""

    ranking: str
    """Folder of a finished curate."""
    top: float = 0.3
    """Share of the ranked rows to select, in (0, 1]."""
    fill: bool = True
    """Fill the share with rows whose own reason speaks against them, where too few others are left."""

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise ConfigError(f"--top {self.top}: must be a share of the pool in (0, 1]")


def select(options: SelectOptions) -> Path:
    """Writes ``selected.jsonl``, the ranking's best rows as they came, in input order.

    Near-duplicates are left out and groups balanced as the ranking was told to. Where the ranking has weights, those
    of the selected rows lie beside them, with mean 1.

    Returns:
        The file.

    Raises:
        DataError: The folder holds no finished ranking, or its pool has changed.
        ConfigError: The ranking's diversity needs to know how near rows are, which a folder does not hold.
    """
    import numpy as np
    import pandas as pd

    from pharmacist.core.env import rank
    from pharmacist.core.files import atomic_path
    from pharmacist.core.hashing import sha256_file
    from pharmacist.core.manifest import check_unchanged, read_manifest
    from pharmacist.data.formats import open_source, write_rows
    from pharmacist.nn.distributed import barrier
    from pharmacist.pipeline.curate import choose
    from pharmacist.selectors.base import scaled_to_mean_1

    ranking = read_manifest(options.ranking)
    scores = Path(options.ranking) / "scores.parquet"
    check_unchanged(options.ranking, scores.name)
    if ranking.stage != "curate" or ranking.status != "success":
        raise DataError(f"{options.ranking}: no finished curate; run it first")
    pool = open_source(ranking.config["pool"], name="pool")
    if pool.fingerprint() != ranking.inputs["pool"]:
        raise DataError(f"{options.ranking}: the pool {pool.label} has changed since it was ranked; rank it again")
    inputs = {"ranking": sha256_file(scores), "pool": ranking.inputs["pool"]}
    run = RunDir.open(options, stage="select", version=STAGE_VERSION, inputs=inputs)
    try:
        path = run.path("selected.jsonl")
        if rank() == 0 and not run.complete:
            with run.phase("select"):
                table = pd.read_parquet(scores)
                config = ranking.config
                share = config["balance_share"] if config["balance"] is not None else 0.0
                chosen = choose(table, options.top, None, None, config["diversity"], share=share, fill=options.fill)
                rows = table["row"].to_numpy()[chosen]
                write_rows(pool, rows.tolist(), path, format="jsonl")
                outputs = [path.name]
                if "weight" in table:
                    own = table["weight"].to_numpy()[chosen]
                    scaled = scaled_to_mean_1(own, np.ones(len(own), dtype=bool))
                    weights = pd.DataFrame({"row": rows, "weight": scaled})
                    with atomic_path(run.path(WEIGHTS)) as temporary:
                        weights.to_parquet(temporary, index=False)
                    outputs.append(WEIGHTS)
            run.finish(outputs=outputs, counts={"ranked": len(table), "selected": len(rows)})
        barrier()
        return path
    finally:
        run.close()
