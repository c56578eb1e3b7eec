"""Answers of a model: greedy, batched with left padding, new tokens only, resumable.

Hugging Face ``generate`` does the decoding. A minimal loop of our own was measured at 1.04 to 1.2 times its speed on a
0.4M-parameter model (batches of 1 to 128), where the library's overhead weighs most; not enough to own one.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pharmacist.core.env import rank, world_size
from pharmacist.core.errors import DataError
from pharmacist.core.hashing import sha256_json
from pharmacist.core.progress import bar
from pharmacist.data.batches import TOKENS_PER_BATCH, cut, pad, without_middle
from pharmacist.data.templates import Template
from pharmacist.data.tokenize import prompt_ids
from pharmacist.evaluation.reasoning import ENDED, FRAME, MARKER, begun, separate
from pharmacist.nn.distributed import barrier


ROWS_PER_BATCH = 128
"""Bound of a batch's rows where none is asked for."""
_PROMPT_END = 32  # tokens of a prompt in which a mark that opens the reasoning may stand


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The new tokens up to EOS, decoded without special tokens other than those around reasoning; of an answer
            that `separated` has seen, what the model says to its user.
        tokens: How many, EOS not counted.
        finished: Whether EOS came; otherwise the limit cut the answer.
        error: Why there is no answer, where an endpoint failed to give one: unscored, in no rate, asked for again.
        reasoning: What the model thought before it answered, where tokenizer or endpoint tell that apart; of an answer
            that `separated` has seen, in any case.
        unanswered: Why there is nothing to judge although the model was heard out: unscored, in no rate.
    """

    text: str
    tokens: int
    finished: bool
    error: str = ""
    reasoning: str = ""
    unanswered: str = ""

    @property
    def missing(self) -> str:
        """Why there is nothing to judge; empty where there is an answer."""
        return self.error or self.unanswered


def separated(answers: Sequence[Answer]) -> list[Answer]:
    """A model's answers without their reasoning, which is kept beside them; one that ended inside of it is none.

    Where some close a reasoning that their template had opened, all began in it: one that was cut before it closed any
    is reasoning alone.
    """
    parts = [separate(answer.text) for answer in answers]
    template_opens = any(part.closes for part in parts)
    found = []
    for answer, part in zip(answers, parts, strict=True):
        text, reasoning, is_open = part.answer, part.reasoning, part.open
        if template_opens and not answer.finished and not (reasoning or is_open or answer.reasoning):
            text, reasoning, is_open = "", text, True
        reasoning = "\n\n".join(filter(None, (answer.reasoning, reasoning)))
        ended = not text.strip() and (is_open or bool(reasoning.strip()))
        own = replace(answer, text=text, reasoning=reasoning, unanswered=ENDED if ended else "")
        found.append(answer if answer.missing else own)
    return found


def encode_prompts(
    prompts: Iterable[str | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[list[int]]:
    """Token ids of prompts, exactly as training puts them in front of a completion.

    Args:
        prompts: Plain texts, or canonical rows (`data.records`) of which only the prompt is read.
        tokenizer: The model's.
        template: The model's.
    """
    rows = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    return prompt_ids(rows, tokenizer, template) if rows else []


def cut_prompts(ids: Sequence[Sequence[int]], context: int, max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Takes tokens out of the middle of prompts that fill a model's whole context, so that their frame stays whole.

    Args:
        ids: Prompts.
        context: Longest sequence of the model.
        max_new_tokens: Room to make for an answer; at most half of the context is made.

    Returns:
        The prompts, and how many were cut.
    """
    room = context - min(max_new_tokens, context // 2)
    too_long = [len(row) >= context for row in ids]
    return [without_middle(row, room) if len(row) >= context else list(row) for row in ids], sum(too_long)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Iterable[str | Mapping[str, Any]],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 0,
    work: Path | None = None,
    description: str = "generate",
) -> list[Answer]:
    """Answers prompts greedily.

    Args:
        model: A causal language model, in any mode.
        tokenizer: Its tokenizer.
        template: Its prompt template.
        prompts: Plain texts or canonical rows.
        max_new_tokens: Longest answer; less where the model's context ends earlier.
        batch_size: Prompts at a time, 0 for as many as the token budget takes (at most `ROWS_PER_BATCH`).
        work: Folder for finished answers, so that an interrupted call continues; shared by all processes.
        description: For the progress bar.

    Returns:
        One answer per prompt, in order. Answers do not depend on the batch size, up to rounding.

    Raises:
        DataError: A prompt fills the model's whole context.
    """
    ids = encode_prompts(prompts, tokenizer, template)
    return generate_from_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, work=work, description=description
    )


