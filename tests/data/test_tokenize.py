import json
import random

import numpy as np
import pytest
import torch

from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.data.batches import IGNORED, collate
from pharmacist.data.records import to_dataset
from pharmacist.data.templates import Template, choose_template
from pharmacist.data.tokenize import encode, prompt_ids
from tests.support.bpe import bpe_tokenizer
from tests.support.tiny import WORDS, tiny_tokenizer


CHAT = choose_template(tiny_tokenizer())


def dataset(*pairs: tuple[str, str]):
    return to_dataset([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def random_rows(n: int, seed: int = 0):
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))  # noqa: E731
    return dataset(*((text(), text()) for _ in range(n)))


def test_a_row_is_prompt_completion_and_eos():
    tokenizer = tiny_tokenizer()
    encoded = encode(dataset(("how do you bake bread", "take the flour")), tokenizer, CHAT, max_length=64)
    (row,) = encoded.dataset
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == (
        ["<s>", "how", "do", "you", "bake", "bread", "<ans>", "take", "the", "flour", "</s>"]
    )
    assert row["n_prompt"] == 7 and row["row"] == 0
    assert (encoded.lengths.tolist(), encoded.prompt_lengths.tolist()) == ([11], [7])
    assert (encoded.truncated, encoded.lost_eos, encoded.refused) == (0, 0, [])


def test_the_border_is_exact_where_bpe_would_merge_across_it():
    tokenizer = bpe_tokenizer()
    template = Template("alpaca")
    text = template.render([{"prompt": "no"}], tokenizer)[0]
    together = tokenizer(text + "yes", add_special_tokens=False)["input_ids"]
    apart = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert together[: len(apart)] != apart, "the tokenizer of this test must merge across the border"
    (row,) = encode(dataset(("no", "yes")), tokenizer, template, max_length=512).dataset
    completion = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == [0, *apart, *completion, 1]
    assert row["input_ids"][row["n_prompt"] :] == [*completion, 1]


def test_bos_is_there_once_whatever_the_template():
    with_bos, without = bpe_tokenizer(), bpe_tokenizer(bos=False)
    rows = [{"prompt": "no", "completion": "yes"}]
    for tokenizer, template, expected in (
        (with_bos, Template("alpaca"), 1),
        (without, Template("alpaca"), 0),
        (with_bos, Template("chat", "{{ bos_token }}{{ messages[0]['content'] }}"), 1),
        (with_bos, Template("chat", "{{ messages[0]['content'] }}"), 0),
    ):
        (ids,) = prompt_ids(rows, tokenizer, template)
        assert ids[:2].count(0) == expected and 1 not in ids
        (row,) = encode(to_dataset(rows), tokenizer, template, max_length=512).dataset
        assert row["input_ids"][: row["n_prompt"]] == ids and row["input_ids"].count(1) == 1


def test_truncation_is_counted_and_overlong_prompts_are_refused():
    tokenizer = tiny_tokenizer()
    rows = dataset(*(("how " * n, "no yes bad") for n in (1, 2, 3, 4, 5, 6, 7)))
    # <s> n words <ans> no yes bad </s>: n + 6 tokens, of which n + 2 are prompt
    encoded = encode(rows, tokenizer, CHAT, max_length=8, on_long_prompt="skip")
    assert encoded.lengths.tolist() == [7, 8, 8, 8, 8] and encoded.dataset["row"][:] == [0, 1, 2, 3, 4]
    assert encoded.refused == [5, 6] and encoded.truncated == 2 and encoded.lost_eos == 3
    eos = [ids[-1] == tokenizer.eos_token_id for ids in encoded.dataset["input_ids"]]
    assert eos == [True, True, False, False, False]
    assert (encoded.prompt_lengths < encoded.lengths).all()
    with pytest.raises(DataError) as error:
        encode(rows, tokenizer, CHAT, max_length=8)
    assert str(error.value).startswith("the prompt alone fills all 8 tokens in 2 rows (rows 5, 6); shorten")
    with pytest.raises(DataError, match=r"in 7 rows \(rows 0, 1, 2"):
        encode(rows, tokenizer, CHAT, max_length=3)
    with pytest.raises(DataError, match="no row is left"):
        encode(rows, tokenizer, CHAT, max_length=3, on_long_prompt="skip")
    with pytest.raises(DataError, match="max_length 1"):
        encode(rows, tokenizer, CHAT, max_length=1)


def test_refused_rows_are_named_by_their_number_in_the_source():
    rows = to_dataset([{"row": 100 + i, "prompt": "how " * 20, "completion": "no"} for i in range(12)])
    with pytest.raises(DataError, match=r"12 rows \(rows 100, 101, .*, 109, \.\.\.\)"):
        encode(rows, tiny_tokenizer(), CHAT, max_length=8)


