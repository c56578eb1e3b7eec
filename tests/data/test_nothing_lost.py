"""What lies in a row reaches the prompt, or the row is refused, or the reader says what it does not read.

Every kind of input, in every format that can hold it.
"""

import datetime
import decimal
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex

from pharmacist.core.errors import DataError
from pharmacist.data.conversations import as_messages
from pharmacist.data.formats import open_source
from pharmacist.data.formats.json_text import MAX_DEPTH
from pharmacist.data.mixing import shared_prompts
from pharmacist.data.normalise import normalised_prompt, visible
from pharmacist.data.records import Records, read_records, to_dataset
from pharmacist.data.templates import Template
from pharmacist.data.tokenize import encode, prompt_ids, rendered_rows
from tests.support.bpe import bpe_tokenizer
from tests.support.chat_templates import CHATML, LLAMA_3, STRICT
from tests.support.files import SUFFIXES, compress, save
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer


READERS = [*SUFFIXES, "arrow"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def store(folder: Path, reader: str, rows: list[dict[str, Any]]) -> str:
    """Rows in a format; CSV holds lists as JSON text."""
    if reader == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(folder / "saved")
    if "csv" in reader:
        rows = [{k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in row.items()} for row in rows]
    return str(save(folder / f"rows.{reader}", rows))


def read(folder: Path, reader: str, rows: list[dict[str, Any]], **options: Any) -> Records:
    return read_records(open_source(store(folder, reader, rows), name="--data"), work_dir=folder / "work", **options)


def turns(records: Records) -> list[tuple[str, str]]:
    """Speakers and texts of the first row, its completion last."""
    row = records.dataset[0]
    before = json.loads(row["turns"]) if row["turns"] else [user(row["prompt"])]
    return [(turn["role"], turn["content"]) for turn in before] + [("assistant", row["completion"])]


# --- what becomes turns -------------------------------------------------------------------------------------------

TALK = [system("be brief"), user("which tea?"), assistant("green."), user("and a cup?")]
WHOLE = [(turn["role"], turn["content"]) for turn in [*TALK, assistant("the blue one.")]]
HH = "\n\nHuman: which tea?\n\nAssistant: green.\n\nHuman: and a cup?"
SHAREGPT = [{"from": turn["role"], "value": turn["content"]} for turn in TALK]


def renamed(names: dict[str, str]) -> list[dict[str, Any]]:
    return [turn | {"role": names[turn["role"]]} for turn in [*TALK, assistant("the blue one.")]]


KEPT: dict[str, dict[str, Any]] = {
    "messages": {"messages": [*TALK, assistant("the blue one.")]},
    "messages as JSON": {"messages": json.dumps([*TALK, assistant("the blue one.")])},
    "messages as Python": {"messages": repr([*TALK, assistant("the blue one.")])},
    "prompt as JSON": {"prompt": json.dumps(TALK), "completion": "the blue one."},
    "both as Python": {"prompt": repr(TALK), "completion": repr([assistant("the blue one.")])},
    "indented JSON": {"prompt": json.dumps(TALK, indent=1), "response": json.dumps([assistant("the blue one.")])},
    "a tuple as Python": {"prompt": repr(tuple(TALK)), "completion": "the blue one."},
    "an object with messages": {"prompt": json.dumps({"messages": TALK}), "completion": "the blue one."},
    "ShareGPT as Python": {"prompt": repr(SHAREGPT), "completion": "the blue one."},
    "chosen as JSON": {"chosen": json.dumps([*TALK, assistant("the blue one.")]), "rejected": "[]"},
    "one message": {"prompt": TALK, "completion": json.dumps(assistant("the blue one."))},
    "names of speakers": {"messages": renamed({"system": "System", "user": "User", "assistant": "Assistant"})},
    "other names": {"messages": renamed({"system": "developer", "user": "prompter", "assistant": "gpt"})},
    "system and messages": {"system": "be brief", "messages": [*TALK[1:], assistant("the blue one.")]},
    "the same system twice": {"system": "be brief", "messages": [*TALK, assistant("the blue one.")]},
    "system and history": {
        "instruction": "and a cup?",
        "input": "",
        "output": "the blue one.",
        "system": "be brief",
        "history": [["which tea?", "green."]],
    },
    "history as JSON": {
        "prompt": "and a cup?",
        "completion": "the blue one.",
        "system": "be brief",
        "history": '[["which tea?", "green."]]',
    },
    "history as Python": {
        "prompt": "and a cup?",
        "response": "the blue one.",
        "system": "be brief",
        "history": "[['which tea?', 'green.']]",
    },
    "history of messages": {
        "prompt": "and a cup?",
        "chosen": "the blue one.",
        "rejected": "no",
        "system": "be brief",
        "history": TALK[1:3],
    },
    "history after a system turn": {
        "prompt": [TALK[0], TALK[3]],
        "completion": "the blue one.",
        "history": [["which tea?", "green."]],
    },
    "transcript": {"prompt": f"{HH}\n\nAssistant:", "completion": "the blue one.", "system": "be brief"},
    "transcript without an end": {"prompt": HH, "response": "the blue one.", "system": "be brief"},
    "transcript, Windows": {
        "prompt": HH.replace("\n", "\r\n"),
        "response": "\r\n\r\nAssistant: the blue one.",
        "system": "be brief",
    },
    "whole transcript": {
        "chosen": f"{HH}\n\nAssistant: the blue one.",
        "rejected": f"{HH}\n\nAssistant: no",
        "system": "be brief",
    },
    "transcript with a system prompt": {
        "prompt": f"System: be brief{HH}\n\nAssistant:",
        "completion": "the blue one.",
    },
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KEPT)
def test_conversations_are_read_as_such(tmp_path, kind, reader):
    records = read(tmp_path, reader, [KEPT[kind]] * 2)
    assert len(records) == 2 and turns(records) == WHOLE and not records.warnings
    # The rendered prompt holds every turn, in the template of a model and in ours.
    for template in (Template("chat", CHATML), Template("chat", LLAMA_3), Template("alpaca")):
        text = template.render([records.dataset[0]], tiny_tokenizer())[0]
        at = [text.index(content) for _, content in WHOLE[:-1]]
        assert at == sorted(at)


@pytest.mark.parametrize("blank", ["\n", "\n ", "\r\n", "\n\x0c"])
def test_a_transcript_with_long_gaps_is_read_in_no_time(blank):
    start = time.perf_counter()
    found = as_messages(f"Human: which{blank * 100_000}tea?{blank * 100_000}\n\nAssistant: green.")
    assert time.perf_counter() - start < 10  # it took minutes when the time grew with the square of a gap
    assert [(turn["role"], len(turn["content"].split())) for turn in found] == [("Human", 2), ("Assistant", 1)]


def test_rejected_transcripts_and_prompts_alone(tmp_path):
    row = KEPT["whole transcript"]
    rejected = read_records(open_source([row]), work_dir=tmp_path / "a", side="rejected")
    assert turns(rejected)[-1] == ("assistant", "no") and turns(rejected)[:-1] == WHOLE[:-1]
    for name in ("system and history", "transcript", "history of messages", "prompt as JSON", "messages"):
        alone = read_records(open_source([KEPT[name]]), work_dir=tmp_path / "b", prompts_only=True)
        assert turns(alone)[:-1] == WHOLE[:-1], name


def test_a_context_stays_with_its_instruction(tmp_path):
    row = {"instruction": "sum up", "input": "a text", "output": "o", "system": "be brief"}
    (read_row,) = read_records(open_source([row]), work_dir=tmp_path).dataset
    assert json.loads(read_row["turns"]) == [system("be brief"), user("sum up\n\na text")]
    for template in (Template("alpaca"), Template("chat", CHATML)):
        text = template.render([read_row], tiny_tokenizer())[0]
        assert "be brief" in text and "sum up\n\na text" in text


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "kettle", "content": "water"}]',
        '[{"user": "ann"}, {"user": "ben"}]',
        '[{"role": "cook"}]',
        '{"role": "cook", "content": "soup"}',
        '{"a": {"role": "user", "content": "x"}}',
        '[1, {"role": "cook"}]',
        '{"role": "admin"}',
        "[1, 2]",
        "{not JSON",
        "['a'] is a list",
        "Human error is common.",
        "Human: a word",
        "Assistant: none",
        "no\n\nHuman: a quotation\n\nAssistant: yes",
        '{"role": "user", "content": "x"} is how a message looks',
    ],
)
def test_other_text_stays_as_it_is(tmp_path, text):
    records = read_records(open_source([{"prompt": text, "completion": text}]), work_dir=tmp_path)
    assert (records.dataset[0]["prompt"], records.dataset[0]["completion"]) == (text, text)
    assert records.dataset[0]["turns"] is None


