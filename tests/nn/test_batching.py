import numpy as np
import pytest
import torch

from pharmacist.nn.batching import batch_stream, make_batch, plan_pass
from tests.support.tiny import TokenRows, random_token_rows


CPU = torch.device("cpu")


def test_a_batch_is_padded_on_the_right_and_masked_by_length():
    rows = TokenRows([([5, 6], [7]), ([8], [9, 0, 4, 3])])
    batch = make_batch(rows, [1, 0], CPU)
    assert batch.input_ids.tolist() == [[8, 9, 0, 4, 3], [5, 6, 7, 0, 0]]
    # Token 0 of the first row is a token like any other, though padding is 0 as well.
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert (batch.lengths.tolist(), batch.prompt_lengths.tolist(), batch.tokens) == ([5, 3], [1, 2], 8)


@pytest.mark.parametrize("budget", [1, 7, 40, 10_000])
def test_a_plan_visits_every_distinct_row_once_within_the_budget(budget):
    rows = random_token_rows(50, 9, longest=6)
    rows = TokenRows(rows.pairs + rows.pairs[:20])
    plan = plan_pass(rows, budget)
    visited = np.concatenate(plan.batches)
    assert len(np.unique(rows.content_keys)) == len(visited) == len(np.unique(rows.content_keys[visited]))
    assert (rows.content_keys[plan.representative] == rows.content_keys).all()
    assert np.isin(plan.representative, visited).all()
    for batch in plan.batches:
        assert len(batch) == 1 or len(batch) * rows.lengths[batch].max() <= budget
    assert (np.diff(rows.lengths[visited]) <= 0).all(), "longest first: what does not fit fails at once"


def test_batches_depend_on_content_alone():
    rows = random_token_rows(60, 5, longest=4)
    order = np.random.default_rng(1).permutation(60)
    permuted = TokenRows([rows.pairs[i] for i in order])
    content = lambda r, plan: [[r.content_keys[i] for i in batch] for batch in plan.batches]  # noqa: E731
    assert content(rows, plan_pass(rows, 30)) == content(permuted, plan_pass(permuted, 30))


def test_a_plan_of_some_rows_leaves_the_others_alone():
    rows = random_token_rows(30, 50)
    some = np.array([3, 4, 20])
    plan = plan_pass(rows, 100, some)
    assert sorted(np.concatenate(plan.batches)) == [3, 4, 20]
    assert (plan.representative == np.arange(30)).all()


def test_rows_that_differ_only_in_where_the_prompt_ends_are_different_rows():
    rows = TokenRows([([1, 2], [3]), ([1], [2, 3])])
    assert len(np.concatenate(plan_pass(rows, 100).batches)) == 2


def test_a_stream_visits_every_row_once_per_epoch_in_another_order_each_time():
    found = batch_stream(12, 5, 12, seed=3)
    assert found.shape == (12, 5)
    epochs = found.reshape(5, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    assert (batch_stream(12, 5, 7, seed=3) == found[:7]).all(), "more steps begin as fewer do"
    assert (batch_stream(12, 5, 12, seed=4) != found).any()
