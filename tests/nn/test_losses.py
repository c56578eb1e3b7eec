import math

import pytest
import torch

from pharmacist.nn.batching import Batch, make_batch
from pharmacist.nn.losses import batch_loss, token_losses
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows, row_losses


CPU = torch.device("cpu")
VOCABULARY = 11


def by_hand(logits: list[list[float]], ids: list[int], n_prompt: int) -> float:
    """Mean cross-entropy of the completion, with Python floats; logits[t] predicts token t + 1."""
    losses = []
    for t in range(1, len(ids)):
        losses.append(math.log(math.fsum(map(math.exp, logits[t - 1]))) - logits[t - 1][ids[t]])
    completion = losses[max(n_prompt - 1, 0) :]
    return math.fsum(completion) / len(completion)


def losses_of(model: TinyDecoder, batch: Batch):
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return row_losses(output.logits, batch.input_ids, batch.lengths, batch.prompt_lengths)


def test_losses_equal_a_hand_computation():
    model = TinyDecoder(VOCABULARY)
    rows = TokenRows([([3], [4]), ([1, 2, 3], [4, 5, 6, 7, 8]), ([9, 9, 9, 9], [1]), ([2, 7], [0, 0, 3])])
    found = losses_of(model, make_batch(rows, range(4), CPU))
    for i, (prompt, completion) in enumerate(rows.pairs):
        ids = prompt + completion
        logits = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        expected = by_hand(logits, ids, len(prompt))
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)


def test_padding_batch_and_order_do_not_change_a_loss():
    model, rows = TinyDecoder(VOCABULARY), random_token_rows(12, VOCABULARY)
    alone = torch.cat([losses_of(model, make_batch(rows, [i], CPU)) for i in range(12)])
    order = [7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10]
    together = losses_of(model, make_batch(rows, order, CPU))
    torch.testing.assert_close(together, alone[order], rtol=0, atol=1e-12)
    # Negative control: with padding counted as tokens they do change.
    batch = make_batch(rows, order, CPU)
    broken = losses_of(
        model, Batch(batch.input_ids, torch.full_like(batch.lengths, int(batch.lengths.max())), batch.prompt_lengths)
    )
    assert (broken - alone[order]).abs().max() > 0.01


def test_the_prompt_never_enters_the_completion_loss():
    logits, ids = torch.randn(1, 6, VOCABULARY, dtype=torch.float64), torch.tensor([[1, 2, 3, 4, 5, 6]])
    lengths, prompts = torch.tensor([6]), torch.tensor([3])
    before = row_losses(logits, ids, lengths, prompts)
    changed = logits.clone()
    changed[0, :2] += torch.randn(2, VOCABULARY)  # the logits of prompt tokens 1 and 2
    after = row_losses(changed, ids, lengths, prompts)
    assert after == before
    changed[0, 2, 4] += 1  # the first completion token
    assert row_losses(changed, ids, lengths, prompts) < before


def test_half_precision_logits_are_summed_in_float32():
    logits, ids = torch.randn(2, 9, 50).bfloat16(), torch.randint(0, 50, (2, 9))
    assert token_losses(logits, ids).dtype == torch.float32
    assert token_losses(logits.double(), ids).dtype == torch.float64
    torch.testing.assert_close(
        token_losses(logits, ids).double(), token_losses(logits.double(), ids), rtol=0, atol=1e-5
    )


def test_the_batch_loss_is_the_mean_over_all_target_tokens():
    model, rows = TinyDecoder(VOCABULARY), random_token_rows(6, VOCABULARY)
    batch = make_batch(rows, range(6), CPU)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.requires_grad_()
    position = torch.arange(batch.input_ids.shape[1])[None, :]
    target = (position >= batch.prompt_lengths[:, None]) & (position < batch.lengths[:, None])
    labels = torch.where(target, batch.input_ids, -100)
    found = row_losses(logits, batch.input_ids, batch.lengths, batch.prompt_lengths)
    tokens = batch.lengths - batch.prompt_lengths
    expected = (found * tokens).sum() / tokens.sum()
    torch.testing.assert_close(batch_loss(logits, labels), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(batch_loss(logits, labels, 7), expected * tokens.sum() / 7, rtol=0, atol=1e-12)
    nothing = batch_loss(logits, torch.full_like(labels, -100))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0 and not gradient.any()


def test_the_last_logits_of_a_row_predict_nothing():
    logits, ids = torch.randn(2, 5, VOCABULARY, dtype=torch.float64), torch.randint(0, VOCABULARY, (2, 5))
    changed = logits.clone()
    changed[:, -1] += 5
    assert torch.equal(token_losses(logits, ids), token_losses(changed, ids))
    assert token_losses(logits, ids).shape == (2, 4)
