"""Judges that several tests use."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from pharmacist.evaluation.judges.beaver_dam import CATEGORIES
from tests.support.tiny import tiny_llama, tiny_tokenizer


def save_classifier(path: Path, labels: int = len(CATEGORIES), pad: bool = True, **overrides: Any) -> str:
    tokenizer = tiny_tokenizer(pad=pad)
    if not pad:
        tokenizer.pad_token = tokenizer.eos_token
    options = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
        problem_type="multi_label_classification",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(LlamaConfig(**(options | overrides))).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_guard(path: Path, chat: str | None) -> str:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(["Yes", "No"])
    tokenizer.chat_template = chat
    tiny_llama(tokenizer, initializer_range=0.3, max_position_embeddings=1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
