"""The Python interface of objects: datasets, loaded models and methods in, loaded models and results out."""

import tempfile
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from pharmacist.data.formats import open_source
from pharmacist.data.records import read_records
from pharmacist.data.templates import choose_template
from pharmacist.data.tokenize import IGNORED, encode


Rows = Any
"""A path, a hub id, a ``datasets.Dataset`` or a list of dicts, in any layout that the commands read."""


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    template: Literal["auto", "chat", "alpaca"] = "auto",
    side: Literal["chosen", "rejected"] = "chosen",
) -> datasets.Dataset:
    """Rows in tokens, for a Trainer of your own: exactly as `align` and `attack` train on them.

    Args:
        rows: A path, a hub id, a ``datasets.Dataset`` or a list of dicts.
        tokenizer: The model's.
        max_length: Longest row in tokens; completions are cut to fit.
        template: Prompt template; auto is the tokenizer's own, else Alpaca.
        side: Which answer of a preference row is its completion.

    Returns:
        Columns ``input_ids`` and ``labels``, -100 where there is no target: what ``DataCollatorForSeq2Seq`` of
        transformers and TRL's ``SFTTrainer`` take.

    Raises:
        DataError: Rows that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="pharmacist-") as folder:
        records = read_records(open_source(rows, name="rows"), work_dir=folder, side=side)
        encoded = encode(records.dataset, tokenizer, choose_template(tokenizer, template), max_length=max_length)
    ids = encoded.token_ids(range(len(encoded)))
    made = [
        {"input_ids": row.tolist(), "labels": [IGNORED] * int(n) + row[n:].tolist()}
        for row, n in zip(ids, encoded.prompt_lengths, strict=True)
    ]
    return datasets.Dataset.from_list(made)
