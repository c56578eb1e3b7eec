import datetime
import decimal
import gzip
import json
import random
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pharmacist.core.errors import DataError
from pharmacist.core.hashing import sha256_file
from pharmacist.data.formats import json_array, open_source, write_rows
from pharmacist.data.formats import text as text_files
from pharmacist.data.where import Condition
from tests.support.files import SUFFIXES, TEXTS, compress, made_rows, save


def read(spec: object) -> list[dict]:
    return [value for _, value in open_source(spec).rows()]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seed", range(3))
def test_rows_survive_reading_and_writing(tmp_path, suffix, seed):
    rows = made_rows(37, seed)
    source = open_source(save(tmp_path / f"pool.{suffix}", rows))
    assert [number for number, _ in source.rows()] == list(range(37))
    assert [value for _, value in source.rows()] == rows
    chosen = sorted(random.Random(seed).sample(range(37), 11))
    for name, format in ((f"out.{suffix}", None), ("out.jsonl", "jsonl"), ("out2.jsonl.gz", "jsonl")):
        write_rows(source, chosen, tmp_path / name, format)
        assert read(tmp_path / name) == [rows[i] for i in chosen]
    assert source.dataset(chosen).to_list() == [rows[i] for i in chosen]
    assert not list(tmp_path.glob(".*")), "temporary files are left"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_row_and_all_rows_can_be_written(tmp_path, suffix):
    rows = made_rows(5)
    source = open_source(save(tmp_path / f"pool.{suffix}", rows))
    write_rows(source, [], tmp_path / f"none.{suffix}")
    assert read(tmp_path / f"none.{suffix}") == []
    write_rows(source, range(5), tmp_path / f"all.{suffix}")
    assert read(tmp_path / f"all.{suffix}") == rows