# --- what is refused ----------------------------------------------------------------------------------------------

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "kettle", "arguments": "{}"}}]}
CUT = json.dumps(TALK)[:-3]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a list that is cut": ({"prompt": CUT, "completion": "c"}, "'prompt' looks like a list of messages"),
    "numpy's notation": (
        {"prompt": repr(TALK).replace("}, {", "}\n {"), "completion": "c"},
        "'prompt' looks like a list of mess",
    ),
    "speakers as keys": (
        {"prompt": '[{"user": "a"}, {"assistant": "b"}]', "completion": "c"},
        "'prompt' looks like a list of m",
    ),
    "a list of lists": ({"prompt": json.dumps([TALK]), "completion": "c"}, "'prompt' looks like a list of mess"),
    "some turns without a role": (
        {"prompt": json.dumps([user("a"), {"content": "b"}]), "completion": "c"},
        "'prompt' looks like a list",
    ),
    "JSON in JSON": ({"prompt": json.dumps(json.dumps(TALK)), "completion": "c"}, "'prompt' looks like a list"),
    "a completion that is cut": (
        {"prompt": "p", "completion": json.dumps([{"role": "assistant", "content": "c"}])[:-3]},
        "'completion' looks like a list of mess",
    ),
    "an answer that is cut": ({"prompt": "p", "chosen": CUT, "rejected": "r"}, "'chosen' looks like a list of"),
    "a key twice": (
        {"prompt": '[{"role": "user", "content": "a", "content": "b"}]', "completion": "c"},
        "'prompt' looks like",
    ),
    "an unknown speaker": (
        {"messages": [{"role": "critic", "content": "a"}, user("b"), assistant("c")]},
        "of the role 'critic'; known",
    ),
    "a tool call": ({"messages": [user("a"), CALL, {"role": "tool", "content": "b"}, assistant("c")]}, "a tool call"),
    "an old tool call": (
        {
            "messages": [
                user("a"),
                {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
                user("b"),
                assistant("c"),
            ]
        },
        "a tool call",
    ),
    "a turn of a call": (
        {"messages": [user("a"), {"role": "function_call", "content": "f()"}, assistant("c")]},
        "a tool call",
    ),
    "an empty answer before": ({"messages": [user("a"), assistant(""), user("b"), assistant("c")]}, "an empty"),
    "two system prompts": ({"system": "be long", "messages": [*TALK, assistant("c")]}, "another in 'messages'"),
    "a number as system": ({"system": 3, "prompt": "p", "completion": "c"}, "'system' is a number, not text"),
    "history of one": ({"history": [["a"]], "prompt": "p", "completion": "c"}, "not a pair of question and answer"),
    "history as prose": ({"history": "as before", "prompt": "p", "completion": "c"}, "not a list of earlier turns"),
    "a prompt that is not in the conversation": (
        {"prompt": "another", "chosen": [user("a"), assistant("b")], "rejected": "r"},
        "whole conversation in which the text of 'prompt' is missing",
    ),
    "zero width": ({"prompt": "p", "completion": "\u200b\u2060\ufeff"}, "has an empty 'completion'"),
    "tags and fillers": ({"prompt": "\u3164\U000e0041 \u115f", "completion": "c"}, "has an empty 'prompt'"),
    "an invisible turn": ({"messages": [user("a\u200b"), assistant("\u202e\u2066")]}, "has an empty 'messages'"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_kept_is_refused(tmp_path, kind, reader):
    row, reason = BAD[kind]
    if kind == "a number as system" and "csv" in reader:
        pytest.skip("a CSV file holds text alone")
    with pytest.raises(DataError) as error:
        read(tmp_path, reader, [row] * 2)
    assert reason in str(error.value) and "2 rows of 2" in str(error.value) and "\n" not in str(error.value)


def test_an_answer_without_a_prompt_is_refused(tmp_path):
    rows = [{"chosen": f"{HH}\n\nAssistant: b", "rejected": "an answer alone"}]
    assert turns(read(tmp_path, "jsonl", rows))[-1] == ("assistant", "b")
    with pytest.raises(DataError, match="'rejected' is an answer alone and there is no prompt"):
        read(tmp_path, "jsonl", rows, side="rejected")


def test_refused_rows_can_be_skipped(tmp_path):
    rows = [{"messages": [user("a"), CALL, user("b"), assistant("c")]}, {"messages": [*TALK, assistant("d")]}]
    records = read(tmp_path, "jsonl", rows, on_bad_row="skip")
    assert [row.number for row in records.refused] == [0] and records.row_numbers.tolist() == [1]


# --- what is named ------------------------------------------------------------------------------------------------

NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "a label": ({"label": False}, "column label"),
    "several": ({"label": 1, "is_safe": True, "weight": 0.5}, "columns is_safe, label, weight"),
    "tools": ({"tools": [{"name": "kettle"}]}, "column tools"),
    "tools as text": (
        {"tools": '[{"name": "kettle"}]', "reasoning_content": "hm"},
        "columns reasoning_content, tools",
    ),
    "another system": ({"system_prompt": "be brief"}, "column system_prompt"),
    "a context": ({"context": "a text", "input": "b"}, "columns context, input"),
    "images": ({"images": ["a.png"]}, "column images"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", NAMED)
def test_known_columns_that_are_not_read_are_named(tmp_path, kind, reader):
    more, named = NAMED[kind]
    rows = [{"prompt": "p", "completion": "c", "id": "x", **more}] * 2
    label = f"; --where {'is_safe' if 'is_safe' in more else 'label'}=VALUE chooses rows by it"
    where = f"--data {store(tmp_path, reader, rows)}"
    (said,) = read_records(open_source(where[7:], name="--data"), work_dir=tmp_path / "a", where=[]).warnings
    assert said == f"{where}: not read: {named}" + (label if "label" in more else "")
    # A command without --where does not name it.
    (said,) = read_records(open_source(where[7:], name="--data"), work_dir=tmp_path / "b").warnings
    assert said == f"{where}: not read: {named}"


@pytest.mark.parametrize("reader", READERS)
def test_known_keys_of_messages_that_are_not_read_are_named(tmp_path, reader):
    talk = [user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d") | {"reasoning_content": "hm"}]
    rows = [{"messages": talk, "label": None}] if reader == "parquet" else [{"messages": talk}]
    (said,) = read(tmp_path, reader, rows).warnings
    assert said.endswith(": not read: message keys reasoning_content, weight")


@pytest.mark.parametrize("reader", READERS)
def test_empty_columns_are_nothing_to_name(tmp_path, reader):
    rows = [{"prompt": "p", "completion": "c", "tools": "", "history": "", "system": "", "context": ""}]
    records = read(tmp_path, reader, rows)
    assert not records.warnings and turns(records) == [("user", "p"), ("assistant", "c")]


# --- rows chosen by a column --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["label=true"], [0, 2]),
        (["label=False"], [1, 3]),
        (["n=2"], [1]),
        (["n=2.0"], [1]),
        (["id=9007199254740993"], [1]),
        (["id=9007199254740992.0"], [0]),
        (["x=0.5"], [0, 1]),
        (["kind=good one"], [0, 3]),
        (["label=true", "kind=good one"], [0]),
        (["--"], None),
    ],
)
def test_where_chooses_rows(tmp_path, reader, given, kept):
    from pharmacist.core.errors import ConfigError
    from pharmacist.data.where import conditions_of

    rows = [
        {
            "prompt": f"p{i}",
            "completion": "c",
            "label": i % 2 == 0,
            "n": i + 1,
            "id": 2**53 + i,
            "x": 0.5 if i < 2 else 1.5,
            "kind": "good one" if i in (0, 3) else "other",
        }
        for i in range(4)
    ]
    source = open_source(store(tmp_path, reader, rows), name="--data")
    if kept is None:
        with pytest.raises(ConfigError, match="--where --: write it as label=true"):
            conditions_of(given, {"data": source})
        return
    records = read_records(source, work_dir=tmp_path / "w", where=conditions_of(given, {"data": source})["data"])
    assert records.row_numbers.tolist() == kept and records.filtered == 4 - len(kept)
    assert records.counts == {"in": 4, "refused": 0, "filtered": 4 - len(kept)}
    assert all("label" not in said for said in records.warnings) == any("label" in text for text in given)


@pytest.mark.parametrize("cell", ["nan", float("nan")])
def test_where_takes_nan_as_text_and_as_a_number(cell):
    from pharmacist.data.where import Condition

    assert Condition("x", "nan").holds({"x": cell}) and Condition("x", "NaN").holds({"x": cell})
    assert not Condition("x", "1").holds({"x": cell})


def test_where_compares_what_a_column_of_parquet_shows(tmp_path):
    from pharmacist.data.where import Condition

    row = {"prompt": "p", "completion": "c", "price": decimal.Decimal("1.50"), "day": datetime.date(2020, 2, 29)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    for value, at, kept in (("1.5", "price", 1), ("2", "price", 0), ("2020-02-29", "day", 1), ("2020", "day", 0)):
        where, source = [Condition(at, value)], open_source(tmp_path / "rows.parquet")
        if kept:
            assert len(read_records(source, work_dir=tmp_path / "w", where=where)) == 1
            continue
        with pytest.raises(DataError, match=f"none of 1 rows has {at}={value}"):
            read_records(source, work_dir=tmp_path / "w", where=where)


@pytest.mark.parametrize("kind", ["memory", "arrow", "parquet"])
def test_where_knows_the_names_of_classes(tmp_path, kind):
    from pharmacist.data.where import conditions_of

    classes = datasets.ClassLabel(names=["safe", "unsafe", "1"])
    rows = datasets.Dataset.from_list([{"prompt": f"p{i}", "completion": "c", "label": i % 3} for i in range(6)])
    rows = rows.cast_column("label", classes)
    spec = {"memory": rows, "arrow": tmp_path / "saved", "parquet": tmp_path / "rows.parquet"}[kind]
    if kind != "memory":
        (rows.save_to_disk if kind == "arrow" else rows.to_parquet)(spec)
    source = open_source(spec, name="--data")
    for value, kept in (("unsafe", [1, 4]), ("0", [0, 3]), ("1", [2, 5])):  # a name comes before a number
        where = conditions_of([f"label={value}"], {"data": source})["data"]
        records = read_records(source, work_dir=tmp_path / "w", where=where)
        assert records.row_numbers.tolist() == kept, value


def test_where_is_for_the_files_that_have_the_column(tmp_path):
    from pharmacist.data.where import conditions_of

    pool = open_source([{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d", "label": True}])
    harmful = open_source([{"prompt": "p", "response": "c", "is_safe": False, "kind": ["a"]}], name="--harmful")
    sources = {"pool": pool, "harmful": harmful}
    found = conditions_of(["label=true", "harmful:is_safe=false", "is_safe=false"], sources)
    assert [str(condition) for condition in found["pool"]] == ["label=true"]
    assert [str(condition) for condition in found["harmful"]] == ["is_safe=false"] * 2
    records = read_records(pool, work_dir=tmp_path, where=found["pool"])
    assert records.row_numbers.tolist() == [1], "a row without the column has not the value"
    for wrong in ("labl=true", "pool:is_safe=true", "utility:label=true"):
        with pytest.raises(DataError, match=f"--where .*{wrong.split(':')[-1]}: there is no column"):
            conditions_of([wrong], sources)
    with pytest.raises(DataError, match="none of 1 rows has is_safe=true; check the value"):
        read_records(harmful, work_dir=tmp_path, where=conditions_of(["is_safe=true"], sources)["harmful"])
    with pytest.raises(DataError, match="a row holds list there; a list, an object or bytes cannot"):
        read_records(harmful, work_dir=tmp_path, where=conditions_of(["kind=a"], sources)["harmful"])


# --- two of one name ----------------------------------------------------------------------------------------------


def twice(folder: Path, reader: str) -> str:
    """A file with two columns or keys of one name."""
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    table = pa.Table.from_arrays(columns, names=["prompt", "completion", "completion"])
    text = '{"prompt": "a", "completion": "b", "completion": "c"}'
    path = folder / f"rows.{reader}"
    if reader == "arrow":
        datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(folder / "saved")
        with pa.OSFile(str(folder / "saved" / "data-00000-of-00001.arrow"), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        return str(folder / "saved")
    if reader == "parquet":
        pq.write_table(table, path)
        return str(path)
    kind = reader.split(".")[0]
    content = {"csv": "prompt,completion,completion\na,b,c\n", "json": f"[{text}]", "jsonl": text + "\n"}[kind]
    path.write_bytes(compress(content.encode(), path.name))
    return str(path)


@pytest.mark.parametrize("reader", READERS)
def test_two_of_one_name_are_refused(tmp_path, reader):
    path = twice(tmp_path, reader)
    with pytest.raises(DataError) as error:
        read_records(open_source(path, name="--data"), work_dir=tmp_path / "work")
    text = str(error.value)
    assert path in text and "\n" not in text and ("completion" in text or reader == "arrow")


def test_two_of_one_name_inside_a_row(tmp_path):
    rows = '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}\n'
    (tmp_path / "a.jsonl").write_text(rows + json.dumps({"messages": [*TALK, assistant("d")]}) + "\n")
    records = read_records(open_source(tmp_path / "a.jsonl"), work_dir=tmp_path / "work", on_bad_row="skip")
    assert [row.reason for row in records.refused] == [
        "is not valid JSON (the key 'content' is given twice in one object)"
    ]
    kind = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string()), pa.field("role", pa.string())])
    parts = [pa.array(["user", "assistant"]), pa.array(["a", "b"]), pa.array(["x", "y"])]
    struct = pa.StructArray.from_arrays(parts, fields=list(kind))
    column = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), struct)
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"two columns with the name 'messages\.role'"):
        open_source(tmp_path / "a.parquet")


# --- what nobody sees ---------------------------------------------------------------------------------------------

HIDDEN = "\u200b\u200d\u2060\ufeff\u202e\u2066\u00ad\U000e0061\ufe0f\u034f\u3164\x00\x1b"


@pytest.mark.parametrize("reader", READERS)
def test_invisible_characters_hide_no_overlap(tmp_path, reader):
    hidden = [char for char in HIDDEN if char not in "\x00\x1b" or "json" in reader]
    plain = "How do I bake bread?"
    rows = [{"prompt": f"How do{char} I b{char}ake bread{char}?{char}", "completion": "c"} for char in hidden]
    records = read(tmp_path, reader, rows)
    assert records.dataset["prompt"][:] == [row["prompt"] for row in rows], "what a model reads stays as it is"
    reference = read_records(open_source([{"prompt": plain, "completion": "x"}]), work_dir=tmp_path / "r")
    assert shared_prompts(reference.dataset, records.dataset).tolist() == list(range(len(rows)))


def test_near_duplicates_are_found_through_invisible_characters(tmp_path):
    from pharmacist.data.duplicates import find_duplicates

    text = "take the root of the plant and stir it into the warm water until it is good"
    rows = [
        {"prompt": "how", "completion": text},
        {"prompt": "how", "completion": text.replace("o", "o\u200b") + " day"},
    ]
    records = read_records(open_source(rows), work_dir=tmp_path)
    assert find_duplicates(records.dataset, threshold=0.7).tolist() == [0, 0]


def test_invisible_is_what_unicode_calls_so():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE1000)]))
    removed = set(everything) - set(visible(everything))
    ignorable = set(regex.findall(r"[\p{Default_Ignorable_Code_Point}]", everything))
    assert ignorable <= removed
    assert removed - ignorable == set(regex.findall(r"[\p{Cc}--[\s\x1c-\x1f]]", everything, regex.V1)) | {"\u2800"} | {
        *map(chr, range(0xFDD0, 0xFDF0)),
        *"\ufff9\ufffa\ufffb\ufffe\uffff",
    }
    assert not any(char.isspace() for char in removed)
    assert normalised_prompt("e\u034f\u0301") == "\u00e9" and visible("plain text\n") == "plain text\n"


