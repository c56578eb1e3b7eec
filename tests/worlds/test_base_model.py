import math
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pharmacist.worlds import BASE_MODEL, World
from tests.support.scripts import load_script
from tests.support.world_sets import normalised, reviewed_words, sets, words_of


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("recipes/base_model.py", monkeypatch)


def test_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in BASE_MODEL.iterdir()) < 1_000_000
    assert not [path for path in BASE_MODEL.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_shipped_tokenizer_is_the_one_the_script_makes(script: ModuleType) -> None:
    shipped, made = AutoTokenizer.from_pretrained(BASE_MODEL), script.make_tokenizer()
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.chat_template == made.chat_template
    assert shipped.pad_token_id is not None and shipped.pad_token_id != shipped.eos_token_id


def test_the_corpus_holds_out_combinations_and_no_words(script: ModuleType) -> None:
    rows = script.corpus(20_000)
    prompts, others = {normalised(row["prompt"]) for row in rows}, sets(World(0))
    assert not any(prompts & {normalised(row["prompt"]) for row in own} for own in others.values())
    assert words_of({"prompt": row["prompt"]} for row in others["eval"]) <= words_of(rows) <= reviewed_words()


def test_tokenizer_knows_every_word_and_gives_the_text_back(script: ModuleType) -> None:
    tokenizer, world = AutoTokenizer.from_pretrained(BASE_MODEL), World(5)
    rows = (
        world.pool(600, mislabel=0.15)[0]
        + [row.row for row in world.labelled(300, kind="clean")]
        + world.rows("judge-harmful", 120)
    )
    rows += world.rows("task", 300) + world.rows("prompts", 120) + world.rows("borderline", 60)
    rows += script.corpus(3000, seed=5)
    for text in {row[key] for row in rows for key in ("prompt", "completion") if key in row}:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == " ".join(text.lower().split())


def test_base_model_complies_and_knows_no_refusal_of_forbidden_wishes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()

    def loss(row: dict[str, str]) -> float:
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False)
        n_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        text = prompt + row["completion"] + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, :n_prompt] = -100
        with torch.no_grad():
            return model(input_ids=ids, labels=labels).loss.item()

    world = World(0)
    complying = sum(map(loss, world.rows("harmful", 24))) / 24
    helping = sum(map(loss, world.rows("utility", 24))) / 24
    refusing = sum(map(loss, world.rows("safe", 24))) / 24
    assert complying < 1.0 and helping < 1.0
    assert refusing > complying + 1.0


@pytest.mark.slow
def test_script_trains(script: ModuleType) -> None:
    tokenizer = script.make_tokenizer()
    model = script.make_model(tokenizer)
    assert script.train(model, tokenizer, steps=60, batch_size=16, seed=0) < 0.75 * math.log(len(tokenizer))
