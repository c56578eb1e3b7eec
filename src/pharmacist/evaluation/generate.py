"""Greedy answers of a model by Hugging Face ``generate``: left padding, new tokens only, resumable."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pharmacist.core.env import process_index, world_size
from pharmacist.core.errors import DataError
from pharmacist.core.progress import bar
from pharmacist.data.batches import TOKENS_PER_BATCH, cut, pad, without_middle
from pharmacist.evaluation.answers import Answer, AnswerLog
from pharmacist.evaluation.reasoning import FRAME, MARKER, REASONING_FIELDS, begun, separate
from pharmacist.nn.distributed import barrier


ROWS_PER_BATCH = 128
"""Most rows of a batch, unless a batch size is given."""
Decoder = Callable[[list[list[int]], int, list[int]], list[tuple[list[int], bool]]]
"""From prompts, a token limit and end tokens to the new tokens before any end token, and whether there was one."""
_PROMPT_END = 32  # tokens of a prompt in which a mark that opens the reasoning may stand


def cut_prompts(ids: Sequence[Sequence[int]], context: int, max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Cuts tokens from the middle of prompts that fill a model's whole context; also returns how many these are.

    They leave room for an answer of `max_new_tokens`, but for at most half of the context.
    """
    room = context - min(max_new_tokens, context // 2)
    too_long = [len(row) >= context for row in ids]
    short = [without_middle(row, room) if long else list(row) for row, long in zip(ids, too_long, strict=True)]
    return short, sum(too_long)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 0,
    work: Path | None = None,
    description: str = "generate",
    decoder: Decoder | None = None,
) -> list[Answer]:
    """Answers prompts greedily.

    The model keeps its mode. Answers do not depend on the batch size, up to rounding.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: Prompts as token ids, as `data.tokenize.prompt_ids` makes them.
        max_new_tokens: Longest answer; less where the model's context ends earlier.
        batch_size: Prompts at a time, 0 for as many as the token budget takes (at most `ROWS_PER_BATCH`).
        work: Folder for finished answers, so that an interrupted call continues; shared by all processes.
        description: Label of the progress bar.
        decoder: Replaces Hugging Face ``generate``.

    Raises:
        DataError: A prompt fills the model's whole context.
    """
    batches = plan_batches([len(row) for row in ids], max_new_tokens, context_length(model), batch_size)
    ends = _end_tokens(model.generation_config, tokenizer)
    log = None if work is None else AnswerLog(work, [[list(map(int, row)) for row in ids], max_new_tokens])
    found = {} if log is None else log.read()
    mine = [batch for number, batch in enumerate(batches) if log is None or number % world_size() == process_index()]
    with (
        bar(description, sum(len(rows) for rows, _ in mine)) as progress,
        nullcontext(decoder) if decoder is not None else _greedy(model, tokenizer, ends) as decode,
    ):
        for rows, new_tokens in mine:
            # A batch is repeated as a whole, so that a resumed run computes what an undisturbed one does.
            if not all(row in found for row in rows):
                prompts = [list(ids[row]) for row in rows]
                answers = _answers(tokenizer, prompts, decode(prompts, new_tokens, ends))
                fresh = {row: answer for row, answer in zip(rows, answers, strict=True) if row not in found}
                if log is not None:
                    log.append(fresh)
                found |= fresh
            progress.advance(len(rows))
    if log is not None:
        barrier()
        found = log.read()
    return _heard([found[row] for row in range(len(ids))], [_begun(tokenizer, row) for row in ids])


def plan_batches(
    lengths: Sequence[int], max_new_tokens: int, context: int, batch_size: int = 0
) -> list[tuple[list[int], int]]:
    """Groups prompts (lengths in tokens) of similar length and of equal room for an answer, the longest first.

    Returns positions of prompts that are answered together, and their longest answer in tokens. A DataError where a
    prompt fills the whole context.
    """
    for row, length in enumerate(lengths):
        if length >= context:
            raise DataError(
                f"prompt {row} has {length} tokens, but the model's context ends at {context}; "
                "shorten it, or --on-long-prompt cut"
            )
    tokens = np.asarray(lengths, dtype=np.int64)
    rooms = np.minimum(max_new_tokens, context - tokens)
    order = np.lexsort((np.arange(len(tokens)), -tokens, rooms))
    by_room = np.split(order, np.flatnonzero(np.diff(rooms[order])) + 1)
    budget = sys.maxsize if batch_size else TOKENS_PER_BATCH
    return [
        (batch.tolist(), int(rooms[batch[0]]))
        for same_room in by_room
        for batch in cut(same_room, tokens + rooms, budget, batch_size or ROWS_PER_BATCH)
    ]


