import json
import random

import datasets
import numpy as np
import pandas as pd
import pytest

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.data.formats import open_source, write_rows
from pharmacist.data.normalise import normalised_prompt, prompt_key
from pharmacist.data.records import (
    SCHEMA,
    columns_in,
    first_row,
    last_requests,
    parse_columns,
    read_records,
    to_dataset,
)
from tests.support.files import SUFFIXES, TEXTS, save


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# layout -> (rows as they lie in a file, its name); from a prompt and a completion
LAYOUTS = {
    "text": (lambda p, c: {"prompt": p, "completion": c}, "prompt-completion"),
    "lists": (lambda p, c: {"prompt": [user(p)], "completion": [assistant(c)]}, "prompt-completion"),
    "list and text": (lambda p, c: {"prompt": [user(p)], "completion": c}, "prompt-completion"),
    "messages": (lambda p, c: {"messages": [user(p), assistant(c)]}, "messages"),
    "more after": (lambda p, c: {"messages": [user(p), assistant(c), user("thanks")]}, "messages"),
    "instruction": (lambda p, c: {"instruction": p, "output": c}, "instruction-output"),
    "empty input": (lambda p, c: {"instruction": p, "input": "", "output": c}, "instruction-output"),
    "preference": (lambda p, c: {"prompt": p, "chosen": c, "rejected": "other"}, "preference"),
    "preference lists": (
        lambda p, c: {"prompt": [user(p)], "chosen": [assistant(c)], "rejected": [assistant("other")]},
        "preference",
    ),
    "preference whole": (
        lambda p, c: {"prompt": p, "chosen": [user(p), assistant(c)], "rejected": [user(p), assistant("other")]},
        "preference",
    ),
    "preference implicit": (
        lambda p, c: {"chosen": [user(p), assistant(c)], "rejected": [user(p), assistant("other")]},
        "preference",
    ),
    "response": (lambda p, c: {"prompt": p, "response": c}, "prompt-response"),
}


def pairs(n: int = 12) -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [(f"q{i} " + rng.choice(TEXTS), f"a{i} " + " ".join(rng.choices(TEXTS, k=3))) for i in range(n)]


def store(path, rows: list[dict]):
    if ".csv" in path.name:
        rows = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    return save(path, [dict(row, extra=f"x{i}") for i, row in enumerate(rows)])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_format(tmp_path, layout, suffix):
    make, name = LAYOUTS[layout]
    source = open_source(store(tmp_path / f"pool.{suffix}", [make(*pair) for pair in pairs()]))
    records = read_records(source, work_dir=tmp_path / "work")
    assert records.layout == name and not records.refused and len(records) == 12
    assert records.dataset.data.schema.equals(SCHEMA)
    assert list(zip(records.dataset["prompt"], records.dataset["completion"], strict=True)) == pairs()
    assert records.row_numbers.tolist() == list(range(12))
    assert set(records.dataset["turns"]) == set(records.dataset["input"]) == {None}
    if name == "preference":
        rejected = read_records(source, work_dir=tmp_path / "rejected", side="rejected")
        assert list(zip(rejected.dataset["prompt"], rejected.dataset["completion"], strict=True)) == [
            (prompt, "other") for prompt, _ in pairs()
        ]
    # Written back and read again: the same rows.
    write_rows(source, [2, 3, 11], tmp_path / f"core.{suffix}")
    again = read_records(open_source(tmp_path / f"core.{suffix}"), work_dir=tmp_path / "again")
    assert again.dataset["prompt"][:] == [pairs()[i][0] for i in (2, 3, 11)]
    assert [row["extra"] for _, row in again.source.rows()] == ["x2", "x3", "x11"]


def read(tmp_path, rows, **options):
    return read_records(open_source(rows), work_dir=tmp_path / "work", **options)


