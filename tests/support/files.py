"""Files that several tests use."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


TEXTS = [
    "plain",
    "two\nlines",
    'a "quoted" word',
    "comma, semicolon; tab\t",
    "ünïcödé 漢字 🙂",
    " spaces ",
    "\\n",
    "{[",
    "'",
]


SUFFIXES = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "csv", "csv.gz", "csv.zst", "parquet"]


def made_rows(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"id": f"r{i}", "prompt": f"{i} {rng.choice(TEXTS)}", "completion": "/".join(rng.choices(TEXTS, k=3)), "n": ""}
        for i in range(n)
    ]


def compress(data: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    if name.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def save(path: Path, rows: list[dict]) -> Path:
    """Writes rows by other means than the code under test."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if kind == "csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif kind == "json":
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    path.write_bytes(compress(text.encode(), path.name))
    return path
