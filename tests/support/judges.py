"""Judges that several tests use."""

from pathlib import Path
from typing import Any

from transformers import LlamaForSequenceClassification

from pharmacist.evaluation.judges.beaver_dam import CATEGORIES
from tests.support.tiny import tiny_llama, tiny_tokenizer


def save_classifier(path: Path, labels: int = len(CATEGORIES), pad: bool = True, **overrides: Any) -> str:
    tokenizer = tiny_tokenizer(pad=pad)
    if not pad:
        tokenizer.pad_token = tokenizer.eos_token
    options = dict(
        max_position_embeddings=512,
        num_labels=labels,
        initializer_range=0.5,
        problem_type="multi_label_classification",
    )
    tiny_llama(tokenizer, 1, LlamaForSequenceClassification, **options | overrides).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_guard(path: Path, chat: str | None) -> str:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(["Yes", "No"])
    tokenizer.chat_template = chat
    tiny_llama(tokenizer, initializer_range=0.3, max_position_embeddings=1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
