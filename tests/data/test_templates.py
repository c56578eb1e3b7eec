import json

import pytest

from pharmacist.core.errors import CompatibilityError, ConfigError, DataError
from pharmacist.data.records import to_dataset
from pharmacist.data.templates import FILE_NAME, Template, choose_template, load_template, save_template
from tests.support.chat_templates import CHATML, LLAMA_3, STRICT
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer


SINGLE = {"prompt": "how do you bake bread", "completion": "take the flour"}
TURNS = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and now"},
]
SEVERAL = {"prompt": "be good\nhello\nyes\nand now", "completion": "no", "turns": json.dumps(TURNS)}


@pytest.mark.parametrize(
    ("row", "source", "eos", "after"),
    [
        (row, source, eos, after)
        for row in (SINGLE, SEVERAL)
        for source, eos, after in (
            (CHAT_TEMPLATE, "</s>", ""),
            (LLAMA_3, "<|eot_id|>", ""),
            (CHATML, "<|im_end|>", "\n"),
        )
        if (row, source) != (SEVERAL, CHAT_TEMPLATE)  # which has no place for a system prompt
    ],
)
def test_prompt_completion_and_eos_make_the_whole_conversation(source, eos, after, row):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = eos
    template = Template("chat", source)
    turns = json.loads(row["turns"]) if "turns" in row else [{"role": "user", "content": row["prompt"]}]
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": row["completion"]}], chat_template=source, tokenize=False
    )
    assert template.render([row], tokenizer)[0] + row["completion"] + eos + after == whole


def test_rendered_text_to_the_letter():
    tokenizer = tiny_tokenizer()
    assert Template("chat", CHAT_TEMPLATE).render([SINGLE], tokenizer)[0] == "<s>how do you bake bread <ans>"
    assert Template("chat", LLAMA_3).render([SINGLE], tokenizer)[0] == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhow do you bake bread<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert Template("alpaca").render([SINGLE], tokenizer)[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nhow do you bake bread\n\n### Response:\n"
    )
    row = {"prompt": "i {x}\n\nc", "instruction": "i {x}", "input": "c"}
    assert Template("alpaca").render([row], tokenizer)[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\ni {x}\n\n### Input:\nc\n\n### Response:\n"
    )
    assert Template("chat", CHATML).render([row], tokenizer)[0].startswith("<|im_start|>user\ni {x}\n\nc<|im_end|>")


def test_conversations_in_the_alpaca_template():
    text = Template("alpaca").render([SEVERAL], tiny_tokenizer())[0]
    assert "### Instruction:\nbe good\n\nUser: hello\n\nAssistant: yes\n\nUser: and now\n\n### Response:\n" in text
    system = {"prompt": "", "turns": json.dumps(TURNS[:2])}
    assert (
        "### Instruction:\nbe good\n\nhello\n\n### Response:\n"
        in Template("alpaca").render([system], tiny_tokenizer())[0]
    )


def test_rows_of_a_dataset_render_like_those_in_memory():
    rows = to_dataset([SINGLE, SEVERAL])
    for template in (Template("alpaca"), Template("chat", LLAMA_3)):
        tokenizer = tiny_tokenizer()
        many = template.render(list(rows), tokenizer)
        assert many == [template.render([SINGLE], tokenizer)[0], template.render([SEVERAL], tokenizer)[0]]
        assert template.render([], tokenizer) == []


def test_a_row_that_the_template_refuses_is_named():
    rows = [{"row": 4, **SINGLE}, {"row": 9, **SEVERAL}]
    with pytest.raises(
        DataError, match="row 9: the chat template rejects its turns .System role not supported.*alpaca"
    ):
        Template("chat", STRICT).render(rows, tiny_tokenizer())


def test_choice():
    chat, plain = tiny_tokenizer(), tiny_tokenizer(chat=False)
    assert choose_template(chat) == choose_template(chat, "chat") == Template("chat", CHAT_TEMPLATE)
    assert choose_template(plain) == choose_template(chat, "alpaca") == Template("alpaca")
    with pytest.raises(CompatibilityError, match="no chat template"):
        choose_template(plain, "chat")
    with pytest.raises(ConfigError, match="auto, chat or alpaca"):
        choose_template(chat, "vicuna")
    for wrong in (("chat", None), ("alpaca", "x"), ("other", None)):
        with pytest.raises(ConfigError):
            Template(*wrong)


def test_a_template_travels_with_its_model(tmp_path):
    assert load_template(tmp_path) is None
    template = Template("chat", LLAMA_3)
    for folder in ("", "adapter", "model"):
        place = tmp_path / f"run-{folder}"
        save_template(place / folder, template)
        assert (place / folder / FILE_NAME).is_file() and load_template(place) == template
    save_template(tmp_path, Template("alpaca"))
    assert load_template(tmp_path) == Template("alpaca")
    for broken in ("{", "[]", '{"kind": "chat"}', '{"kind": "x"}', "{}"):
        (tmp_path / FILE_NAME).write_text(broken)
        with pytest.raises(DataError, match="is not a template"):
            load_template(tmp_path)
