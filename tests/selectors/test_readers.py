"""Section 6.1 of the method: what must hold for each evidence reader, on a float64 decoder."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import make_batch
from pharmacist.selectors.evidence.combine import log_odds
from pharmacist.selectors.evidence.readers import adapters as adapters_module
from pharmacist.selectors.evidence.readers.adapters import (
    PROMPT_WEIGHT,
    adapter_losses,
    batch_stream,
    energy_log_posterior,
    train_class_adapter,
)
from pharmacist.selectors.evidence.readers.lexical import LexicalReader, fit_logistic
from pharmacist.selectors.evidence.readers.probe import N_STATISTICS, ProbeReader, hidden_features, probe_layers
from tests.selectors import village
from tests.tiny import TinyDecoder, TokenRows, random_token_rows, tiny_tokenizer


CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)
KINDS = ("safe", "harmful", "utility")
# A regression's optimum is found to about the square root of float64's precision, differently on each machine.
OPTIMUM = 1e-6
N = 14
POOL = village.pool(24)


def tokens(rows):
    ids = lambda text: TOKENIZER(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return TokenRows([(ids(row["prompt"]), [*ids(row["completion"]), 2]) for row in rows])


class Readers:
    """Trains one of the readers on classes of rows, and reads the pool with it."""

    def __init__(self, tmp_path) -> None:
        self.tmp_path, self.model, self.count = tmp_path, TinyDecoder(VOCABULARY, length=40), 0

    def lexical(self, classes, labels=None, n_classes=None):
        rows = [row for members in classes for row in members]
        labels = self.labels(classes) if labels is None else labels
        n_classes = n_classes or len(classes)
        text = lambda rows, part: [row[part] for row in rows]  # noqa: E731
        self.reader = LexicalReader().fit(text(rows, "prompt"), text(rows, "completion"), labels, n_classes)
        return self.reader.log_posterior(text(POOL, "prompt"), text(POOL, "completion"))

    def features(self, rows):
        sequences = tokens(rows)
        return np.concatenate([hidden_features(self.model, make_batch(sequences, [i], CPU)) for i in range(len(rows))])

    def probe(self, classes, labels=None, n_classes=None):
        labels = self.labels(classes) if labels is None else labels
        rows = [row for members in classes for row in members]
        self.reader = ProbeReader().fit(self.features(rows), labels, n_classes or len(classes))
        return self.reader.log_posterior(self.features(POOL))

    def adapters(self, classes, seeds=None):
        self.count += 1
        bank = AdapterBank(
            TinyDecoder(VOCABULARY, length=40), AdapterOptions(r=2, learning_rate=0.01, batch_size=4), 0
        )
        names = [f"class{k}" for k in range(len(classes))]
        for k, (name, rows) in enumerate(zip(names, classes, strict=True)):
            train_class_adapter(
                bank, name, tokens(rows), np.arange(len(rows)), steps=10, seed=seeds[k] if seeds else 0,
                checkpoint=self.tmp_path / f"{self.count}-{name}",
            )  # fmt: skip
        self.bank, self.names = bank, names
        with torch.no_grad():
            return energy_log_posterior(adapter_losses(bank, names, make_batch(tokens(POOL), range(len(POOL)), CPU)))

    @staticmethod
    def labels(classes):
        return np.repeat(np.arange(len(classes)), [len(rows) for rows in classes])


@pytest.fixture
def readers(tmp_path):
    return Readers(tmp_path)


SAFE, HARMFUL, UTILITY = (village.rows(kind, N) for kind in KINDS)
EACH = pytest.mark.parametrize("name", ["lexical", "probe", "adapters"])


@EACH
def test_posteriors_sum_to_one_and_tell_the_classes_apart(readers, name):
    posterior = np.exp(getattr(readers, name)([SAFE, HARMFUL, UTILITY]))
    np.testing.assert_allclose(posterior.sum(1), 1, rtol=0, atol=1e-12)
    kinds = [list(village.KINDS)[i % 5] for i in range(21)]
    right = [posterior[i].argmax() == KINDS.index(kind) for i, kind in enumerate(kinds) if kind in KINDS]
    assert np.mean(right) > 0.8


@EACH
def test_equal_references_make_classes_exchangeable(readers, name):
    posterior = np.exp(getattr(readers, name)([SAFE, SAFE, UTILITY]))
    np.testing.assert_allclose(posterior[:, 0], posterior[:, 1], rtol=0, atol=OPTIMUM)
    # Negative control: one row more in one of them is seen.
    other = np.exp(getattr(readers, name)([SAFE, [*SAFE[1:], HARMFUL[0]], UTILITY]))
    assert np.abs(other[:, 0] - other[:, 1]).max() > 100 * OPTIMUM


def test_adapters_with_seeds_of_their_own_would_not_be_exchangeable(readers):
    """Negative control of the common random numbers."""
    posterior = np.exp(readers.adapters([SAFE, SAFE], seeds=[0, 1]))
    assert np.abs(posterior[:, 0] - posterior[:, 1]).max() > 1e-4


@EACH
def test_swapping_two_classes_negates_every_score(readers, name):
    forth = log_odds(getattr(readers, name)([SAFE, HARMFUL]))
    back = log_odds(getattr(readers, name)([HARMFUL, SAFE]))
    assert np.abs(forth).max() > 0.01
    np.testing.assert_allclose(back, -forth, rtol=0, atol=OPTIMUM)
    if name == "adapters":
        assert np.array_equal(back, -forth)


@pytest.mark.parametrize("name", ["lexical", "probe"])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_class_without_rows_has_probability_zero(readers, name, missing):
    read = getattr(readers, name)
    present = [k for k in range(3) if k != missing]
    labels = np.repeat(present, N)
    posterior = read([SAFE, HARMFUL], labels=labels, n_classes=3)
    two = read([SAFE, HARMFUL])
    assert np.exp(posterior[:, missing]).max() < 1e-15 and np.isfinite(posterior).all()
    np.testing.assert_allclose(posterior[:, present], two, rtol=0, atol=OPTIMUM)


def test_an_adapter_that_is_missing_is_a_class_of_probability_zero(readers):
    three = readers.adapters([SAFE, HARMFUL, UTILITY])
    two = readers.adapters([SAFE, HARMFUL])
    three[:, 2] = -np.inf
    np.testing.assert_allclose(log_softmax(three, axis=1)[:, :2], two, rtol=0, atol=1e-12)


def test_the_energy_equals_its_formula():
    losses = {
        "prompt_loss": np.array([[1.0, 2.0], [0.5, 0.25]]), "completion_loss": np.array([[3.0, 1.0], [2.0, 2.5]]),
        "n_prompt": np.array([4.0, 9.0]), "n_completion": np.array([16.0, 1.0]),
    }  # fmt: skip
    energy = [[-(PROMPT_WEIGHT * 2 * 1 + 4 * 3), -(PROMPT_WEIGHT * 2 * 2 + 4 * 1)],
              [-(PROMPT_WEIGHT * 3 * 0.5 + 1 * 2), -(PROMPT_WEIGHT * 3 * 0.25 + 1 * 2.5)]]  # fmt: skip
    expected = np.array([[e - np.log(np.exp(row).sum()) for e in row] for row in np.array(energy)])
    np.testing.assert_allclose(energy_log_posterior(losses), expected, atol=1e-12)


@EACH
def test_training_twice_gives_the_same_reader_bitwise(readers, name):
    assert np.array_equal(getattr(readers, name)([SAFE, HARMFUL]), getattr(readers, name)([SAFE, HARMFUL]))


@EACH
def test_a_saved_reader_reads_the_same(readers, name, tmp_path):
    before = getattr(readers, name)([SAFE, HARMFUL, UTILITY])
    if name == "lexical":
        readers.reader.save(tmp_path / "saved")
        loaded = LexicalReader.load(tmp_path / "saved")
        after = loaded.log_posterior([row["prompt"] for row in POOL], [row["completion"] for row in POOL])
        assert readers.reader.contributions(**SAFE[0], column=0) == loaded.contributions(**SAFE[0], column=0)
    elif name == "probe":
        readers.reader.save(tmp_path / "saved")
        after = ProbeReader.load(tmp_path / "saved").log_posterior(readers.features(POOL))
    else:
        bank = AdapterBank(TinyDecoder(VOCABULARY, length=40), AdapterOptions(r=2), 5)
        for adapter in readers.names:
            readers.bank.save(adapter, tmp_path / adapter)
            bank.load(adapter, tmp_path / adapter)
        with torch.no_grad():
            after = energy_log_posterior(
                adapter_losses(bank, readers.names, make_batch(tokens(POOL), range(len(POOL)), CPU))
            )
    assert np.array_equal(before, after)
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_lexical_reader_reads_each_row_by_itself(readers):
    together = readers.lexical([SAFE, HARMFUL, UTILITY])
    for i, row in enumerate(POOL):
        alone = readers.reader.log_posterior([row["prompt"]], [row["completion"]])
        assert np.array_equal(alone[0], together[i])


def test_a_lexical_reader_names_the_words(readers):
    readers.lexical([SAFE, HARMFUL, UTILITY])
    words = [word for word, _ in readers.reader.contributions(**SAFE[0], column=0, top=30)]
    assert any(word.startswith("completion:") for word in words[:5])
    weights = [weight for _, weight in readers.reader.contributions(**SAFE[0], column=0, top=30)]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("regularisation", [0.01, 100.0])
@pytest.mark.parametrize("width", [25, 150])
def test_the_logistic_regression_is_exact(regularisation, width, recwarn):
    """The gradient of the class-balanced, penalised likelihood, written from its definition, is zero."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = np.sort(rng.integers(0, 4, 60))
        features = rng.normal(size=(60, width)) * rng.uniform(0.1, 3, width)
        features += labels[:, None] * rng.normal(size=width)
        w, b = fit_logistic(features, labels, 4, regularisation)
        counts = np.bincount(labels, minlength=4)
        balance = (60 / (4 * counts))[labels][:, None]
        residual = balance * (np.exp(log_softmax(features @ w.T + b, axis=1)) - np.eye(4)[labels])
        gradient = residual.T @ features + w / regularisation
        assert np.abs(gradient).max() < 1e-7 * 60 and np.abs(residual.sum(0)).max() < 1e-7 * 60
    assert not recwarn.list