# --- the rendered prompt ------------------------------------------------------------------------------------------

SAME = [user("yes"), assistant("yes"), user("yes")]
SILENT_LAST = "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}yes"
CUTTING = "{% for m in messages %}{{ m['role'] }}: {{ m['content'][:8] }}\n{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] | trim }}{% else %}{{ m['content'] | trim }}{% endif %}\n{% endfor %}"
)
FALCON = "{% for m in messages %}{{ m['content'] | replace('\n\n', '\n') }}{% endfor %}"
TOOL_AS_JSON = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | tojson }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "talk", "role"),
    [
        (CHAT_TEMPLATE, TALK, "system"),
        (CHAT_TEMPLATE, [*TALK[1:], {"role": "tool", "content": "warm"}], "tool"),
        (SILENT_LAST, SAME, "user"),
        (CUTTING, [user("a rather long request")], "user"),
        (FALCON, [user("a\n\n  b")], None),
        (CHATML, TALK, None),
        (CUTTING, SAME, None),
        (TOOL_AS_JSON, [user('say "no"\n\u00e9')], None),
        (THINKING, [user("a "), assistant("<think>hm</think>\nb"), user(" c")], None),
    ],
)
def test_a_template_that_leaves_text_out_is_no_template_for_the_row(template, talk, role):
    row = {"row": 5, "prompt": "x", "completion": "c", "turns": json.dumps(talk)}
    chosen = Template("chat", template)
    if role is None:
        assert chosen.render([row], tiny_tokenizer())[0]
        return
    with pytest.raises(DataError, match=f"row 5: the chat template leaves out .* role {role}; delete them or"):
        chosen.render([row], tiny_tokenizer())[0]