def test_json_lines_are_copied_byte_by_byte(tmp_path):
    odd = [
        b'{"prompt": "a",   "completion":"\\u00fc", "x": 1.10, "y": 1e400}\r\n',
        b"\n",
        b'{"z":null}\n',
        b"  \n",
        b'{"q":1}',
    ]
    (tmp_path / "pool.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(odd))
    source = open_source(tmp_path / "pool.jsonl")
    assert [number for number, _ in source.rows()] == [0, 1, 2]
    write_rows(source, [0, 2], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == odd[0].replace(b"\r", b"") + b'{"q":1}\n'


def test_csv_records_are_copied_byte_by_byte(tmp_path):
    head, first, second = b'"prompt",completion\n', b'"a, b","one\n""two"""\n', b'c,"d"\n'
    (tmp_path / "pool.csv").write_bytes(head + first + second)
    source = open_source(tmp_path / "pool.csv")
    assert [value for _, value in source.rows()][0] == {"prompt": "a, b", "completion": 'one\n"two"'}
    write_rows(source, [0], tmp_path / "a.csv")
    write_rows(source, [1], tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == head + first
    assert (tmp_path / "b.csv").read_bytes() == head + second


def test_json_elements_are_copied_as_they_are(tmp_path):
    (tmp_path / "pool.json").write_text('[ {"a" : 1.50,\n "b": []} , {"a":2}\n,{"a":3} ]\n')
    write_rows(open_source(tmp_path / "pool.json"), [0, 2], tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == '[\n{"a" : 1.50,\n "b": []},\n{"a":3}\n]\n'


def test_a_json_file_may_hold_json_lines(tmp_path):
    (tmp_path / "pool.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    source = open_source(tmp_path / "pool.json")
    assert source.format == "jsonl"
    assert [value for _, value in source.rows()] == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_json_arrays_are_read_right_whatever_the_chunk_borders(tmp_path, monkeypatch, chunk):
    rows = [{"prompt": text, "n": [i, 1.5, None, True, {"deep": [text]}]} for i, text in enumerate(TEXTS)]
    (tmp_path / "pool.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    assert read(tmp_path / "pool.json") == rows


def test_parquet_keeps_schema_and_compression(tmp_path):
    schema = pa.schema([("prompt", pa.large_string()), ("completion", pa.string()), ("v", pa.list_(pa.float32()))])
    schema = schema.with_metadata({"made": "up"})
    table = pa.table(
        {"prompt": ["a", "b", "c"], "completion": ["x", None, "z"], "v": [[1.5], [], None]}, schema=schema
    )
    pq.write_table(table, tmp_path / "pool.parquet", compression="zstd", row_group_size=2)
    source = open_source(tmp_path / "pool.parquet")
    write_rows(source, [1, 2], tmp_path / "out.parquet")
    written = pq.read_table(tmp_path / "out.parquet")
    original = pq.read_table(tmp_path / "pool.parquet")
    assert written.schema.equals(original.schema, check_metadata=True) and written.schema.metadata == {b"made": b"up"}
    assert written.equals(original.slice(1))
    assert pq.ParquetFile(tmp_path / "out.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert source.dataset([0, 2])["v"][:] == [[1.5], None]


def test_nan_becomes_null_in_json_lines_and_stays_nan_in_parquet(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "score": [float("nan")]}), tmp_path / "pool.parquet")
    source = open_source(tmp_path / "pool.parquet")
    write_rows(source, [0], tmp_path / "out.jsonl", "jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"prompt": "a", "score": null}\n'
    rows = [{"prompt": "a", "score": np.float32("nan"), "v": np.array([[np.inf, 1.5], [2, np.nan]])}]
    write_rows(open_source(rows), [0], tmp_path / "numpy.jsonl")
    assert (tmp_path / "numpy.jsonl").read_bytes() == (
        b'{"prompt": "a", "score": null, "v": [[null, 1.5], [2.0, null]]}\n'
    )
    write_rows(source, [0], tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["score"].isna().all()


def test_saved_folders_and_datasets_in_memory(tmp_path):
    rows = made_rows(9)
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "splits")
    saved = open_source(str(tmp_path / "saved"))
    assert saved.format == "arrow" and [value for _, value in saved.rows()] == rows
    assert read(f"{tmp_path}/splits:test") == [rows[3]]
    for source in (saved, open_source(data), open_source(rows)):
        write_rows(source, [1, 8], tmp_path / "out.jsonl")
        assert read(tmp_path / "out.jsonl") == [rows[1], rows[8]]
        assert source.dataset([1, 8]).to_list() == [rows[1], rows[8]]
    # A view with its own order is read in that order.
    assert read(data.select([4, 2])) == [rows[4], rows[2]]
    assert saved.fingerprint() == open_source(str(tmp_path / "saved")).fingerprint() != open_source(data).fingerprint()


def test_data_frames_are_read_without_their_index():
    rows = [{"prompt": "a", "n": 1, "tags": ["x"]}, {"prompt": "b", "n": 2, "tags": []}, {"prompt": "c", "n": 3}]
    frame = pd.DataFrame(rows)
    expected = [*rows[:2], rows[2] | {"tags": None}]
    assert read(frame) == expected and read(frame[frame["n"] > 1].sort_values("n", ascending=False)) == expected[:0:-1]
    for wrong, said in ((pd.DataFrame({"a": ["x", 1]}), "Expected bytes"), (frame[["n", "n"]], "Duplicate column")):
        with pytest.raises(
            DataError, match=f"^pool: the DataFrame cannot be read .*{said}.*; give a list of mappings"
        ):
            open_source(wrong)


def test_messages_in_memory_may_be_in_tuples_and_arrays(tmp_path):
    turns = [{"role": "user", "content": "Brew?"}, {"role": "assistant", "content": "No."}]
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "pool.parquet")
    rows = [*pd.read_parquet(tmp_path / "pool.parquet").to_dict("records"), {"messages": tuple(turns)}]
    assert isinstance(rows[0]["messages"], np.ndarray)
    assert read(rows) == [{"messages": turns}, {"messages": turns}]
    nested = {"history": [["Bake?", "Yes."]], "messages": [turns[0] | {"tool_calls": [], "n": [[1], [2, 3]]}]}
    pq.write_table(pa.table({name: [value] for name, value in nested.items()}), tmp_path / "pool.parquet")
    assert read(pd.read_parquet(tmp_path / "pool.parquet").to_dict("records")) == [nested]


def test_numbers_of_numpy_in_memory_are_numbers():
    kinds = (np.int64(3), np.float32(0.5), np.bool_(True), np.array([1, 2]), np.str_("a"), 3)
    (row,) = read([{f"c{i}": value for i, value in enumerate(kinds)}])
    assert list(map(repr, row.values()))[:4] == ["3", "0.5", "True", "[1, 2]"]
    assert Condition("c0", "3").holds(row) and Condition("c2", "true").holds(row) and Condition("c4", "a").holds(row)


def test_images_are_read_as_bytes(tmp_path):
    pictures = pa.array([{"bytes": b"x", "path": None}], datasets.Image().pa_type)
    kinds = {"prompt": datasets.Value("string"), "image": datasets.Image(), "images": datasets.List(datasets.Image())}
    table = pa.table({"prompt": ["a"], "image": pictures, "images": pa.ListArray.from_arrays([0, 1], pictures)})
    schema = datasets.Features(kinds | {"json": datasets.Json()}).arrow_schema
    data = datasets.Dataset(table.append_column("json", pa.array(['{"a": [1, "b"]}'])).cast(schema))
    data.save_to_disk(tmp_path / "saved")
    picture = {"bytes": b"x", "path": None}
    row = {"prompt": "a", "image": picture, "images": [picture], "json": {"a": [1, "b"]}}
    assert read(tmp_path / "saved") == read(data) == [row]
    assert open_source(data).fingerprint() == open_source(data.select([0])).fingerprint()
    assert open_source(data).dataset([0]).features == data.features


def test_messages_of_changing_shape_come_back_from_parquet(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "weight": 1}]},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = datasets.load_dataset(
        "json", data_files=str(tmp_path / "pool.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    data.to_parquet(str(tmp_path / "pool.parquet"))
    assert read(tmp_path / "pool.parquet") == rows
    assert read(data) == rows


def test_fingerprints_are_of_the_content(tmp_path):
    rows = made_rows(4)
    path = save(tmp_path / "pool.jsonl", rows)
    assert open_source(path).fingerprint() == sha256_file(path)
    assert open_source(rows).fingerprint() == open_source([dict(row) for row in rows]).fingerprint()
    assert open_source(rows).fingerprint() != open_source(rows[::-1]).fingerprint()
    assert open_source(datasets.Dataset.from_list(rows)).fingerprint() == open_source(rows).fingerprint()
    long = [np.arange(5000), np.arange(5000)]
    long[1][2500] = 0  # numpy writes neither as text
    assert len({open_source([{"a": array}]).fingerprint() for array in long}) == 2


def test_compressed_output_depends_on_nothing_but_the_rows(tmp_path):
    source = open_source(save(tmp_path / "pool.jsonl", made_rows(50)))
    for suffix in ("gz", "zst"):
        write_rows(source, range(20), tmp_path / f"a.jsonl.{suffix}")
        write_rows(source, range(20), tmp_path / f"other name.jsonl.{suffix}")
        assert (tmp_path / f"a.jsonl.{suffix}").read_bytes() == (tmp_path / f"other name.jsonl.{suffix}").read_bytes()


def test_values_json_has_no_word_for(tmp_path):
    row = {"day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.10"), "v": np.arange(2), "s": "\ud800"}
    write_rows(open_source([row]), [0], tmp_path / "out.jsonl")
    written = json.loads((tmp_path / "out.jsonl").read_bytes())
    assert written == {"day": "2026-01-02", "price": "1.10", "v": [0, 1], "s": "\ud800"}
    with pytest.raises(DataError, match="row 0 holds a value of the type object"):
        write_rows(open_source([{"x": object()}]), [0], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_bytes()) == written, "a failed write must leave the file"


def test_values_no_dataset_has_room_for(tmp_path):
    held = {"'a' holds values of several types": '{"a": 1}\n{"a": "x"}\n'}
    held["'a' holds a number of more than 64 bits"] = f'{{"a": {2**70}}}\n{{}}\n'
    held["'a' holds a lone surrogate"] = '{"a": "\\ud800"}\n{}\n'
    held[r"'\ud800' holds a lone surrogate"] = '{"\\ud800": 1}\n{}\n'
    for message, text in held.items():
        (tmp_path / "pool.jsonl").write_text(text)
        with pytest.raises(DataError) as error:
            open_source(tmp_path / "pool.jsonl").dataset([0, 1])
        one_line(error, f"pool.jsonl: column {message}, which a dataset cannot contain; write the rows to a file")
    assert open_source([{0: "x"}]).dataset([0]).column_names == ["0"]
    pq.write_table(
        pa.table({"a": pa.array([[("x", 1)]], pa.map_(pa.string(), pa.int64()))}), tmp_path / "pool.parquet"
    )
    with pytest.raises(DataError) as error:
        open_source(tmp_path / "pool.parquet").dataset([0])
    one_line(
        error, "pool.parquet: a dataset cannot contain all its columns (Arrow type map", "write the rows to a file"
    )


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    source = open_source(save(tmp_path / "pool.jsonl", made_rows(3)))
    with pytest.raises(DataError, match="has no row 7"):
        write_rows(source, [0, 7], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="ascend"):
        write_rows(source, [1, 1], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "pool.jsonl"}


def test_only_native_and_json_lines_can_be_written(tmp_path):
    source = open_source(save(tmp_path / "pool.csv", made_rows(3)))
    with pytest.raises(DataError, match="as csv or jsonl, not parquet"):
        write_rows(source, [0], tmp_path / "out.parquet", "parquet")


# --- files that cannot be read ------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    for part in parts:
        assert part in text, text


def fails(spec: object, *parts: str) -> None:
    with pytest.raises(DataError) as error:
        read(spec)
    one_line(error, *parts)


def test_missing_files(tmp_path):
    fails(tmp_path / "no.jsonl", "no.jsonl", "no such file")
    fails(str(tmp_path / "no.jsonl"), "no such file")
    fails("no.parquet", "no such file")
    fails("  ", "empty path")
    fails("~nobody-of-this-name/pool.jsonl", "no such file")


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "~$pool.jsonl", made_rows(2))
    assert read("~$pool.jsonl") == made_rows(2)


def test_wrong_kinds_of_input(tmp_path):
    fails(tmp_path, str(tmp_path), "is a directory")
    (tmp_path / "pool.xlsx").write_text("x")
    fails(tmp_path / "pool.xlsx", "pool.xlsx", "unknown kind of file '.xlsx'", ".jsonl")
    (tmp_path / "pool.parquet.gz").write_text("x")
    fails(tmp_path / "pool.parquet.gz", "Parquet compresses by itself")
    fails(3, "int")
    fails({"prompt": "a"}, "dict", "list of mappings")
    fails(datasets.DatasetDict({"a": datasets.Dataset.from_list([{"x": 1}])}), "choose one split")
    fails([{"a": 1}, "b"], "row 1 is not a mapping")


def test_splits_must_be_named(tmp_path):
    data = datasets.Dataset.from_list(made_rows(2))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    fails(str(tmp_path / "splits"), "splits:SPLIT", "train, test")
    fails(f"{tmp_path}/splits:dev", "train, test")
    data.save_to_disk(tmp_path / "saved")
    fails(f"{tmp_path}/saved:train", "has no splits")
    (tmp_path / "saved" / "state.json").write_text("{")
    fails(str(tmp_path / "saved"), "cannot be opened")


def test_damaged_compression(tmp_path):
    for suffix in ("gz", "zst"):
        path = tmp_path / f"pool.jsonl.{suffix}"
        rng = random.Random(0)
        text = "".join(json.dumps({"prompt": str(rng.random())}) + "\n" for _ in range(20000))
        whole = compress(text.encode(), path.name)
        path.write_bytes(whole[: len(whole) // 2])
        fails(path, path.name, "damaged")
        path.write_text('{"prompt": "a"}\n')
        fails(path, path.name, "is no")
        (tmp_path / "pool.jsonl").write_bytes(whole)
        fails(tmp_path / "pool.jsonl", f"rename it to end in .{suffix}")
    path = tmp_path / "flipped.jsonl.gz"
    whole = bytearray(gzip.compress(text.encode()))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    # Rows read before the checksum may look broken or fine; the end of the file tells.
    with pytest.raises(DataError, match="damaged gzip"):
        list(open_source(path).scan())


def test_several_frames_are_one_file(tmp_path):
    for suffix in ("gz", "zst"):
        path = tmp_path / f"pool.jsonl.{suffix}"
        path.write_bytes(compress(b'{"a": 1}\n{"a"', path.name) + compress(b": 2}\n", path.name))
        assert read(path) == [{"a": 1}, {"a": 2}]


def test_padding_and_skippable_frames_are_no_data(tmp_path):
    skippable = b"\x5f\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    for suffix, before, after in (("gz", b"", b"\0" * 2048), ("zst", skippable, skippable)):
        path = tmp_path / f"pool.jsonl.{suffix}"
        path.write_bytes(before + compress(b'{"a": 1}\n', path.name) + after)
        assert read(path) == [{"a": 1}]
    path = tmp_path / "more.jsonl.gz"
    path.write_bytes(compress(b'{"a": 1}\n', path.name) + b"more")
    fails(path, "damaged gzip")


def test_bad_lines_are_named(tmp_path):
    good = b'{"prompt": "a", "completion": "b"}\n'
    cases = {
        b'{"prompt": "a", "completion": }\n': "line 7 (row 6) is not valid JSON (Expecting value at column 31)",
        b'{"prompt": "a"\n': "line 7 (row 6) is not valid JSON",
        b'{"prompt": "\xff"}\n': "line 7 (row 6) is not UTF-8 (byte 0xff at byte 13",
        b'["a"]\n': "line 7 (row 6) is not a JSON object but a list",
        b'{"prompt": NaN}\n': "line 7 (row 6) is not valid JSON (NaN is not a JSON value",
        b"[" * 100000 + b"\n": "line 7 (row 6) is not usable JSON (nested too deeply)",
    }
    for bad, message in cases.items():
        (tmp_path / "pool.jsonl").write_bytes(good * 6 + bad + good)
        fails(tmp_path / "pool.jsonl", "pool.jsonl", message)
        rows = list(open_source(tmp_path / "pool.jsonl").scan())
        assert [row.reason is None for row in rows] == [True] * 6 + [False, True]
    (tmp_path / "pool.jsonl").write_bytes(b"\n" * 6 + b"{\n")
    fails(tmp_path / "pool.jsonl", "line 7 (row 0)")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_of_50_mb_is_refused_without_being_held(tmp_path, suffix):
    good = b'{"prompt": "a"}\n'
    path = tmp_path / f"pool.{suffix}"
    path.write_bytes(compress(good + b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n' + good, path.name))
    rows = list(open_source(path).scan())
    assert [(row.number, row.line) for row in rows] == [(0, 1), (1, 2), (2, 3)]
    assert rows[1].reason == "is longer than 16 MB" and rows[1].raw is None
    assert rows[0].value == rows[2].value == {"prompt": "a"}
    write_rows(open_source(path), [0, 2], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == good * 2


def test_a_line_of_exactly_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 64)
    for length, fine in ((63, True), (64, True), (65, False), (200, False)):
        line = b'{"p": "' + b"x" * (length - 9) + b'"}'
        assert len(line) == length
        (tmp_path / "pool.jsonl").write_bytes(line + b"\n" + b'{"p": 1}\n')
        rows = list(open_source(tmp_path / "pool.jsonl").scan())
        assert [row.reason is None for row in rows] == [fine, True], length


def test_broken_json_arrays(tmp_path):
    path = tmp_path / "pool.json"
    cases = {
        '[{"a": 1},\n{"a": }]': "line 2 is not valid JSON (Expecting value",
        '[{"a": 1}\n{"a": 2}]': "line 2 is not valid JSON (',' or ']' expected after row 0, '{' found)",
        '[{"a": 1},\n\n': "line 3 is not valid JSON",
        '[{"a": 1}\n': "the end of the file found",
        '[{"a": 1},]': "is not valid JSON",
        '[{"a": "\n"}]': "Invalid control character",
        '[{"a": NaN}]': "NaN is not a JSON value",
        '[{"a": 1}]\nmore': "line 2 has text after the end",
        "[1]": "line 1 (row 0) is not a JSON object but a number",
    }
    for text, message in cases.items():
        path.write_text(text)
        fails(path, "pool.json", message)
    path.write_bytes(b'[{"a": "' + b"\xff" + b'"}]')
    fails(path, "is not UTF-8 near line 1")
    path.write_text("[]")
    assert read(path) == []


@pytest.mark.parametrize("space", [" ", "\n"])
def test_columns_are_counted_across_chunks(tmp_path, monkeypatch, space):
    monkeypatch.setattr(json_array, "CHUNK", 64)
    text = "[" + f",{space}".join(['{"a": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}'] * 20 + ['{"a": }'])
    (tmp_path / "pool.json").write_text(text + "]")
    column = text.index("}", text.index('": }')) - text.rfind("\n")
    fails(tmp_path / "pool.json", f"line {1 + text.count(chr(10))} is not", f"(Expecting value at column {column})")


def test_a_long_json_element_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_array, "CHUNK", 64)
    (tmp_path / "pool.json").write_text('[{"a": 1},\n{"a": "' + "x" * 5000 + '"}]')
    fails(tmp_path / "pool.json", "line 2", "longer than")


def test_broken_csv(tmp_path):
    path = tmp_path / "pool.csv"
    cases = {
        b"prompt,completion\na,b\nc\n": "line 3 (row 1) has 1 cells where the header has 2",
        b"prompt,completion\na,b,c\n": "line 2 (row 0) has 3 cells",
        b'prompt,completion\na,b\nc,"d\n': "the row at line 3 is not valid CSV (a quote is not closed",
        b'prompt,completion\n"a"b,c\n': "line 2 is not valid CSV",
        b"prompt,completion\na,\xff\n": "line 2 (row 0) is not UTF-8",
        b"prompt,prompt\na,b\n": "line 1 names the column 'prompt' twice",
        b"prompt;completion\na;b\n": "separate the cells by commas",
        b"prompt,completion\ra,b\r": "not valid CSV (a carriage return outside quotes",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        fails(path, "pool.csv", message)
    path.write_bytes(b"")
    assert read(path) == [] and open_source(path).columns is None
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\n")
    assert read(path) == [] and open_source(path).columns == ["prompt", "completion"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["pool.jsonl", "pool.json", "pool.csv"])
def test_utf_16_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(("\ufeff" * (encoding == "utf-16-be") + "prompt,completion\na,b\n").encode(encoding))
    fails(tmp_path / name, f"{name}: is UTF-16 or UTF-32 text; save it as UTF-8")


def test_csv_lines_are_counted_across_quoted_breaks(tmp_path):
    (tmp_path / "pool.csv").write_text('prompt,completion\n"a\n\nb",c\n\nd,e\nf\n')
    rows = list(open_source(tmp_path / "pool.csv").scan())
    assert [(row.number, row.line, row.reason is None) for row in rows] == [(0, 2, True), (1, 6, True), (2, 7, False)]


def test_broken_parquet(tmp_path):
    path = tmp_path / "pool.parquet"
    for content in (b"", b"PAR1", b"{}"):
        path.write_bytes(content)
        fails(path, "pool.parquet", "is not a Parquet file")
    bad = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"prompt": bad}), path)
    fails(path, "row 1 is not UTF-8")


# --- the hub, without a network -----------------------------------------------------------------------------------


def test_offline_hub_ids_fail_with_a_remedy(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", _raise(ConnectionError("offline")))
    for spec in ("someone/something", "someone/something:cfg:train"):
        fails(spec, spec, "HF_HUB_OFFLINE", "give a file")


def test_hub_ids_that_do_not_exist(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", _raise(RuntimeError("no\nsuch dataset")))
    fails("someone/something", "it cannot be loaded from the Hub (no such dataset)", "check the name")


def test_hub_ids_with_configuration_and_split(monkeypatch):
    train, test = datasets.Dataset.from_list([{"a": 1}]), datasets.Dataset.from_list([{"a": 2}])
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        splits = datasets.DatasetDict({"train": train, "test": test})
        return splits if split is None else splits[split]

    def load_dataset_builder(name, config):
        if config != "main":
            raise ValueError(f"BuilderConfig '{config}' not found")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert read("a/b") == read("a/b:main") == read("a/b:train") == [{"a": 1}]
    assert read("a/b:main:test") == read("a/b:test") == [{"a": 2}]
    expected = [("a/b", None, None), ("a/b", "main", None), ("a/b", None, "train"), ("a/b", "main", "test")]
    assert calls == [*expected, ("a/b", None, "test")]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"x": train, "y": test}))
    fails("a/b", "has several splits", "x, y")


def _raise(error):
    def call(*_, **__):
        raise error

    return call


def test_the_order_of_a_saved_datasets_shards_is_fingerprinted(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": f"p{i}", "completion": "c"} for i in range(4)])
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    prints, path = [open_source(tmp_path / "saved", name="--pool").fingerprint()], tmp_path / "saved/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"_data_files": state["_data_files"][::-1]}))
    source = open_source(tmp_path / "saved", name="--pool")
    assert [row.value["prompt"] for row in source.scan()] == ["p2", "p3", "p0", "p1"]
    assert source.fingerprint() != prints[0]


UNHELD: dict[str, tuple[pa.Array, str]] = {
    "bytes": (pa.array([None, b"\xff", None]), "row 1 (a value of the type bytes)"),
    "nested bytes": (pa.array([[{"a": b"x"}]] * 3), "row 0 (a value of the type bytes)"),
    "duration": (pa.array([datetime.timedelta(1)] * 3), "row 0 (a value of the type timedelta)"),
    "date": (pa.array([2**30] * 3, pa.date32()), "row 0 (days=1073741824"),
    "time": (pa.array([0, 0, 2**62], pa.timestamp("us")), "row 0 (date value out of range)"),
}
HELD: dict[str, pa.Array] = {
    "no bytes": pa.array([None] * 3, pa.binary()),
    "date": pa.array([datetime.date(2020, 1, 1)] * 3),
    "number": pa.array([decimal.Decimal("1.5")] * 3),
    "NaN": pa.array([float("nan")] * 3),
    "map": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "view": pa.array(["a"] * 3, pa.string_view()),
    "code": pa.array(["a"] * 3).dictionary_encode(),
}


@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "datasets"])
@pytest.mark.parametrize("name", UNHELD)
def test_what_json_lines_cannot_hold_is_told_before_anything_is_written(
    name: str, saved: bool, tmp_path: Path
) -> None:
    column, told = UNHELD[name]
    table = pa.table({"prompt": ["a", "b", "c"], "x": column})
    if saved:
        datasets.Dataset(table).save_to_disk(tmp_path / "rows")
    else:
        pq.write_table(table, tmp_path / "rows.parquet")
    source = open_source(str(tmp_path / ("rows" if saved else "rows.parquet")))
    with pytest.raises(
        DataError, match=r"column 'x' contains values that JSON lines cannot.*--format input"
    ) as caught:
        source.check_json_lines()
    assert told in str(caught.value)
    if not saved:
        write_rows(source, [0, 2], tmp_path / "kept.parquet", "parquet")
        assert pq.read_table(tmp_path / "kept.parquet").equals(table.take([0, 2]))


@pytest.mark.parametrize("name", HELD)
def test_what_json_lines_hold_passes(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "x": HELD[name]}), tmp_path / "rows.parquet")
    source = open_source(str(tmp_path / "rows.parquet"))
    source.check_json_lines()
    write_rows(source, [0, 2], tmp_path / "kept.jsonl", "jsonl")
    write_rows(source, [0, 2], tmp_path / "kept.parquet", "parquet")
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2
    assert len(pq.read_table(tmp_path / "kept.parquet")) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"splits": 3}', b"null", b"[" * 100000, b"\xff"])
def test_a_damaged_list_of_splits_is_told(content: bytes, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(made_rows(3))}).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / "dataset_dict.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset_dict.json is damaged and names no splits; save it again"):
        open_source(str(tmp_path / "rows"))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", b"nothing"])
def test_a_damaged_saved_dataset_is_told(name: str, content: bytes, tmp_path: Path) -> None:
    datasets.Dataset.from_list(made_rows(3)).save_to_disk(tmp_path / "rows")
    assert (tmp_path / "rows" / name).is_file()
    (tmp_path / "rows" / name).write_bytes(content)
    with pytest.raises(DataError, match="the saved dataset cannot be opened"):
        open_source(str(tmp_path / "rows"))