def test_conversations_keep_their_turns(tmp_path):
    turns = [{"role": "system", "content": "be kind"}, user("a"), assistant("b"), user("c é")]
    (row,) = read(tmp_path, [{"messages": [*turns, assistant("d")]}]).dataset
    assert row["prompt"] == "be kind\na\nb\nc é" and row["completion"] == "d"
    assert json.loads(row["turns"]) == turns
    (row,) = read(tmp_path, [{"prompt": turns[:2], "completion": [assistant("x"), user("y"), assistant("z")]}]).dataset
    assert row["completion"] == "z"
    assert json.loads(row["turns"]) == [*turns[:2], assistant("x"), user("y")]
    (row,) = read(tmp_path, [{"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]).dataset
    assert (row["prompt"], row["completion"], row["turns"]) == ("a", "b", None)


def test_last_requests_stand_alone(tmp_path):
    turns = [{"role": "system", "content": "be kind"}, user("a"), assistant("b"), user("c é")]
    prompts = [[user("p")], turns, turns[:2], [*turns[:3], user(" ")]]
    whole = read(tmp_path, [{"messages": [*prompt, assistant("d")]} for prompt in prompts]).dataset
    found = last_requests(whole)
    assert found["prompt"][:3] == ["p", "c é", "a"] and found["turns"][:3] == [None] * 3
    assert found[3] == whole[3]  # an empty request says nothing without what came before it
    assert found.remove_columns(["prompt", "turns"])[:] == whole.remove_columns(["prompt", "turns"])[:]
    single = whole.select([0])
    assert last_requests(single) is single


def test_alpaca_inputs(tmp_path):
    rows = [{"instruction": "i", "input": "x", "output": "o"}, {"instruction": "j", "input": None, "output": "p"}]
    first, second = read(tmp_path, rows).dataset
    assert (first["prompt"], first["instruction"], first["input"]) == ("i\n\nx", "i", "x")
    assert (second["prompt"], second["instruction"], second["input"]) == ("j", None, None)


DIALOGUE = "User: Hi\n\nAssistant: Hello\n\nUser: Bye"
LOOKS_LIKE_MESSAGES = [
    DIALOGUE,
    json.dumps([user("a"), assistant("b")]),
    '[{"role": "user", "content": "a"}',
    "[1, 2]",
]


@pytest.mark.parametrize("text", LOOKS_LIKE_MESSAGES)
def test_text_that_looks_like_messages_stays_text(tmp_path, text):
    for prompt, answer in (("instruction", "output"), ("prompt", "completion"), ("prompt", "response")):
        (row,) = read(tmp_path, [{prompt: "p", answer: text}]).dataset
        assert (row["prompt"], row["completion"], row["turns"]) == ("p", text, None)
    (row,) = read(tmp_path, [{"instruction": text, "input": "x", "output": "o"}]).dataset
    assert (row["instruction"], row["input"], row["completion"]) == (text, "x", "o")


def test_an_answer_in_messages_begins_with_the_assistant(tmp_path):
    for text in (json.dumps([assistant("c"), user("d")]), "Assistant: c\n\nHuman: d", "{'from': 'gpt', 'value': 'c'}"):
        (row,) = read(tmp_path, [{"prompt": "p", "completion": text}]).dataset
        assert (row["prompt"], row["completion"]) == ("p", "c")


def test_lists_in_alpaca_columns_are_bad_rows(tmp_path):
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": [assistant("o")]}]
    assert read(tmp_path, rows, on_bad_row="skip").refused[0].reason == "'output' is a list, not text"


def test_the_first_usable_row_decides(tmp_path):
    rows = [{"prompt": "", "completion": "c"}, {"instruction": "i", "output": "o"}]
    records = read(tmp_path, rows, on_bad_row="skip")
    assert (records.layout, [row.number for row in records.refused]) == ("instruction-output", [0])
    with pytest.raises(DataError, match="1 row of 2 cannot be used: row 0 has an empty 'prompt'"):
        read(tmp_path, rows)


def test_the_first_layout_that_fits_decides(tmp_path):
    both = {"prompt": "p", "completion": "c", "response": "r", "messages": [user("u"), assistant("m")]}
    assert read(tmp_path, [both]).dataset["completion"][:] == ["c"]
    assert read(tmp_path, [{**both, "completion": None}]).layout == "messages"
    preference = {"prompt": "p", "chosen": "c", "rejected": "r", "messages": both["messages"]}
    assert read(tmp_path, [preference], side="rejected").dataset["completion"][:] == ["r"]


def test_columns_can_be_mapped(tmp_path):
    rows = [{"question": "q", "answer": "a", "prompt": "wrong", "completion": "wrong"}]
    records = read(tmp_path, rows, columns={"prompt": "question", "completion": "answer"})
    assert records.dataset["prompt"][:] == ["q"] and records.dataset["completion"][:] == ["a"]
    records = read(tmp_path, [{"conversations": [user("u"), assistant("v")]}], columns={"messages": "conversations"})
    assert records.dataset["completion"][:] == ["v"]
    records = read(tmp_path, [{"prompt": "p", "answer": "a"}], columns={"response": "answer"})
    assert records.layout == "prompt-response"
    rows = [{"task": "t", "context": "c", "output": "o"}]
    records = read(tmp_path, rows, columns={"instruction": "task", "input": "context"})
    assert records.dataset["prompt"][:] == ["t\n\nc"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "json"])
def test_mapping_errors(tmp_path, suffix):
    source = open_source(save(tmp_path / f"pool.{suffix}", [{"prompt": "p", "completion": "c"}]))
    with pytest.raises(DataError, match="has no column 'answer'.*prompt, completion"):
        read_records(source, work_dir=tmp_path, columns={"completion": "answer"})
    with pytest.raises(ConfigError, match="no row format has a column 'promt'; known are prompt"):
        read_records(source, work_dir=tmp_path, columns={"promt": "prompt"})
    with pytest.raises(ConfigError, match="prompt, output belong to no row format together"):
        read_records(source, work_dir=tmp_path, columns={"prompt": "prompt", "output": "completion"})
    with pytest.raises(ConfigError, match=r"completion belong to no row format together; known are prompt, messages"):
        read_records(source, work_dir=tmp_path, columns={"completion": "completion"}, prompts_only=True)


def test_columns_of_a_source_are_those_of_its_first_readable_row(tmp_path):
    (tmp_path / "pool.jsonl").write_text('{\n{"question": "q", "answer": "a"}\n{"question": "q", "sys": "s"}\n')
    columns = {"prompt": "question", "completion": "answer", "system": "sys"}
    for missing in ({}, {"response": "sys"}, {"history": "turns"}):
        assert columns_in(open_source(tmp_path / "pool.jsonl"), columns | missing) == columns
    frame = datasets.Dataset.from_list([{"question": "q"}])
    assert columns_in(open_source(frame), columns) == {"prompt": "question"}
    assert first_row(open_source(tmp_path / "pool.jsonl")) == {"question": "q", "answer": "a"}
    assert first_row(open_source([])) == {}


def test_columns_as_text():
    assert parse_columns("prompt = question,completion=answer") == {"prompt": "question", "completion": "answer"}
    for text in ("", "prompt", "prompt=", "a=b=c", "prompt=q,"):
        with pytest.raises(ConfigError, match="write it as prompt=question,completion=answer"):
            parse_columns(text)
    for text in ("prompt=q,prompt=r", "prompt=q,completion=q"):
        with pytest.raises(ConfigError, match="names a column twice"):
            parse_columns(text)


# --- rows that cannot be used -------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "completion": "c"}
BAD = [
    ({"prompt": "p"}, "has no 'completion'"),
    ({"prompt": "p", "completion": None}, "has an empty 'completion'"),
    ({"prompt": "p", "completion": ""}, "has an empty 'completion'"),
    ({"prompt": "p", "completion": " \n\t"}, "has an empty 'completion'"),
    ({"prompt": "", "completion": "c"}, "has an empty 'prompt'"),
    ({"completion": "c"}, "has no 'prompt'"),
    ({"prompt": "p", "completion": 3}, "'completion' is a number, not text"),
    ({"prompt": "p", "completion": True}, "'completion' is true or false, not text"),
    ({"prompt": "p", "completion": float("nan")}, "'completion' is NaN, not text"),
    ({"prompt": float("nan"), "completion": "c"}, "'prompt' is NaN, not text"),
    ({"prompt": {"a": 1}, "completion": "c"}, "'prompt' is an object, not text"),
    ({"prompt": b"p", "completion": "c"}, "'prompt' is bytes, not text"),
    ({"prompt": "p", "completion": "x\ud800y"}, "holds the lone surrogate \\ud800, which is not a character"),
    ({"prompt": "x\udfffy", "completion": "c"}, "holds the lone surrogate \\udfff, which is not a character"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_are_named_or_skipped(tmp_path, row, reason):
    rows = [GOOD] * 3 + [row] + [GOOD]
    with pytest.raises(DataError) as error:
        read(tmp_path, rows)
    text = str(error.value)
    assert f"1 row of 5 cannot be used: row 3 {reason}; " in text and "--on-bad-row skip" in text and "\n" not in text
    assert not (tmp_path / "work" / "rows.arrow").exists()
    records = read(tmp_path, rows, on_bad_row="skip")
    assert [(r.number, r.line, r.reason) for r in records.refused] == [(3, None, reason)]
    assert records.row_numbers.tolist() == [0, 1, 2, 4]
    # The same where the bad row comes first, and so before the layout is known.
    records = read(tmp_path, [row, GOOD, GOOD], on_bad_row="skip")
    assert [r.number for r in records.refused] == [0] and records.row_numbers.tolist() == [1, 2]


BAD_MESSAGES = [
    ([], "has no assistant turn"),
    ([user("a")], "has no assistant turn"),
    ([assistant("a")], "has no prompt before the answer"),
    ([{"role": "system", "content": "s"}, assistant("a")], "has no prompt before the answer"),
    ([user(" "), assistant("a")], "has no prompt before the answer"),
    ([user("a"), assistant(" ")], "has an empty 'messages'"),
    ([user("a"), {"role": "assistant"}], "without text in 'role' and 'content'"),
    ([user("a"), {"role": "assistant", "content": [{"type": "text"}]}], "without text in 'role' and 'content'"),
    ([user("a"), None], "holds null where a message is expected"),
    ([user("a"), "b"], "holds a text where a message is expected"),
    ([user("a\ud800"), user("b"), assistant("b")], "lone surrogate"),
    ("hello", "'messages' is text, not a list of messages"),
    (5, "'messages' is a number, not text"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_bad_messages(tmp_path, messages, reason):
    good = {"messages": [user("a"), assistant("b")]}
    records = read(tmp_path, [{"messages": messages}, good, {"messages": messages}], on_bad_row="skip")
    assert [r.number for r in records.refused] == [0, 2] and reason in records.refused[0].reason


def test_messages_as_json_text(tmp_path):
    good = json.dumps([user("a"), assistant("b")])
    records = read(tmp_path, [{"messages": good}, {"messages": ""}, {"messages": "{}"}], on_bad_row="skip")
    assert records.dataset["completion"][:] == ["b"]
    assert [r.reason for r in records.refused] == [
        "has an empty 'messages'",
        "'messages' is text, not a list of messages",
    ]


def test_lines_and_rows_are_named_by_both_numbers(tmp_path):
    path = tmp_path / "pool.jsonl"
    lines = ['{"prompt": "p", "completion": "c"}', "", '{"prompt": "p"}', "{", '{"prompt": "p", "completion": ""}']
    path.write_text("\n".join(lines + ['{"prompt": "p"}']))
    with pytest.raises(DataError) as error:
        read_records(open_source(path, name="--pool"), work_dir=tmp_path / "work")
    assert str(error.value) == (
        f"--pool {path}: 4 rows of 5 cannot be used: line 3 (row 1), line 6 (row 4) has no 'completion'; line 4 "
        "(row 2) is not valid JSON (Expecting property name enclosed in double quotes at column 2); line 5 (row 3) "
        "has an empty 'completion'; fix or delete them, or leave them out with --on-bad-row skip"
    )


def test_the_first_ten_bad_rows_are_named_and_all_are_counted(tmp_path):
    rows = [GOOD] + [{"prompt": "p", "completion": ""}] * 25
    with pytest.raises(DataError) as error:
        read(tmp_path, rows)
    text = str(error.value)
    assert "25 rows of 26" in text and "row 10 has" in text and "row 11" not in text and "and 15 more" in text
    assert len(read(tmp_path, rows, on_bad_row="skip").refused) == 25


def test_mixed_formats_are_an_error_even_when_skipping(tmp_path):
    path = tmp_path / "pool.jsonl"
    for other, what in (
        (
            {"instruction": "i", "output": "o"},
            "has the columns instruction, output where rows before have prompt, completion",
        ),
        ({"messages": [user("a"), assistant("b")]}, "has the columns messages where"),
        ({"prompt": "p", "response": "r"}, "has the columns prompt, response where"),
        ({"prompt": [user("a")], "completion": "c"}, "has a list of messages in 'prompt' where rows before have text"),
    ):
        path.write_text("\n".join(json.dumps(row) for row in [GOOD, GOOD, other, {"a": 1}]))
        for policy in ("fail", "skip"):
            with pytest.raises(DataError) as error:
                read_records(open_source(path), work_dir=tmp_path / "work", on_bad_row=policy)
            assert "pool.jsonl: mixed row formats: line 3 (row 2) " + what in str(error.value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_pools(tmp_path, suffix):
    path = tmp_path / f"pool.{suffix}"
    write_rows(open_source(save(tmp_path / f"one.{suffix}", [GOOD])), [], path)
    with pytest.raises(DataError, match=f"pool.{suffix}: contains no rows; give a file with at least one row"):
        read_records(open_source(path), work_dir=tmp_path / "work")


def test_pools_without_a_usable_row(tmp_path):
    with pytest.raises(DataError, match="none of the 2 rows can be used: row 0, row 1 has an empty 'completion'"):
        read(tmp_path, [{"prompt": "p", "completion": ""}] * 2, on_bad_row="skip")
    with pytest.raises(DataError, match="row 0 fits no row format .its columns: a, b.; known row formats are prompt"):
        read(tmp_path, [{"a": 1, "b": 2}] * 2000, on_bad_row="skip")
    with pytest.raises(DataError, match="row 0 has no completion .its columns: prompt, answer"):
        read(tmp_path, [{"prompt": "p", "answer": "x"}])
    with pytest.raises(DataError, match=r"row 0 fits no row format .its columns: 0. but has messages in '0'"):
        read(tmp_path, [{0: [user("a"), assistant("b")]}])  # as a frame of pandas has it whose column has no name
    (tmp_path / "pool.csv").write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match=r"pool.csv: line 2 \(row 0\) fits no row format.*--columns"):
        read_records(open_source(tmp_path / "pool.csv"), work_dir=tmp_path)


def test_text_of_a_bad_row_is_never_shown(tmp_path):
    for row in ({"prompt": "SECRET", "completion": 5}, {"prompt": "SECRET"}, {"messages": [user("SECRET")]}):
        with pytest.raises(DataError) as error:
            read(tmp_path, [row])
        assert "SECRET" not in str(error.value)


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", None])
def test_unknown_columns_are_named(tmp_path, suffix):
    rows = [{"question": "q", "answer": "a"}] * 2
    source = open_source(save(tmp_path / f"pool.{suffix}", rows) if suffix else datasets.Dataset.from_list(rows))
    with pytest.raises(DataError, match=r"row 0\)? fits no row format \(its columns: question, answer\); known row"):
        read_records(source, work_dir=tmp_path)
    records = read_records(source, work_dir=tmp_path, columns={"prompt": "question", "completion": "answer"})
    assert records.dataset["prompt"][:] == ["q", "q"]


def test_many_batches_keep_their_order(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10000)]
    rows[5000] = {"prompt": "long", "completion": "x" * 9_000_000}
    records = read(tmp_path, rows)
    assert len(records.dataset.data.column("row").chunks) > 2
    assert records.row_numbers.tolist() == list(range(10000))
    assert records.dataset[9999]["completion"] == "c9999" and len(records.dataset[5000]["completion"]) == 9_000_000


def test_without(tmp_path):
    records = read(tmp_path, [{"prompt": f"p{i}", "completion": "c"} for i in range(6)])
    fewer = records.without(np.array([0, 3, 5]))
    assert fewer.row_numbers.tolist() == [1, 2, 4] and fewer.dataset["prompt"][:] == ["p1", "p2", "p4"]
    assert len(records) == 6 and len(records.without([])) == 6


def test_normalised_prompts():
    same = ["How do I bake bread?", "how do i  bake\nbread", " HOW DO I BAKE BREAD!? ", "How do I bake bread\u2026"]
    assert len({normalised_prompt(text) for text in same}) == 1
    assert len({prompt_key(text) for text in same}) == 1
    different = ["2+2", "2-2", "22", "?", "!", "", "ﬁne"]
    assert len({normalised_prompt(text) for text in different}) == len(different)
    assert normalised_prompt("ﬁne") == normalised_prompt("fine")
    assert 0 <= prompt_key("x") < 2**64


def test_a_prompt_is_the_same_under_another_system_prompt(tmp_path):
    system = {"role": "system", "content": "You are a baker."}
    rows = [
        [user("How do I bake?")],
        [system, user("how do I bake")],
        [system, user("Hi"), assistant("Hi"), user("b")],
    ]
    records = read(tmp_path, [{"messages": [*turns, assistant("yes")]} for turns in rows])
    keys = records.dataset["prompt_key"][:]
    assert keys == [prompt_key("how do i bake")] * 2 + [prompt_key("Hi\nHi\nb")]
    assert to_dataset(list(records.dataset))["prompt_key"][:] == keys
    assert records.dataset["prompt"][1] == "You are a baker.\nhow do I bake", "judges and people read all of it"


def test_rows_made_in_memory():
    made = to_dataset([{"prompt": "P?", "completion": "c", "row": 7, "other": 1}, {"prompt": "q", "completion": "d"}])
    assert isinstance(made, datasets.Dataset) and made.column_names == SCHEMA.names
    assert made["row"][:] == [7, 1] and made["prompt_key"][0] == prompt_key("p")
    # A key that came with a row whose prompt was changed is not believed.
    assert to_dataset([{**made[0], "prompt": "new"}])["prompt_key"][0] == prompt_key("new")


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "p"}, "prompt"),
        ({"prompt": "p", "completion": ""}, "prompt"),
        ({"prompt": "p", "response": 5}, "prompt"),
        ({"prompt": [user("p")], "chosen": "c", "rejected": "r"}, "prompt"),
        ({"messages": [user("p")]}, "messages"),
        ({"messages": [user("p"), assistant("a")]}, "messages"),
        ({"instruction": "p"}, "instruction"),
        ({"instruction": "p", "output": "o"}, "instruction"),
    ],
)
def test_prompts_alone(tmp_path, row, layout):
    records = read(tmp_path, [row], prompts_only=True)
    assert records.layout == layout
    assert records.dataset[0] == {
        "row": 0,
        "prompt": "p",
        "completion": "",
        "turns": None,
        "instruction": None,
        "input": None,
        "prompt_key": prompt_key("p"),
    }


def test_prompts_alone_keep_turns_and_inputs(tmp_path):
    (row,) = read(tmp_path, [{"instruction": "i", "input": "x"}], prompts_only=True).dataset
    assert (row["prompt"], row["instruction"], row["input"], row["completion"]) == ("i\n\nx", "i", "x", "")
    turns = [user("a"), assistant("b"), user("c")]
    for messages in (turns, [*turns, assistant("d")]):
        (row,) = read(tmp_path, [{"messages": messages}], prompts_only=True).dataset
        assert json.loads(row["turns"]) == turns
    (row,) = read(tmp_path, [{"question": "q"}], prompts_only=True, columns={"prompt": "question"}).dataset
    assert row["prompt"] == "q"
    records = read(
        tmp_path, [{"prompt": "p"}, {"prompt": ""}, {"prompt": 1}, {}], prompts_only=True, on_bad_row="skip"
    )
    assert [r.number for r in records.refused] == [1, 2, 3]
    with pytest.raises(DataError, match="known row formats are prompt, messages or instruction"):
        read(tmp_path, [{"question": "q"}], prompts_only=True)


def test_nan_is_a_missing_cell_where_rows_may_lack_it(tmp_path):
    frame = pd.DataFrame(
        [{"instruction": "a", "output": "b"}] * 2 + [{"instruction": "c", "input": "d", "output": "e"}]
    )
    rows = frame.assign(system=[float("nan")] * 2 + ["s"], history=float("nan"), label=float("nan")).to_dict("records")
    records = read(tmp_path, rows)
    assert records.dataset["prompt"][:] == ["a", "a", "s\nc\n\nd"] and not records.warnings