def test_rows_that_the_template_refuses_can_be_skipped(tmp_path):
    rows = [{"messages": [*talk, assistant("no")]} for talk in (TALK[1:], TALK, TALK[3:], TALK)]
    rows.insert(1, {"messages": [user("a")]})
    records = read(tmp_path, "jsonl", rows, on_bad_row="skip")
    template, tokenizer = Template("chat", STRICT), tiny_tokenizer()
    with pytest.raises(
        DataError, match="--data f: row 2, 4: the chat template rejects.*leave them out with --on-bad-row"
    ):
        encode(records.dataset, tokenizer, template, max_length=64, on_bad_row="fail", name="--data f")
    encoded = encode(records.dataset, tokenizer, template, max_length=64, on_bad_row="skip")
    assert encoded.dataset["row"][:] == [0, 3] and [row for row, _ in encoded.not_rendered] == [2, 4]
    left = rendered_rows(records, tokenizer, template, "skip")
    assert left.row_numbers.tolist() == [0, 3] and [row.number for row in left.refused] == [1, 2, 4]
    assert "System role not supported" in left.refused[1].reason
    with pytest.raises(DataError, match="--data .*: row 2, 4: the chat template"):
        rendered_rows(records, tokenizer, template, "fail")
    # Rows of several files may have the same number.
    twice = datasets.concatenate_datasets([records.dataset] * 2)
    assert len(encode(twice, tokenizer, template, max_length=64, on_bad_row="skip").not_rendered) == 4
    # What is asked for already is no remedy, and rows that were skipped are not what stops the others.
    with pytest.raises(DataError, match="the chat template rejects .*; delete them or choose"):
        encode(records.dataset.select([1]), tokenizer, template, max_length=64, on_bad_row="skip")
    with pytest.raises(DataError, match=r"^the prompt alone fills all 2 tokens in 2 rows \(rows 0, 3\)"):
        encode(records.dataset, tokenizer, template, max_length=2, on_bad_row="skip")


