"""Losses read without all logits, against those from all of them."""

import pytest
import torch
from torch import nn

from pharmacist.nn import reading
from pharmacist.nn.batching import make_batch
from pharmacist.nn.losses import mean_losses, token_losses
from pharmacist.nn.reading import read_losses, read_row_losses
from tests.support.tiny import TinyDecoder, random_token_rows, row_losses, tiny_llama, tiny_tokenizer


CPU, VOCABULARY = torch.device("cpu"), 11
ROWS = random_token_rows(9, VOCABULARY, longest=20)
BATCH = make_batch(ROWS, range(9), CPU)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every vocabulary for a large one, and few logits at a time."""
    monkeypatch.setattr(reading, "_LARGE", 1)
    monkeypatch.setattr(reading, "_LOGITS", {"cpu": (3 * VOCABULARY, 2 * VOCABULARY)})


class Counted:
    """How many positions a head has seen."""

    def __init__(self, head: nn.Module) -> None:
        self.calls: list[int] = []
        head.register_forward_hook(lambda module, args, output: self.calls.append(output.numel() // VOCABULARY))


@torch.inference_mode()
def test_losses_are_those_from_all_logits() -> None:
    model = TinyDecoder(VOCABULARY)
    output = model(BATCH.input_ids, BATCH.attention_mask)
    expected = row_losses(output.logits, BATCH.input_ids, BATCH.lengths, BATCH.prompt_lengths)
    counted = Counted(model.lm_head)
    for _ in range(2):  # the first time the head is looked at
        found = mean_losses(read_losses(model, BATCH)[0], BATCH.lengths, BATCH.prompt_lengths)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert max(counted.calls) == 3
    assert sum(counted.calls) == 2 * (int(BATCH.lengths.sum()) - len(BATCH.lengths)) + 2, "no padding, no last token"


@torch.inference_mode()
def test_prompts_cost_nothing_where_nobody_reads_them() -> None:
    model = TinyDecoder(VOCABULARY)
    whole, _ = read_losses(model, BATCH)
    expected = mean_losses(whole, BATCH.lengths, BATCH.prompt_lengths)
    counted = Counted(model.lm_head)
    found = read_row_losses(model, BATCH)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert sum(counted.calls) == int((BATCH.lengths - BATCH.prompt_lengths).sum())


@torch.inference_mode()
def test_a_library_model_and_what_else_it_puts_out() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    output = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask, output_hidden_states=True)
    losses, found = read_losses(model, BATCH, output_hidden_states=True)
    expected, real = token_losses(output.logits, BATCH.input_ids), BATCH.attention_mask[:, 1:].bool()
    torch.testing.assert_close(losses[real], expected[real], rtol=0, atol=1e-5)
    assert all(map(torch.equal, found.hidden_states, output.hidden_states))


@torch.inference_mode()
def test_logits_that_the_model_caps_are_capped() -> None:
    class Capped(TinyDecoder):
        def forward(self, *args: object, **options: object) -> object:
            output = super().forward(*args, **options)  # type: ignore[arg-type]
            output.logits = torch.tanh(output.logits)
            return output

    model = Capped(VOCABULARY)
    output = model(BATCH.input_ids, BATCH.attention_mask)
    real = BATCH.attention_mask[:, 1:].bool()
    for _ in range(2):
        losses, _ = read_losses(model, BATCH)
        assert torch.equal(losses[real], token_losses(output.logits, BATCH.input_ids)[real])


def test_gradients_come_from_the_logits_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyDecoder(VOCABULARY)
    counted = Counted(model.lm_head)
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    loss = read_row_losses(model, BATCH).sum()
    assert counted.calls == [int((BATCH.lengths - BATCH.prompt_lengths).sum())]
    few = torch.autograd.grad(loss, parameters)
    monkeypatch.setattr(reading, "_LARGE", VOCABULARY + 1)
    everything = torch.autograd.grad(read_row_losses(model, BATCH).sum(), parameters)
    for found, expected in zip(few, everything, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected.any()


def test_small_vocabularies_see_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyDecoder(VOCABULARY)
    counted = Counted(model.lm_head)
    monkeypatch.setattr(reading, "_LARGE", VOCABULARY + 1)
    with torch.inference_mode():
        read_losses(model, BATCH)
    assert counted.calls == [BATCH.input_ids.numel()]
