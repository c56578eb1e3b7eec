"""LESS's inner products and cosines against dattri's (Deng et al. 2024), which forms every row's gradient by vmap.

dattri is no dependency: ``pip install --no-deps dattri`` (MIT) makes these tests run.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from pharmacist.nn.adapters import AdapterBank, TrainingState
from pharmacist.nn.batching import make_batch
from pharmacist.selectors.gradients import row_tape, run_jobs
from pharmacist.selectors.less import (
    BETAS,
    EPS,
    LEARNER,
    LessConfig,
    checkpoint_weights,
    exact_cosines,
    exact_direction,
    load_checkpoint,
    warm_up_job,
)
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows


pytest.importorskip("dattri")
from dattri.algorithm import TracInAttributor
from dattri.task import AttributionTask


VOCABULARY = 15
POOL, SAFE = (TokenRows(random_token_rows(n, VOCABULARY, seed=n, longest=5).pairs) for n in (10, 9))
CONFIG = LessConfig(r=2, learning_rate=0.02, batch_size=4, epochs=3)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """dattri gathers what it finds in tensors of the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> tuple[AdapterBank, list[TrainingState]]:
    """A bank, and the checkpoints of a warm-up."""
    folder = tmp_path_factory.mktemp("warm")
    bank = AdapterBank(TinyDecoder(VOCABULARY), CONFIG, 0)
    run_jobs(bank, [warm_up_job(bank, POOL, np.arange(10), CONFIG.epochs, 0, folder)], "test")
    return bank, [load_checkpoint(folder, k) for k in range(CONFIG.epochs)]


def loader(bank: AdapterBank, rows: TokenRows, with_prompt: bool = False) -> DataLoader:
    """Rows of one length: tokens, their mask, and which of them are predicted."""
    batch = make_batch(rows, range(len(rows)), bank.device)
    place = torch.arange(batch.input_ids.shape[1])[None]
    wanted = (place < batch.lengths[:, None]) & (place >= (1 if with_prompt else batch.prompt_lengths[:, None]))
    return DataLoader(TensorDataset(batch.input_ids, batch.attention_mask, wanted), batch_size=4)


def theirs(bank: AdapterBank, checkpoints: list[TrainingState], weights, *, cosine: bool, **options) -> np.ndarray:
    """Influence of pool rows on safe ones by dattri, shape [pool rows, safe rows]."""
    names = {
        key: name for name, p in bank.model.named_parameters() for key, q in bank.parameters(LEARNER).items() if p is q
    }

    def loss(parameters, row):
        ids, mask, wanted = row
        out = functional_call(bank.model, parameters, kwargs={"input_ids": ids[None], "attention_mask": mask[None]})
        of_tokens = out.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return -(of_tokens * wanted[1:]).sum() / wanted[1:].sum()

    states = [
        bank.model.state_dict() | {names[key]: value for key, value in checkpoint.weight.items()}
        for checkpoint in checkpoints
    ]
    with bank.using(LEARNER), bank.differentiable(LEARNER):
        task = AttributionTask(loss_func=loss, model=bank.model, checkpoints=states)
        attributor = TracInAttributor(
            task, weight_list=torch.as_tensor(weights), normalized_grad=cosine, layer_name=list(names.values())
        )
        attributor.projector_kwargs = None  # to leave it out projects to 512 numbers
        return attributor.attribute(loader(bank, POOL, **options), loader(bank, SAFE)).numpy()


def in_sgd_scale(checkpoint: TrainingState) -> TrainingState:
    """With second moments at which Adam's scale is 1."""
    v = (1 - EPS) ** 2 * (1 - BETAS[1] ** checkpoint.step)
    return replace(checkpoint, v={name: torch.full_like(value, v) for name, value in checkpoint.v.items()})


def test_inner_products_are_grad_dot(warm):
    bank, checkpoints = warm
    bank.add(LEARNER, checkpoints[1].weights)
    references = list(row_tape(bank, LEARNER, make_batch(SAFE, range(9), bank.device)).gradients())
    tape = row_tape(bank, LEARNER, make_batch(POOL, range(10), bank.device))
    ours = np.stack([tape.inner({name: rows[k] for name, rows in references}).numpy() for k in range(9)], axis=1)
    expected = theirs(bank, checkpoints[1:2], [1.0], cosine=False)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
    assert np.abs(expected).max() > 1e-2
    # Negative control: with the loss of the prompt in it they are others.
    assert np.abs(theirs(bank, checkpoints[1:2], [1.0], cosine=False, with_prompt=True) - ours).max() > 1e-3


def test_cosines_over_the_checkpoints_are_cos_in(warm):
    bank, checkpoints = warm
    weights = checkpoint_weights(len(POOL), CONFIG)
    ours = np.zeros(10)
    for weight, checkpoint in zip(weights, map(in_sgd_scale, checkpoints), strict=True):
        bank.add(LEARNER, checkpoint.weight)
        direction = exact_direction(bank, SAFE, checkpoint)
        ours += weight * exact_cosines(bank, direction, make_batch(POOL, range(10), bank.device))
    expected = theirs(bank, checkpoints, weights, cosine=True).mean(1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
    assert np.ptp(expected) > 0.05
    # Negative control: the last checkpoint alone is not the sum over all.
    assert np.abs(theirs(bank, checkpoints[-1:], [1.0], cosine=True).mean(1) - ours).max() > 1e-3