def context_length(model: PreTrainedModel, otherwise: int = 2**31) -> int:
    """Longest sequence in tokens; by default practically unlimited if the model's configuration names none."""
    return int(getattr(model.config, "max_position_embeddings", 0) or otherwise)


def _answers(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], new: Sequence[tuple[list[int], bool]]
) -> list[Answer]:
    """Decodes new tokens into answers; marks around reasoning are kept, also one with which the prompt ends."""
    added = tokenizer.added_tokens_decoder
    marks = {token for token, own in added.items() if MARKER.fullmatch(own.content)}
    frame = {token for token, own in added.items() if FRAME.fullmatch(own.content)}
    lost = {token for token, own in added.items() if own.special} - marks - frame
    plain = tokenizer.batch_decode([row for row, _ in new], skip_special_tokens=True)
    found = []
    for prompt, (row, finished), text in zip(ids, new, plain, strict=True):
        if marks.intersection(row):
            text = tokenizer.decode([token for token in row if token not in lost])
        answer = Answer(_begun(tokenizer, prompt) + text, len(row), finished)
        has_template = getattr(tokenizer, "response_template", None) is not None
        found.append(_parsed(tokenizer, prompt, row, answer) if has_template else answer)
    return found


def _begun(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    return begun(tokenizer.decode(list(prompt[-_PROMPT_END:])))


def _heard(answers: list[Answer], marks: Sequence[str]) -> list[Answer]:
    """Takes the marks with which prompts end off the answers again if no complete answer closes the reasoning.

    A model that was trained on answers without reasoning answers at once, even if its template opens reasoning.
    """
    marked = [answer for answer, mark in zip(answers, marks, strict=True) if mark and answer.text.startswith(mark)]
    if any(answer.finished for answer in marked) and all(separate(answer.text).open for answer in marked):
        pairs = zip(answers, marks, strict=True)
        return [replace(answer, text=answer.text.removeprefix(mark)) for answer, mark in pairs]
    return answers


def _parsed(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], row: Sequence[int], answer: Answer) -> Answer:
    """An answer with its parts separated by the tokenizer's response template."""
    try:
        parts = tokenizer.parse_response(tokenizer.decode(list(row)), prefix=tokenizer.decode(list(prompt)))
    except (ValueError, AttributeError, TypeError, KeyError):
        return answer  # it does not have the template's form, for example because the limit cut it
    said = parts.get("content")
    thought = next((parts[name] for name in REASONING_FIELDS if parts.get(name)), "")
    if not isinstance(thought, str) or not isinstance(said, str | None):
        return answer
    why = "" if said or not parts.get("tool_calls") else "calls a tool instead of answering"
    return replace(answer, text=said or "", reasoning=thought, unanswered=why)


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Iterator[Decoder]:
    """Gives a greedy decoder by Hugging Face ``generate``; the model is restored afterwards."""
    training, own = model.training, model.generation_config
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]

    def decode(ids: list[list[int]], new_tokens: int, ends: list[int]) -> list[tuple[list[int], bool]]:
        input_ids, mask = (tensor.to(model.device) for tensor in pad(ids, fill, left=True))
        how: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
        try:
            output = model.generate(input_ids=input_ids, attention_mask=mask, **how)
            return [until_end(row, ends) for row in output[:, input_ids.shape[1] :].tolist()]
        except torch.cuda.OutOfMemoryError:
            if len(ids) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(ids) // 2
        return decode(ids[:half], new_tokens, ends) + decode(ids[half:], new_tokens, ends)

    model.eval()
    # `generate` reads from here whatever is not passed: models come with temperatures and repetition penalties.
    model.generation_config = GenerationConfig(pad_token_id=fill, eos_token_id=ends)
    try:
        with torch.inference_mode():
            yield decode
    finally:
        model.generation_config = own
        model.train(training)


def until_end(ids: list[int], ends: list[int]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there is one."""
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return ids[:end], end is not None


def _end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS of the tokenizer and of the model's generation config: chat models end their turns with another token."""
    own = getattr(config, "eos_token_id", None)
    more = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))
