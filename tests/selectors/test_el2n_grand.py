"""EL2N and GraNd against one-hot vectors, loops of backward passes and each other: properties 3, 4 and 23."""

import copy

import numpy as np
import pytest
import torch

from pharmacist.core.errors import ConfigError
from pharmacist.nn.batching import Batch
from pharmacist.selectors.data_diet import error_norms, head_tape
from tests.support import village
from tests.support.peers import DECODER, TOKENIZER, ranked, token_rows
from tests.support.tiny import TinyDecoder, row_losses


POOL = village.pool(14)
BY = pytest.mark.parametrize("by", ["head", "lora"])


def batch_of(prompt: list[int], completion: list[int]) -> Batch:
    return Batch(
        torch.tensor([[*prompt, *completion]]),
        torch.tensor([len(prompt) + len(completion)]),
        torch.tensor([len(prompt)]),
    )


def own_loss(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    batch = batch_of(prompt, completion)
    return row_losses(model(batch.input_ids).logits, batch.input_ids, batch.lengths, batch.prompt_lengths)


def test_el2n_is_the_length_of_softmax_minus_one_hot(tmp_path):
    found, expected = ranked(tmp_path / "a", {"name": "el2n"}, POOL), []
    for prompt, completion in token_rows(POOL):
        p = DECODER(torch.tensor([[*prompt, *completion]])).logits[0].softmax(-1)
        one_hot = torch.eye(len(TOKENIZER), dtype=torch.float64)[completion]
        expected.append(float((p[len(prompt) - 1 : -1] - one_hot).norm(dim=1).mean()))
    np.testing.assert_allclose(found.score, expected, rtol=1e-12)
    low = ranked(tmp_path / "b", {"name": "el2n", "keep": "low"}, POOL)
    assert np.array_equal(low.score, -found.score)


def test_el2n_keeps_its_digits_where_the_model_is_nearly_right():
    ids = torch.tensor([[3, 1, 2]])
    batch = Batch(ids, torch.tensor([3]), torch.tensor([1]))
    logits = torch.zeros(1, 3, 5, dtype=torch.float64)
    logits[0, 0, 1] = logits[0, 1, 2] = 40.0
    small = float(np.exp(-40.0))  # p of each other token
    expected = np.sqrt(4 * small**2 + (4 * small) ** 2)
    assert float(error_norms(logits, batch)) == pytest.approx(expected, rel=1e-6) and 0 < expected < 1e-15
    logits[0, 1, 2], logits[0, 1, 0] = 0.0, 40.0  # the second is sure and wrong
    assert float(error_norms(logits, batch)) == pytest.approx(np.sqrt(2) / 2, rel=1e-6)


@BY
def test_grand_is_the_norm_of_each_rows_own_gradient(tmp_path, by):
    model = copy.deepcopy(DECODER)
    found = ranked(tmp_path, {"name": "grand", "by": by, "r": 3}, POOL, model=model)
    # With adapters on it the model is the same function; the weights to differentiate by are found by name.
    weights = [p for n, p in model.named_parameters() if ("lora_" in n if by == "lora" else n == "lm_head.weight")]
    assert len(weights) == (1 if by == "head" else 2 * 12)
    expected = []
    for pair in token_rows(POOL):
        for weight in weights:
            weight.requires_grad_()
        gradients = torch.autograd.grad(own_loss(model, *pair).sum(), weights)
        expected.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
    np.testing.assert_allclose(found.score, expected, rtol=1e-10)
    assert found.score.std() > 0.01 * found.score.mean(), "else this proves nothing"


def test_the_kinds_of_gradient_differ_and_low_is_the_reverse_of_high(tmp_path):
    scores = {
        by: ranked(tmp_path / by, {"name": "grand", "by": by}, POOL, model=copy.deepcopy(DECODER)).score
        for by in ("head", "lora")
    }
    assert not np.array_equal(np.argsort(scores["head"]), np.argsort(scores["lora"]))
    low = ranked(tmp_path / "low", {"name": "grand", "keep": "low"}, POOL)
    assert np.array_equal(low.score, -scores["head"])


def test_of_one_token_grand_is_el2n_times_what_the_head_reads():
    for prompt, completion in token_rows(POOL)[:4]:
        batch = batch_of(prompt, completion[:1])
        state = DECODER(batch.input_ids, output_hidden_states=True).hidden_states[-1][0, -2]
        norm = float(head_tape(DECODER, DECODER.lm_head, batch).square_norms().sqrt())
        el2n = float(error_norms(DECODER(batch.input_ids).logits, batch))
        tape = head_tape(DECODER, DECODER.lm_head, batch).inputs["head"][0, -2]
        assert norm == pytest.approx(el2n * float(tape.norm()), rel=1e-12)
        assert torch.allclose(tape, DECODER.norm(state)) or torch.allclose(tape, state)


class NoHead(TinyDecoder):
    def get_output_embeddings(self):
        return None


def test_a_model_without_a_named_head_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"does not name its output head; take --selector\.by lora"):
        ranked(tmp_path, {"name": "grand"}, POOL, model=NoHead(len(TOKENIZER)))
