"""Selectors that rank by length and by the base model's losses: properties 22 and 25, and closed forms."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from pharmacist.core.errors import ConfigError
from pharmacist.selectors import SELECTORS
from pharmacist.selectors.base import RANKED
from pharmacist.selectors.losses import NO_HELP, Alone
from tests.support import village
from tests.support.peers import DECODER, TOKENIZER, ranked, token_rows
from tests.support.tiny import TinyDecoder, random_token_rows


POOL = village.pool(16)


def loss_by_hand(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    """One row at a time, one token at a time, without padding."""
    ids, losses = [*prompt], []
    for token in completion:
        logits = model(torch.tensor([ids])).logits[0, -1]
        losses.append(float(functional.cross_entropy(logits, torch.tensor(token))))
        ids.append(token)
    return float(np.mean(losses))


EXPECTED = np.array([loss_by_hand(DECODER, *pair) for pair in token_rows(POOL)])


def test_length_counts_characters(tmp_path):
    pool = [{"prompt": "a long prompt does not count", "completion": text} for text in ("yes", "no", "maybe so")]
    found = ranked(tmp_path / "a", {"name": "length"}, pool)
    assert found.score.tolist() == found.signals["characters"].tolist() == [3, 2, 8]
    shortest = ranked(tmp_path / "b", {"name": "length", "keep": "shortest"}, pool)
    assert shortest.score.tolist() == [-3, -2, -8] and set(shortest.reason) == {RANKED}


def test_perplexities_are_those_of_a_loop_over_rows_and_tokens(tmp_path):
    low, high = (ranked(tmp_path / keep, {"name": "perplexity", "keep": keep}, POOL) for keep in ("low", "high"))
    np.testing.assert_allclose(np.log(low.signals["perplexity"]), EXPECTED, rtol=1e-12)
    assert np.array_equal(-low.score, low.signals["perplexity"]) and np.array_equal(high.score, -low.score)
    shifted = np.array([loss_by_hand(DECODER, [*p, c[0]], c[1:]) for p, c in token_rows(POOL)])
    assert np.abs(shifted - EXPECTED).max() > 0.01, "the first completion token counts"


def test_the_middle_of_the_perplexities_ranks_first(tmp_path):
    found = ranked(tmp_path, {"name": "perplexity"}, POOL[:13])  # distinct rows, an odd number
    loss = np.log(found.signals["perplexity"])
    assert loss[found.score.argmax()] == pytest.approx(np.median(loss))
    np.testing.assert_allclose(found.score, -np.abs(loss - np.median(loss)), rtol=1e-12)
    assert found.score.argmin() in (loss.argmin(), loss.argmax())


def test_what_read_the_pool_once_is_not_read_again(tmp_path, monkeypatch):
    first = ranked(tmp_path, {"name": "perplexity"}, POOL)
    monkeypatch.setattr(TinyDecoder, "forward", lambda *_, **__: pytest.fail("the model ran again"))
    again = ranked(tmp_path, {"name": "perplexity"}, POOL)
    assert np.array_equal(first.score, again.score)


class PromptBlind(TinyDecoder):
    """Predicts every token from nothing: neither prompt nor what came before."""

    def forward(self, input_ids, **options):
        found = super().forward(input_ids, **options)
        found.logits = self.lm_head.weight[:, 0].expand_as(found.logits)
        return found


def test_ifd_is_one_where_the_prompt_changes_nothing(tmp_path):
    blind = ranked(tmp_path / "a", {"name": "ifd"}, POOL, model=PromptBlind(len(TOKENIZER)))
    np.testing.assert_allclose(blind.signals["ifd"], 1, rtol=1e-14)
    seeing = ranked(tmp_path / "b", {"name": "ifd"}, POOL)
    assert np.abs(seeing.signals["ifd"] - 1).max() > 0.01 and (seeing.signals["ifd"] > 0).all()


def test_ifd_is_the_ratio_of_mean_losses(tmp_path):
    found = ranked(tmp_path, {"name": "ifd"}, POOL)
    alone = np.array([loss_by_hand(DECODER, [1], completion) for _, completion in token_rows(POOL)])
    np.testing.assert_allclose(found.signals["loss_alone"], alone, rtol=1e-12)
    np.testing.assert_allclose(found.signals["ifd"], EXPECTED / alone, rtol=1e-12)
    above = found.signals["ifd"] > 1
    assert 0 < above.sum() < len(POOL) and found.report["above_most"] == above.sum()
    assert found.score[above].max() < found.score[~above].min(), "rows that the prompt does not help come last"
    assert ((found.reason == NO_HELP) == above).all()
    assert np.array_equal(np.argsort(found.score[~above]), np.argsort(found.signals["ifd"][~above]))


def test_completions_alone_keep_their_tokens_and_equal_ones_are_one_row():
    rows = random_token_rows(9, 20)
    rows.pairs[1] = ([5, 6, 7, 8], rows.pairs[0][1])
    rows = type(rows)(rows.pairs)
    alone = Alone(rows, 1)
    for row, (_, completion) in enumerate(rows.pairs):
        assert alone.token_ids([row])[0].tolist() == [1, *completion] and alone.lengths[row] == 1 + len(completion)
    assert alone.content_keys[0] == alone.content_keys[1] and rows.content_keys[0] != rows.content_keys[1]
    assert len(set(alone.content_keys.tolist())) == len({tuple(c) for _, c in rows.pairs})


@pytest.mark.parametrize("name", ["ifd", "perplexity"])
def test_without_a_model_they_say_so(tmp_path, name):
    work = village.context(tmp_path, None, POOL)
    with pytest.raises(ConfigError, match="give --model"):
        SELECTORS.build_from({"name": name}).rank(work)
    work.run.close()
