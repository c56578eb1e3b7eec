from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from pharmacist.core.errors import DataError
from pharmacist.data.batches import TOKENS_PER_BATCH
from pharmacist.data.templates import Template, choose_template
from pharmacist.data.tokenize import prompt_ids
from pharmacist.evaluation import generate as module
from pharmacist.evaluation.answers import Answer, AnswerLog
from pharmacist.evaluation.generate import cut_prompts, plan_batches
from tests.support.evaluations import batch_sizes
from tests.support.tiny import WORDS, tiny_llama, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
TEMPLATE = choose_template(TOKENIZER)


def prompts(n: int) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (k,), generator=generator).tolist()) for k in lengths]


def encoded(texts: list[str], template: Template = TEMPLATE) -> list[list[int]]:
    return prompt_ids([{"prompt": text} for text in texts], TOKENIZER, template)


def generate(model: torch.nn.Module, asked: list[str], template: Template = TEMPLATE, **options: Any) -> list[Answer]:
    return module.generate(model, TOKENIZER, encoded(asked, template), **options)


def slowly(model: torch.nn.Module, ids: list[int], limit: int, ends: set[int]) -> tuple[list[int], bool]:
    """Greedy decoding of one prompt without padding, cache or library."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < limit:
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in ends:
                return new, True
            new.append(token)
    return new, False


def eager_to_stop(seed: int = 0) -> torch.nn.Module:
    """A random model made livelier, so that answers differ in length and some end before the limit."""
    model = tiny_llama(TOKENIZER, seed, tie_word_embeddings=False, initializer_range=0.3)
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] *= 1.6
    return model


def test_batched_answers_equal_unpadded_uncached_ones() -> None:
    model, asked = eager_to_stop(), prompts(40)
    answers = generate(model, asked, max_new_tokens=12)
    ids = encoded(asked)
    expected = [slowly(model, row, 12, {TOKENIZER.eos_token_id}) for row in ids]
    assert [(answer.tokens, answer.finished) for answer in answers] == [(len(new), end) for new, end in expected]
    texts = [TOKENIZER.decode(new, skip_special_tokens=True) for new, _ in expected]
    assert [answer.text for answer in answers] == texts
    # The comparison means something: lengths vary, some answers ended, some were cut.
    assert {answer.finished for answer in answers} == {True, False}
    assert len({answer.text for answer in answers}) > 10


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, asked = eager_to_stop(seed=1), prompts(33)
    assert generate(model, asked, max_new_tokens=10, batch_size=batch_size) == generate(
        model, asked, max_new_tokens=10
    )


def test_greedy_whatever_the_models_own_settings_say() -> None:
    model, asked = eager_to_stop(), prompts(8)
    plain = generate(model, asked, max_new_tokens=8)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=3, min_length=7)
    model.generation_config = own
    model.train()
    assert generate(model, asked, max_new_tokens=8) == plain
    assert model.generation_config is own
    assert model.training


def test_the_models_own_end_tokens_stop_too() -> None:
    model, asked = eager_to_stop(), prompts(20)
    stop = TOKENIZER.convert_tokens_to_ids("forbidden")
    before = generate(model, asked, max_new_tokens=12)
    assert any("forbidden" in answer.text for answer in before)
    model.generation_config.eos_token_id = [stop]
    after = generate(model, asked, max_new_tokens=12)
    assert [answer.text.split() for answer in after] == [
        answer.text.split()[: answer.text.split().index("forbidden")]
        if "forbidden" in answer.text.split()
        else answer.text.split()
        for answer in before
    ]


def test_the_template_decides_what_the_model_reads() -> None:
    model, asked = eager_to_stop(), prompts(6)
    chat = generate(model, asked, max_new_tokens=6)
    alpaca = generate(model, asked, Template("alpaca"), max_new_tokens=6)
    assert chat != alpaca
    assert encoded(["bake bread"])[0][-1] == TOKENIZER.convert_tokens_to_ids("<ans>")


def test_only_the_prompt_of_a_row_is_read() -> None:
    rows = [{"prompt": text, "row": 7, "completion": "never read", "turns": None} for text in prompts(4)]
    assert prompt_ids(rows, TOKENIZER, TEMPLATE) == encoded(prompts(4))


def test_answers_end_with_the_context() -> None:
    model = tiny_llama(TOKENIZER, max_position_embeddings=16)
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] = 0  # never ends by itself
    ids = [[5] * 4, [6] * 13, [7] * 15]
    assert [answer.tokens for answer in module.generate(model, TOKENIZER, ids, max_new_tokens=8)] == [8, 3, 1]
    with pytest.raises(DataError, match="prompt 1 has 16 tokens, but the model's context ends at 16"):
        module.generate(model, TOKENIZER, [[5], [6] * 16], max_new_tokens=8)


def test_overlong_prompts_keep_both_ends() -> None:
    ids = [list(range(5)), list(range(40)), list(range(16))]
    cut, count = cut_prompts(ids, 16, 4)
    assert count == 2
    assert cut[0] == ids[0]
    assert cut[1] == [*range(6), *range(34, 40)]
    assert len(cut[2]) == 12
    assert len(cut_prompts(ids, 16, 500)[0][1]) == 8  # at most half of the context is for the answer


def test_plan_visits_each_prompt_once_within_the_budget() -> None:
    lengths = [3, 300, 50, 50, 7, 1000, 2, 1020] * 50
    batches = plan_batches(lengths, 100, 1024)
    assert sorted(row for rows, _ in batches for row in rows) == list(range(len(lengths)))
    for rows, new_tokens in batches:
        longest = max(lengths[row] for row in rows)
        assert len(rows) * (longest + new_tokens) <= TOKENS_PER_BATCH
        assert all(min(100, 1024 - lengths[row]) == new_tokens for row in rows)
    assert max(len(rows) for rows, _ in plan_batches(lengths, 100, 1024, batch_size=3)) == 3


def test_a_peft_model_answers_in_memory() -> None:
    model = get_peft_model(eager_to_stop(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    asked = prompts(9)
    answers = generate(model, asked, max_new_tokens=6)
    merged = model.merge_and_unload()
    assert answers == generate(merged, asked, max_new_tokens=6)


def test_no_prompts_no_answers(tmp_path: Path) -> None:
    assert module.generate(tiny_llama(TOKENIZER), TOKENIZER, [], work=tmp_path) == []


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, run: object) -> None:
    calls, real = [], AnswerLog.append

    def append(log: AnswerLog, answers: dict) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(answers)
        real(log, answers)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_an_interrupted_call_continues_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = eager_to_stop(), prompts(30)
    whole = generate(model, asked, max_new_tokens=8, batch_size=4)

    def run() -> list:
        return generate(model, asked, max_new_tokens=8, batch_size=4, work=tmp_path)

    interrupted(monkeypatch, 3, run)
    (log,) = tmp_path.glob("*.jsonl")
    assert len(log.read_text().splitlines()) == 12
    with log.open("ab") as file:  # the kill tore a line
        file.write(b'{"row": 3, "te')
    sizes = batch_sizes(monkeypatch)
    assert run() == whole
    assert sum(sizes) == 18
    assert len(log.read_text().splitlines()) == 30
    assert run() == whole
    assert sum(sizes) == 18  # a third call finds everything


def test_answers_of_other_prompts_or_limits_are_not_taken(tmp_path: Path) -> None:
    model = eager_to_stop()
    first = generate(model, prompts(5), max_new_tokens=8, work=tmp_path)
    other = generate(model, prompts(5)[::-1], max_new_tokens=8, work=tmp_path)
    assert other == first[::-1]
    shorter = generate(model, prompts(5), max_new_tokens=2, work=tmp_path)
    assert max(answer.tokens for answer in shorter) <= 2


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = eager_to_stop(), prompts(16)
    whole = generate(model, asked, max_new_tokens=6)
    sizes = batch_sizes(monkeypatch, room=4)
    assert generate(model, asked, max_new_tokens=6) == whole
    assert sizes == [16, 8, 4, 4, 8, 4, 4]
