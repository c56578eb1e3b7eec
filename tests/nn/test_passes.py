import numpy as np
import pytest
import torch

from pharmacist.nn import passes
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.nn.passes import run_pass
from tests.support.tiny import TinyDecoder, TokenRows, random_token_rows


MODEL, CPU = torch.nn.Linear(1, 1), torch.device("cpu")
VOCABULARY = 12


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(passes, "ROWS_PER_CHUNK", 7)


class Measure:
    """Sums of tokens, counted; killed at a given batch."""

    def __init__(self, killed_at: int = -1) -> None:
        self.seen: list[list[int]] = []
        self.killed_at = killed_at

    def __call__(self, batch):
        if len(self.seen) == self.killed_at:
            raise KeyboardInterrupt
        self.seen.append([tuple(row[:n]) for row, n in zip(batch.input_ids.tolist(), batch.lengths, strict=True)])
        sums = batch.input_ids.sum(1).double().numpy()
        return {"sum": sums, "pair": np.stack([sums, -sums], 1)}


def passed(sequences, work, measure=None, **options):
    options = {"tokens": 40} | options
    return run_pass(MODEL, sequences, measure or Measure(), work=work, description="test", **options)


def test_every_row_is_measured_once_and_lands_in_its_place(tmp_path):
    rows = random_token_rows(50, VOCABULARY)
    rows = TokenRows(rows.pairs + rows.pairs[10:20])
    measure = Measure()
    found = passed(rows, tmp_path, measure)
    assert found["sum"].tolist() == [sum(p) + sum(c) for p, c in rows.pairs]
    assert (found["pair"][:, 1] == -found["sum"]).all()
    visited = [row for batch in measure.seen for row in batch]
    assert len(visited) == len(np.unique(rows.content_keys)) <= 50, "equal rows are read once"


@pytest.mark.parametrize("killed_at", [0, 1, 5, 9])
def test_a_killed_pass_goes_on_where_it_was(tmp_path, killed_at):
    rows = random_token_rows(50, VOCABULARY)
    straight = passed(rows, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        passed(rows, tmp_path / "killed", Measure(killed_at))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.safetensors")}
    measure = Measure()
    found = passed(rows, tmp_path / "killed", measure)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    total = len([row for batch in measure.seen for row in batch])
    assert total < 50 if kept else total == 50
    assert all(np.array_equal(found[key], straight[key]) for key in straight)
    again = Measure()
    passed(rows, tmp_path / "killed", again)
    assert again.seen == [], "what is done is not done again"
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_a_pass_over_other_rows_begins_anew(tmp_path):
    rows = random_token_rows(50, VOCABULARY)
    passed(rows, tmp_path)
    fewer = TokenRows(rows.pairs[5:])
    assert passed(fewer, tmp_path)["sum"].tolist() == [sum(p) + sum(c) for p, c in fewer.pairs]
    asked = np.arange(20, 45)
    assert passed(fewer, tmp_path, rows=asked)["sum"][asked].tolist() == passed(fewer, tmp_path)["sum"][asked].tolist()


def test_the_plan_of_a_begun_pass_stays(tmp_path):
    rows = random_token_rows(30, VOCABULARY)
    with pytest.raises(KeyboardInterrupt):
        passed(rows, tmp_path, Measure(4))
    found = passed(rows, tmp_path, tokens=1000)
    assert found["sum"].tolist() == [sum(p) + sum(c) for p, c in rows.pairs]


def test_rows_that_were_not_asked_for_are_nan(tmp_path):
    rows = random_token_rows(20, VOCABULARY)
    rows = TokenRows([*rows.pairs, rows.pairs[4]])
    asked = np.array([2, 4, 20])
    measure = Measure()
    found = passed(rows, tmp_path, measure, rows=asked)["sum"]
    assert np.flatnonzero(~np.isnan(found)).tolist() == [2, 4, 20] and found[4] == found[20]
    assert sum(map(len, measure.seen)) == 2


def losses(sequences, work, **options):
    bank = AdapterBank(TinyDecoder(VOCABULARY), AdapterOptions(r=2), 0)

    def measure(batch):
        return {"loss": bank.row_losses(None, batch).numpy()}

    return passed(sequences, work, measure, **options)["loss"]


def test_losses_do_not_depend_on_order_batches_or_padding(tmp_path):
    rows = random_token_rows(40, VOCABULARY, longest=20)
    reference = losses(rows, tmp_path / "a")
    order = np.random.default_rng(0).permutation(40)
    permuted = losses(TokenRows([rows.pairs[i] for i in order]), tmp_path / "b")
    assert np.array_equal(permuted, reference[order]), "bitwise: the batches are the same"
    for number, tokens in enumerate((1, 100, 10_000)):
        found = losses(rows, tmp_path / f"c{number}", tokens=tokens)
        np.testing.assert_allclose(found, reference, rtol=0, atol=1e-12)
    few = losses(rows, tmp_path / "d", rows=np.array([3, 17]))
    np.testing.assert_allclose(few[[3, 17]], reference[[3, 17]], rtol=0, atol=1e-12)


class Full(Measure):
    """Runs out of memory where a batch has more tokens than `room`."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.tried = room, list[int]()

    def __call__(self, batch):
        self.tried.append(batch.input_ids.numel())
        if self.tried[-1] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a cauldron")
        return super().__call__(batch)


def fitting(sequences, folder, measure, tokens, monkeypatch):
    """Tokens per batch on a GPU that is a CPU."""
    monkeypatch.setattr(passes, "make_batch", lambda sequences, batch, device: make_batch(sequences, batch, CPU))
    return passes._fitting(sequences, measure, folder, torch.device("cuda"), tokens, None)


def test_tokens_per_batch_are_halved_until_the_longest_batch_fits(tmp_path, monkeypatch):
    rows, measure = random_token_rows(400, VOCABULARY), Full(100)
    assert fitting(rows, tmp_path, measure, 800, monkeypatch) == 100
    assert len(measure.tried) == 4 and measure.tried[-1] <= 100


def test_a_row_that_cannot_fit_is_tried_once_alone_and_the_error_is_the_devices(tmp_path, monkeypatch):
    measure = Full(3)
    with pytest.raises(torch.OutOfMemoryError, match="cauldron"):
        fitting(random_token_rows(40, VOCABULARY), tmp_path, measure, 64, monkeypatch)
    assert len(measure.tried) < 7 and not (tmp_path / "plan.json").exists()
