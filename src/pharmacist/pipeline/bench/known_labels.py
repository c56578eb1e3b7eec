"""The stage of a grid that labels the rows which a ranking asks for, from labels of the whole pool."""

from pathlib import Path

import pandas as pd

from pharmacist.core.env import rank
from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json_lines
from pharmacist.core.hashing import sha256_file
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.pages import ranking_manifest
from pharmacist.pipeline.stages.curate import KNOWN_LABELS, KnownLabelsOptions
from pharmacist.selectors.labels import read_entries, write_labels


def known_labels(options: KnownLabelsOptions) -> Path:
    """Writes ``labels.json`` with the labels of the rows of ``to_label.jsonl``, and returns its path.

    Raises:
        DataError: The ranking asks for none, or a row that it asks for has no label.
    """
    folder = Path(options.ranking)
    ranking = ranking_manifest(folder)
    if not (folder / "to_label.jsonl").is_file():
        raise DataError(f"{folder}: this ranking asks for no labels; a selector of form evidence or both asks")
    inputs = {"to_label": sha256_file(folder / "to_label.jsonl"), "labels": sha256_file(options.labels)}
    with KNOWN_LABELS.open(options, inputs=inputs) as run:
        path = run.path("labels.json")
        if rank() == 0 and not run.complete:
            with run.phase("label"):
                rows = pd.read_parquet(folder / "scores.parquet", columns=["row"])["row"].to_numpy()
                known = read_entries(options.labels, ranking.inputs["pool"], rows, where=f"labels {options.labels}")
                asked = [row["row"] for row in read_json_lines(folder / "to_label.jsonl")]
                if missing := [row for row in asked if row not in known]:
                    raise DataError(f"labels {options.labels}: row {missing[0]} has none; label every row of the pool")
                write_labels(path, ranking.inputs["pool"], {row: known[row] for row in asked})
            run.finish(outputs=[path.name], counts={"labels": len(asked)})
        barrier()
        return path