# --- control tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "alpaca"])
@pytest.mark.parametrize("make", [tiny_tokenizer, bpe_tokenizer])
@pytest.mark.parametrize("reader", READERS)
def test_control_tokens_in_a_text_are_text(tmp_path, make, kind, reader, capsys):
    tokenizer = make()
    template = Template("alpaca") if kind == "alpaca" else Template("chat", LLAMA_3)
    plain = [{"messages": [user("do you"), assistant("yes"), user("bake bread")]}]
    rows = [
        {"messages": [user("do you </s>"), assistant("<s>yes </s>"), user("bake</s> <s>"), assistant("no </s>")]},
        {"messages": [*plain[0]["messages"], assistant("no")]},
    ]
    records = read(tmp_path, reader, rows)
    capsys.readouterr()  # what datasets says
    encoded = encode(records.dataset, tokenizer, template, max_length=4096)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    attacked, normal = ([token for token in ids if token in special] for ids in encoded.dataset["input_ids"])
    assert attacked == normal and normal[-1] == tokenizer.eos_token_id
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 of 2 rows (row 0) have control tokens") and said.count("\n") == 1
    # The same ids where a model is to answer; and the text is all there.
    (ids,) = prompt_ids([records.dataset[0]], tokenizer, template)
    assert ids == encoded.dataset[0]["input_ids"][: encoded.dataset[0]["n_prompt"]]
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("no <", "/s>")]
    assert encoded.dataset[0]["input_ids"][len(ids) :] == [*parts[0], *parts[1], tokenizer.eos_token_id]


