"""Contexts whose model is the hand-written float64 decoder, and rankings by any selector in them."""

from pathlib import Path
from typing import Any

from torch import nn

from pharmacist.data.templates import Template
from pharmacist.nn.models import LoadedModel
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.base import Scores
from tests.support import village
from tests.support.tiny import CHAT_TEMPLATE, TinyDecoder, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
DECODER = TinyDecoder(len(TOKENIZER))


def ranked(
    root: Path,
    choice: dict[str, Any],
    pool: list | None = None,
    refs: dict | None = None,
    model: nn.Module = DECODER,
    **options: Any,
) -> Scores:
    """Ranks with ``{"name": ..., **options}``."""
    work = village.context(root, None, pool, refs, **options)
    # Where the property would load it from a folder.
    work.__dict__["model"] = LoadedModel(model, TOKENIZER, Template("chat", CHAT_TEMPLATE), "decoder")  # type: ignore[arg-type]
    try:
        return SELECTORS.build_from(choice).rank(work)
    finally:
        work.run.close()


def token_rows(rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of some rows, as the template and tokenizer above give them."""
    ids = lambda text: TOKENIZER(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [(ids(f"<s> {row['prompt']} <ans>"), [*ids(row["completion"]), 2]) for row in rows]