def test_words_never_seen_are_no_error(readers):
    readers.lexical([SAFE, HARMFUL])
    assert np.isfinite(readers.reader.log_posterior(["zzz", "…"], ["qqq", "日本"])).all()


def test_probe_features_are_means_over_prompt_and_completion_and_the_last_token():
    model, rows = TinyDecoder(9), random_token_rows(7, 9)
    features = hidden_features(model, make_batch(rows, range(7), CPU))
    layers = probe_layers(2)
    assert features.shape == (7, 4 * len(layers) * 16 + N_STATISTICS)
    for i, (prompt, completion) in enumerate(rows.pairs):
        states = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        n = len(prompt)
        parts = [p for layer in layers for p in (states[layer][0, :n].mean(0), states[layer][0, n:].mean(0),
                                                 states[layer][0, -1], states[layer][0, -2])]  # fmt: skip
        np.testing.assert_allclose(features[i, :-N_STATISTICS], torch.cat(parts).numpy(), rtol=0, atol=1e-12)


def test_probe_statistics_equal_a_computation_by_hand():
    model, rows = TinyDecoder(9), random_token_rows(7, 9)
    found = hidden_features(model, make_batch(rows, range(7), CPU))[:, -N_STATISTICS:]
    for i, (prompt, completion) in enumerate(rows.pairs):
        ids = torch.tensor([prompt + completion])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses = -log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        n = len(prompt)
        of_prompt, body = losses[: n - 1], losses[n - 1 : -1]
        expected = [
            of_prompt.mean() if len(of_prompt) else 0.0, body.mean() if len(body) else 0.0,
            body.std(correction=0) if len(body) else 0.0, losses[-1], math.log(len(completion)), math.log(n),
        ]  # fmt: skip
        np.testing.assert_allclose(found[i], [float(value) for value in expected], rtol=0, atol=1e-12)