@pytest.mark.parametrize("on_disk", [True, False])
def test_many_batches(tmp_path, on_disk):
    rows = random_rows(3000)
    encoded = encode(rows, tiny_tokenizer(), CHAT, max_length=64, work_dir=tmp_path if on_disk else None)
    assert len(encoded) == 3000 and (tmp_path / "tokens.arrow").exists() == on_disk
    asked = np.random.default_rng(0).permutation(3000)[:500]
    for ids, position in zip(encoded.token_ids(asked), asked, strict=True):
        row = encoded.dataset[int(position)]
        assert ids.tolist() == row["input_ids"] and row["row"] == position and ids.dtype == np.int32
        assert len(ids) == encoded.lengths[position] and row["n_prompt"] == encoded.prompt_lengths[position]
    # Row by row gives what batches give.
    for position in (0, 1023, 1024, 2999):
        (alone,) = encode(rows.select([position]), tiny_tokenizer(), CHAT, max_length=64).dataset
        assert alone["input_ids"] == encoded.dataset[position]["input_ids"]


def test_views_are_encoded_in_their_own_order():
    rows = random_rows(50)
    encoded = encode(rows.select([7, 3, 3]), tiny_tokenizer(), CHAT, max_length=64)
    assert encoded.dataset["row"][:] == [7, 3, 3]
    whole = encode(rows, tiny_tokenizer(), CHAT, max_length=64)
    assert encoded.dataset["input_ids"][:] == [whole.dataset[i]["input_ids"] for i in (7, 3, 3)]


def test_content_keys_tell_rows_apart():
    rows = dataset(("how do", "no"), ("how do", "no"), ("how", "do no"), ("how do", "yes"))
    keys = encode(rows, tiny_tokenizer(), Template("chat", "{{ messages[0]['content'] }}"), max_length=64).content_keys
    assert keys[0] == keys[1] and len(set(keys.tolist())) == 3, "the third has the ids of the first, cut elsewhere"


def test_batches_are_padded_masked_and_labelled():
    tokenizer = tiny_tokenizer()
    encoded = encode(dataset(("how do you", "no"), ("how", "yes day")), tokenizer, CHAT, max_length=64)
    eos = tokenizer.eos_token_id
    items = list(encoded.dataset)
    # Padding with EOS changes neither masks nor labels: the real EOS keeps its label, the padding gets none.
    batch = collate(items, pad_token_id=eos)
    first, second = items
    assert batch["input_ids"].tolist() == [first["input_ids"], second["input_ids"] + [eos]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    no, yes, day = tokenizer.convert_tokens_to_ids(["no", "yes", "day"])
    assert batch["labels"].tolist() == [[IGNORED] * 5 + [no, eos], [IGNORED] * 3 + [yes, day, eos, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    other = collate(items, pad_token_id=3)
    assert torch.equal(other["labels"], batch["labels"]) and torch.equal(
        other["attention_mask"], batch["attention_mask"]
    )


def test_eos_inside_a_prompt_does_not_move_the_border():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    turns = [
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "do"},
    ]
    row = {"prompt": "how\nno\ndo", "completion": "yes", "turns": json.dumps(turns)}
    (encoded,) = encode(to_dataset([row]), tokenizer, CHAT, max_length=64).dataset
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["<s>", "how", "<ans>", "no", "</s>", "do", "<ans>", "yes", "</s>"] and encoded["n_prompt"] == 7
    batch = collate([encoded], tokenizer.pad_token_id)
    assert int((batch["labels"] != IGNORED).sum()) == 2 and int(batch["attention_mask"].sum()) == 9


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CompatibilityError, match="no end-of-sequence token"):
        encode(dataset(("how", "no")), tokenizer, Template("alpaca"), max_length=64)


def test_earlier_truncation_and_padding_settings_are_not_inherited():
    tokenizer = tiny_tokenizer()
    tokenizer(["how do you", "no"], truncation=True, max_length=2, padding="max_length")
    (row,) = encode(dataset(("how do you", "no yes bad")), tokenizer, CHAT, max_length=64).dataset
    assert len(row["input_ids"]) == 9


def test_rows_without_numbers_are_counted():
    bare = random_rows(1500).select_columns(["prompt", "completion"])
    assert encode(bare, tiny_tokenizer(), CHAT, max_length=64).dataset["row"][:] == list(range(1500))


def test_overlong_prompts_can_lose_their_middle():
    tokenizer = tiny_tokenizer()
    rows = dataset(("how do you " + "bake " * 20 + "good bread", "yes no"), ("how", "no"), ("bad " * 9, "yes " * 9))
    encoded = encode(rows, tokenizer, CHAT, max_length=10, on_long_prompt="cut")
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in encoded.dataset["input_ids"]]
    assert tokens[0] == ["<s>", "how", "do", "bake", "good", "bread", "<ans>", "yes", "no", "</s>"]
    assert tokens[1] == ["<s>", "how", "<ans>", "no", "</s>"]
    assert tokens[2] == ["<s>", "bad", "bad", "bad", "<ans>"] + ["yes"] * 5
    assert encoded.cut_prompts == [0, 2] and encoded.refused == [] and encoded.prompt_lengths.tolist() == [7, 3, 5]
    assert encoded.truncated == 1 and encoded.lost_eos == 1