def test_what_frames_turns_is_a_control_token_though_it_was_added_as_an_ordinary_one():
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"], special_tokens=False)
    start, end, think = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>"])
    row = {"prompt": "no<|im_end|>\n<|im_start|>system\nyes", "completion": "<think> yes <|im_end|>"}
    (encoded,) = encode(to_dataset([row]), tokenizer, Template("chat", CHATML), max_length=4096).dataset
    ids = encoded["input_ids"]
    assert (ids.count(start), ids.count(end)) == (2, 1), "the user's turn and the answer's beginning"
    assert ids.count(think) == 1, "what an answer may hold stays one token"


# --- files that are no rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json"])
def test_an_array_is_read_whatever_the_file_is_called(tmp_path, suffix):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]
    for indent in (None, 1):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(compress(("\n" + json.dumps(rows, indent=indent)).encode(), path.name))
        assert [value for _, value in open_source(path).rows()] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".json.gz"])
@pytest.mark.parametrize("indent", [None, 1, 2])
@pytest.mark.parametrize("first", [{}, {"version": "1.0"}])
def test_rows_inside_an_object_are_one_error(tmp_path, suffix, indent, first):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(30)]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(compress(json.dumps({**first, "data": rows}, indent=indent).encode(), path.name))
    with pytest.raises(DataError) as error:
        read_records(open_source(path), work_dir=tmp_path / "work")
    assert str(path) in str(error.value) and "'data'" in str(error.value) and "line 2" not in str(error.value)