def test_probed_layers_lie_in_the_later_half():
    assert probe_layers(2) == (1, 2) and probe_layers(4) == (2, 3, 4) and probe_layers(32) == (16, 24, 32)
    assert all(1 <= layer <= n for n in range(1, 100) for layer in probe_layers(n))


def test_a_batch_stream_uses_every_row_equally_often():
    stream = batch_stream(7, 4, 21, 0)
    assert stream.shape == (21, 4)
    assert (np.bincount(stream.ravel(), minlength=7) == 12).all()
    assert np.array_equal(stream[:5], batch_stream(7, 4, 5, 0)), "a shorter training is the start of a longer one"
    assert not np.array_equal(stream, batch_stream(7, 4, 21, 1))
    assert (np.sort(stream.ravel()[:7]) == np.arange(7)).all() and not np.array_equal(
        stream.ravel()[:7], stream.ravel()[7:14]
    )


def test_the_class_loss_weighs_prompt_and_completion(readers, monkeypatch):
    """With the prompt's weight at 0 an over-refusal looks like a refusal."""
    kinds = [SAFE, [r | {"prompt": u["prompt"]} for r, u in zip(SAFE, UTILITY, strict=True)]]
    with_prompt = readers.adapters(kinds)
    monkeypatch.setattr(adapters_module, "PROMPT_WEIGHT", 0.0)
    without = readers.adapters(kinds)
    asks_good = np.array([list(village.KINDS)[i % 5] in ("utility", "over_refusal") for i in range(21)])
    gap = lambda p: log_odds(p)[:21][~asks_good].mean() - log_odds(p)[:21][asks_good].mean()  # noqa: E731
    assert gap(with_prompt) > gap(without) + 0.01