def generate_from_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 0,
    work: Path | None = None,
    description: str = "generate",
    decode_with: "RawDecoder | None" = None,
) -> list[Answer]:
    """`generate` for prompts that are token ids already; see there.

    `decode_with` takes the place of Hugging Face ``generate``: from prompts, a limit and end tokens to new tokens and
    whether an end came.
    """
    batches = plan_batches([len(row) for row in ids], max_new_tokens, context_length(model), batch_size)
    found: dict[int, Answer] = {}
    log = None
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        # Answers of another prompt set or limit never match this name.
        name = "answers-" + sha256_json([[list(map(int, row)) for row in ids], max_new_tokens])[:16]
        found = read_answers(sorted(work.glob(f"{name}-*.jsonl")))
        log = work / f"{name}-{rank()}.jsonl"
    mine = [batch for number, batch in enumerate(batches) if work is None or number % world_size() == rank()]
    decoder = _greedy(model, tokenizer) if decode_with is None else _through(decode_with, model, tokenizer)
    with bar(description, sum(len(batch.rows) for batch in mine)) as progress, decoder as decode:
        for batch in mine:
            # A batch is repeated as a whole, so that a resumed run computes what an undisturbed one does.
            if not all(row in found for row in batch.rows):
                answers = decode([ids[row] for row in batch.rows], batch.new_tokens)
                fresh = {row: answer for row, answer in zip(batch.rows, answers, strict=True) if row not in found}
                if log is not None:
                    _append(log, fresh)
                found |= fresh
            progress.advance(len(batch.rows))
    if work is not None:
        barrier()
        found = read_answers(sorted(work.glob(f"{name}-*.jsonl")))
    return [found[row] for row in range(len(ids))]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together, and how long their answers may be."""

    rows: list[int]
    new_tokens: int


def plan_batches(lengths: Sequence[int], max_new_tokens: int, context: int, batch_size: int = 0) -> list[PromptBatch]:
    """Groups prompts of similar length, the longest first.

    Args:
        lengths: Tokens per prompt.
        max_new_tokens: Longest answer.
        context: Longest sequence of the model; prompts near it are grouped by the room that is left.
        batch_size: Most prompts per batch, 0 for `ROWS_PER_BATCH`.
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
        PromptBatch(batch.tolist(), int(rooms[batch[0]]))
        for same_room in by_room
        for batch in cut(same_room, tokens + rooms, budget, batch_size or ROWS_PER_BATCH)
    ]


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence in tokens; practically endless where the model's configuration names none."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 2**31)


Decoder = Callable[[Sequence[Sequence[int]], int], list[Answer]]
RawDecoder = Callable[[list[list[int]], int, list[int]], list[tuple[list[int], bool]]]


def _through(
    raw: RawDecoder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> AbstractContextManager[Decoder]:
    ends = _end_tokens(model.generation_config, tokenizer)

    def decode(ids: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        return _answers(tokenizer, ids, raw([list(row) for row in ids], new_tokens, ends))

    return nullcontext(decode)


def _answers(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], new: Sequence[tuple[list[int], bool]]
) -> list[Answer]:
    """New tokens as answers that lost no mark of reasoning: neither to decoding nor to the end of the prompt."""
    added = tokenizer.added_tokens_decoder
    marks = {token for token, own in added.items() if MARKER.fullmatch(own.content)}
    frame = {token for token, own in added.items() if FRAME.fullmatch(own.content)}
    lost = {token for token, own in added.items() if own.special} - marks - frame
    template = getattr(tokenizer, "response_template", None)
    plain = tokenizer.batch_decode([row for row, _ in new], skip_special_tokens=True)
    found = []
    for prompt, (row, finished), text in zip(ids, new, plain, strict=True):
        answer = Answer(text, len(row), finished)
        if marks.intersection(row):
            answer = replace(answer, text=tokenizer.decode([token for token in row if token not in lost]))
        answer = replace(answer, text=begun(tokenizer.decode(list(prompt[-_PROMPT_END:]))) + answer.text)
        found.append(answer if template is None else _parsed(tokenizer, prompt, row, answer))
    return found


def _parsed(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], row: Sequence[int], answer: Answer) -> Answer:
    """An answer as the tokenizer's own response template tells its parts apart."""
    try:
        parts = tokenizer.parse_response(tokenizer.decode(list(row)), prefix=tokenizer.decode(list(prompt)))
    except (ValueError, AttributeError, TypeError, KeyError):
        return answer  # no message in the template's form, such as one that the limit cut
    said = parts.get("content")
    thought = next((parts[name] for name in ("reasoning_content", "reasoning", "thinking") if parts.get(name)), "")
    if not isinstance(thought, str) or not isinstance(said, str | None):
        return answer
    why = "" if said or not parts.get("tool_calls") else "calls a tool instead of answering"
    return replace(answer, text=said or "", reasoning=thought, unanswered=why)


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Decoder]:
    """Yields a function from prompts and a limit to answers; the model comes back as it was."""
    training, own = model.training, model.generation_config
    ends = _end_tokens(own, tokenizer)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]

    def decode(ids: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        try:
            return _decode_batch(model, tokenizer, ids, new_tokens, ends, fill)
        except torch.cuda.OutOfMemoryError:
            if len(ids) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(ids) // 2
        return decode(ids[:half], new_tokens) + decode(ids[half:], new_tokens)

    model.eval()
    # What `generate` is not told it takes from here: models come with temperatures and repetition penalties.
    model.generation_config = GenerationConfig(pad_token_id=fill, eos_token_id=ends)
    try:
        with torch.inference_mode():
            yield decode
    finally:
        model.generation_config = own
        model.train(training)


def _decode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    new_tokens: int,
    ends: list[int],
    fill: int,
) -> list[Answer]:
    input_ids, attention_mask = pad(ids, fill, left=True)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )
    new = [_until_end(row, ends) for row in output[:, input_ids.shape[1] :].tolist()]
    return _answers(tokenizer, ids, new)


def _until_end(ids: list[int], ends: list[int]) -> tuple[list[int], bool]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[:position], True
    return ids, False


def _end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and those of the model's generation config: chat models end their turns with another."""
    own = getattr(config, "eos_token_id", None)
    more = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def _append(path: Path, answers: Mapping[int, Answer]) -> None:
    lines = [json.dumps({"row": row} | asdict(answer), ensure_ascii=True) + "\n" for row, answer in answers.items()]
    with path.open("ab") as file:
        file.write("".join(lines).encode("ascii"))


def read_answers(paths: Iterable[Path]) -> dict[int, Answer]:
    """Answers of earlier runs; a last line that a kill tore is cut off."""
    found: dict[int, Answer] = {}
    for path in paths:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content) and path.name.endswith(f"-{rank()}.jsonl"):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            value = json.loads(line)
            found.setdefault(value.pop("row"), Answer(**value))
    return found