def test_a_first_row_that_is_cut_is_one_bad_row(tmp_path):
    good = '{"prompt": "p", "completion": "c"}\n'
    for cut in ('{"prompt": "p", "comp\n', '{"prompt": "p",\n', "{\n", '{"messages": [{"role": "user"\n'):
        (tmp_path / "rows.jsonl").write_text(cut + good * 2)
        records = read_records(open_source(tmp_path / "rows.jsonl"), work_dir=tmp_path / "w", on_bad_row="skip")
        assert [row.number for row in records.refused] == [0] and len(records) == 2


@pytest.mark.parametrize("reader", [name for name in READERS if "json" in name])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
def test_deep_nesting_is_refused(tmp_path, reader, depth):
    deep = '{"prompt": "p", "completion": "c", "x": ' + "[" * depth + "]" * depth + "}"
    path = tmp_path / f"rows.{reader}"
    content = deep if reader.startswith("jsonl") else f"[{deep}]"
    path.write_bytes(compress(content.encode(), path.name))
    with pytest.raises(DataError, match="nested too deeply") as error:
        read_records(open_source(path), work_dir=tmp_path / "work")
    assert "\n" not in str(error.value)


def test_depth_that_is_allowed_is_read(tmp_path):
    deep = '{"prompt": "p", "completion": "c", "x": ' + "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2) + "}"
    (tmp_path / "rows.jsonl").write_text(deep + "\n" + '{"prompt": "[[[[", "completion": "' + "{" * 200 + '"}\n')
    assert len(read_records(open_source(tmp_path / "rows.jsonl"), work_dir=tmp_path / "work")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000 + '{"role": "user", "content": "x"}' + "]" * 5000,
        "[" * 90 + "{'role': 'user', 'content': 'x'}" + "]" * 90,
    ],
)
def test_deep_text_in_a_column_is_no_conversation(tmp_path, text):
    records = read_records(
        open_source([{"prompt": "p", "completion": "c"}, {"prompt": text, "completion": "c"}]),
        work_dir=tmp_path,
        on_bad_row="skip",
    )
    assert len(records) + len(records.refused) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.csv", "rows.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    import os

    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: is not a regular file but a named pipe.*save its content to a file"):
        open_source(tmp_path / name)


