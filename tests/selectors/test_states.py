"""What one forward pass shows of a row, against computations by hand on a float64 decoder."""

import math

import numpy as np
import torch

from pharmacist.nn.batching import make_batch
from pharmacist.nn.losses import token_losses
from pharmacist.readers import states as module
from pharmacist.readers.states import N_STATISTICS, PARTS, hidden_states, loss_statistics
from tests.support.tiny import TinyDecoder, random_token_rows


CPU = torch.device("cpu")
MODEL, ROWS = TinyDecoder(9), random_token_rows(7, 9)
BATCH = make_batch(ROWS, range(7), CPU)


def test_states_are_means_over_request_and_answer_and_their_ends():
    found = hidden_states(MODEL)(BATCH)["states"]
    assert found.shape == (7, len(PARTS), 16) and found.dtype == np.float32
    for i, (prompt, completion) in enumerate(ROWS.pairs):
        layers = MODEL(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        states, n = layers[1][0], len(prompt)  # 0.63 of two layers
        end = max(n, n + len(completion) - 2)  # the last token before EOS, or EOS where there is no other
        expected = torch.stack([states[:n].mean(0), states[n - 1], states[n:].mean(0), states[end]])
        np.testing.assert_allclose(found[i], expected.numpy(), rtol=0, atol=1e-6)


def test_statistics_equal_a_computation_by_hand():
    output = MODEL(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask)
    found = loss_statistics(token_losses(output.logits, BATCH.input_ids), BATCH)
    assert found.shape == (7, N_STATISTICS)
    np.testing.assert_allclose(hidden_states(MODEL)(BATCH)["statistics"], found, rtol=0, atol=1e-5)
    for i, (prompt, completion) in enumerate(ROWS.pairs):
        ids = torch.tensor([prompt + completion])
        log_p = MODEL(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses = -log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        n = len(prompt)
        of_prompt, body = losses[: n - 1], losses[n - 1 : -1]
        expected = [
            of_prompt.mean() if len(of_prompt) else 0.0,
            body.mean() if len(body) else 0.0,
            body.std(correction=0) if len(body) else 0.0,
            losses[-1],
            math.log(len(completion)),
            math.log(n),
        ]
        np.testing.assert_allclose(found[i], [float(value) for value in expected], rtol=0, atol=1e-6)


def test_padding_and_the_rest_of_a_batch_change_nothing():
    together = hidden_states(MODEL)(BATCH)
    for i in range(7):
        alone = hidden_states(MODEL)(make_batch(ROWS, [i], CPU))
        for key, values in together.items():
            np.testing.assert_allclose(alone[key][0], values[i], rtol=0, atol=1e-6)


def test_wide_states_are_projected_always_in_the_same_way(monkeypatch):
    plain = hidden_states(MODEL)(BATCH)["states"].astype(np.float64)
    monkeypatch.setattr(module, "_WIDTH", 8)
    found = hidden_states(MODEL)(BATCH)["states"].astype(np.float64)
    assert found.shape == (7, len(PARTS), 8)
    assert np.array_equal(found, hidden_states(MODEL)(BATCH)["states"])
    # Linear, with a matrix of its own for each part.
    matrices = [np.linalg.lstsq(plain[:, part], found[:, part], rcond=None)[0] for part in range(len(PARTS))]
    for part, matrix in enumerate(matrices):
        np.testing.assert_allclose(plain[:, part] @ matrix, found[:, part], atol=1e-5)
    assert np.abs(matrices[0] - matrices[2]).max() > 0.01
