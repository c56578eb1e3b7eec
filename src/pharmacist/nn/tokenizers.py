"""Tokenizers: checks against a model, the tokenizer of an adapter, and fingerprints."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pharmacist.core.console import plain
from pharmacist.core.errors import CompatibilityError, DataError, one_line
from pharmacist.core.hashing import sha256_text
from pharmacist.core.progress import say
from pharmacist.nn.libraries import failures_as


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over vocabulary and special tokens; equal for tokenizers that give equal ids."""
    vocabulary, special = sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())
    return sha256_text(repr(vocabulary) + repr(special))


def adapter_tokenizer(
    adapter: Path, base: PreTrainedTokenizerBase, model: Any, **options: Any
) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer that an adapter was trained with: the one saved in its folder, else its base model's.

    The chat template of `base`, the base model's tokenizer, is used where the adapter has none. The embedding of
    `model`, which has the adapter, must fit. `options` are those of ``AutoTokenizer.from_pretrained``.

    Returns:
        The tokenizer, and whether the adapter has a chat template of its own.
    """
    own, tokenizer = None, base
    if (adapter / "tokenizer_config.json").is_file():
        advice = "fix it, or delete its tokenizer files for the base's"
        with failures_as(
            DataError, lambda error: f"{adapter}: its own tokenizer cannot be loaded ({one_line(error)}); {advice}"
        ):
            tokenizer = AutoTokenizer.from_pretrained(str(adapter), **options)
        own = tokenizer.chat_template
        check_tokenizer(str(adapter), tokenizer, model)
        guard_embedding(str(adapter), tokenizer, model)
    elif (path := adapter / "chat_template.jinja").is_file():
        try:
            own = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise DataError(f"{path}: is not UTF-8; delete it, or copy it from the original model") from error
    tokenizer.chat_template = own or base.chat_template
    return tokenizer, bool(own)


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Makes sure of an end-of-sequence token, a padding token, and an embedding for every token that a text can hold.

    A tokenizer without a padding token that can be used pads with the end-of-sequence token from here on. Messages
    call the model `name`.

    Raises:
        CompatibilityError: The tokenizer cannot end a text, or does not belong to the model.
    """
    if tokenizer.eos_token_id is None:
        raise CompatibilityError(
            f"{name}: the tokenizer has no end-of-sequence token, so no completion could end; "
            "set eos_token in tokenizer_config.json"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = _beyond(tokenizer, model)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    needed = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    refused = sorted(i for i in beyond if i in needed or i not in special)
    if refused:
        raise CompatibilityError(
            f"{name}: the tokenizer has {len(beyond)} tokens more than the embedding's {rows} rows (such as "
            f"{beyond[refused[0]]!r}, id {refused[0]}); give the model that was trained with them, or the tokenizer "
            "that belongs to this one"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in beyond:
        # Harmless: masks come from lengths and labels from concatenation, so no padding id is ever read.
        why = "no pad token" if tokenizer.pad_token_id is None else "no embedding for the pad token"
        say(f"{plain(name)}: {why}; padding with the end-of-sequence token, masked everywhere")
        tokenizer.pad_token = tokenizer.eos_token


def _beyond(tokenizer: PreTrainedTokenizerBase, model: Any) -> dict[int, str]:
    """Tokens that the model has no embedding for, by id."""
    rows = model.get_input_embeddings().weight.shape[0]
    return {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}


def guard_embedding(name: str, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Gives a model a hook that refuses special tokens without an embedding when a text holds one."""
    beyond = _beyond(tokenizer, model)
    if not beyond:
        return

    def check(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        highest = int(args[0].max()) if args else -1
        if highest in beyond:
            raise DataError(f"{name}: a text holds {beyond[highest]!r}, a token that the model has no embedding for")

    # Special tokens without an embedding do no harm unless a text spells one (an image mark in a text model).
    model.get_input_embeddings().register_forward_pre_hook(check)
