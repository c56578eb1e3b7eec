"""Which attention a model trains with on a CPU."""

import pytest
import torch

from pharmacist.nn.hooks import quick_attention
from tests.support.tiny import tiny_llama, tiny_tokenizer


def test_short_rows_in_bfloat16_train_with_another_attention_and_the_same_loss() -> None:
    model = tiny_llama(tiny_tokenizer()).bfloat16()
    ids = torch.arange(1, 13).repeat(2, 1)
    plain = model(input_ids=ids, labels=ids).loss
    with quick_attention(model, 12):
        assert model.config._attn_implementation == "eager"
        found = model(input_ids=ids, labels=ids).loss
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("length", "dtype", "grad"), [(257, "bfloat16", True), (9, "float32", True), (9, "bfloat16", False)]
)
def test_what_keeps_its_attention(length: int, dtype: str, grad: bool) -> None:
    model = tiny_llama(tiny_tokenizer()).to(getattr(torch, dtype))
    with torch.set_grad_enabled(grad), quick_attention(model, length):
        assert model.config._attn_implementation == "sdpa"


def test_it_comes_back_after_an_error_and_other_models_are_left_alone() -> None:
    model = tiny_llama(tiny_tokenizer()).bfloat16()
    with pytest.raises(RuntimeError), quick_attention(model, 9):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    with quick_attention(torch.nn.Linear(2, 2), 9):
        pass