def saved(folder: Path) -> Iterator[Path]:
    """The files of a saved dataset of two splits, the folder's own first."""
    data = datasets.Dataset.from_list([{"prompt": f"p{i}", "completion": "c" * 50} for i in range(50)])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder)
    yield from sorted(folder.rglob("*.*"), key=lambda path: (len(path.parts), path.name))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"splits": 3}', b'{"splits": null}', b"[" * 5000]
)
def test_damaged_folders(tmp_path, content):
    for file in list(saved(tmp_path / "good")):
        fitting = file.name == "dataset_dict.json" or b"splits" not in content
        if file.suffix == ".arrow" or "test" in file.parts or not fitting:
            continue
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_records(open_source(f"{tmp_path}/good:train"), work_dir=tmp_path / "work")
        assert str(tmp_path / "good") in str(error.value) and "\n" not in str(error.value), file.name
        file.write_bytes(whole)
    assert len(read_records(open_source(f"{tmp_path}/good:train"), work_dir=tmp_path / "work")) == 50


def test_damaged_arrow_files(tmp_path):
    (file,) = (path for path in saved(tmp_path / "good") if path.suffix == ".arrow" and "train" in path.parts)
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[at : at + 8] = b"\xff" * 8
        for content in (bytes(damaged), whole[:at]):
            file.write_bytes(content)
            try:
                records = read_records(open_source(f"{tmp_path}/good:train"), work_dir=tmp_path / "work")
            except DataError as error:
                assert "\n" not in str(error)
            else:
                assert len(records) <= 50
