"""Bad input: exit code 2, one line that says what, where and what to do, nothing overwritten, nothing lost."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.worlds import BASE_MODEL
from tests.support.tiny import save_tiny_model, tiny_tokenizer
from tests.support.world_files import CHEAP, curate_words, fingerprints, write_rows, write_world


Case = Callable[[Path, dict[str, str]], list[str]]
"""(empty folder, good files) -> words of the command line; the output folder is ``folder / "out"``."""

GOOD = [{"prompt": f"say {word}", "completion": f"no, never {word}"} for word in "abcdefghijkl"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("files"))


def text_pool(name: str, content: str | bytes, *more: str) -> Case:
    """A pool with this content, ranked by chance."""

    def words(folder: Path, _: dict[str, str]) -> list[str]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return curate_words({"pool": str(folder / name)}, folder / "out", "--selector", "random", *more, model=None)

    return words


def rows(*changed: Any, **more: Any) -> str:
    """Good rows with others after the first three, as JSON lines."""
    lines = [json.dumps(row) for row in GOOD]
    lines[3:3] = [row if isinstance(row, str) else json.dumps(row) for row in changed]
    return "\n".join(lines) + "\n"


def options(*more: str, model: str | None = str(BASE_MODEL), without: str = "") -> Case:
    """Good files with these options."""

    def words(folder: Path, files: dict[str, str]) -> list[str]:
        return curate_words(
            {n: p for n, p in files.items() if n != without}, folder / "out", *CHEAP, *more, model=model
        )

    return words


def with_file(option: str, name: str, content: Any) -> Case:
    """Good files but for one, made of rows or of another file's."""

    def words(folder: Path, files: dict[str, str]) -> list[str]:
        made = content(files) if callable(content) else content
        return curate_words(files | {option: write_rows(folder / name, made)}, folder / "out", *CHEAP)

    return words


def lines_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).open()]


def model_folder(change: Callable[[Path], object]) -> Case:
    """A tiny model that was damaged."""

    def words(folder: Path, files: dict[str, str]) -> list[str]:
        change(save_tiny_model(folder / "model"))
        return curate_words(files, folder / "out", *CHEAP, model=str(folder / "model"))

    return words


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_eos(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def bert(folder: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=99)
    BertModel(config).save_pretrained(folder)


def config_file(content: str | None) -> Case:
    def words(folder: Path, files: dict[str, str]) -> list[str]:
        if content is not None:
            (folder / "options.yaml").write_text(content)
        return [*options()(folder, files), "--config", str(folder / "options.yaml")]

    return words


def place(make: Callable[[Path], object], option: str, value: str) -> Case:
    """An option that names something made for the test."""

    def words(folder: Path, files: dict[str, str]) -> list[str]:
        make(folder)
        return [*options()(folder, files), option, str(folder / value)]

    return words


def mine(folder: Path) -> None:
    (folder / "thing").write_text("mine")


def foreign_output(folder: Path, files: dict[str, str]) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")
    return options()(folder, files)


def other_runs_output(folder: Path, files: dict[str, str]) -> list[str]:
    pool = {"pool": files["pool"]}
    assert main(curate_words(pool, folder / "out", "--selector", "random", "--quiet", model=None)) == 0
    return curate_words(pool, folder / "out", "--selector", "random", "--top", "0.5", model=None)


def changed_pool(folder: Path, files: dict[str, str]) -> list[str]:
    pool = {"pool": write_rows(folder / "pool.jsonl", GOOD)}
    words = curate_words(pool, folder / "out", "--selector", "random", model=None)
    assert main([*words, "--quiet"]) == 0
    write_rows(folder / "pool.jsonl", GOOD[1:])
    return words


def parquet(table: dict[str, list]) -> Case:
    def words(folder: Path, _: dict[str, str]) -> list[str]:
        pq.write_table(pa.table(table), folder / "pool.parquet")
        return curate_words({"pool": str(folder / "pool.parquet")}, folder / "out", "--selector", "random", model=None)

    return words


CASES: dict[str, tuple[Case, str]] = {
    # --- rows
    "empty file": (text_pool("pool.jsonl", ""), "pool.jsonl: contains no rows; give a file with at least one row"),
    "blank lines": (text_pool("pool.jsonl", "\n \n\n"), "pool.jsonl: contains no rows"),
    "no completion": (text_pool("pool.jsonl", rows({"prompt": "x"})), "line 4 (row 3) has no 'completion'; fix or"),
    "empty completion": (
        text_pool("pool.jsonl", rows({"prompt": "x", "completion": " "})),
        "line 4 (row 3) has an empty 'completion'",
    ),
    "invalid JSON at line 7": (
        text_pool("pool.jsonl", rows(*GOOD[:3], '{"prompt": "x", "completion": "y"')),
        "line 7 (row 6) is not valid JSON",
    ),
    "mixed formats": (
        text_pool("pool.jsonl", rows({"instruction": "x", "output": "y"})),
        "mixed row formats: line 4 (row 3) has the columns instruction, output where rows before have prompt, compl",
    ),
    "text and messages": (
        text_pool("pool.jsonl", rows({"prompt": [{"role": "user", "content": "x"}], "completion": "y"})),
        "mixed row formats: line 4",
    ),
    "a number for text": (
        text_pool("pool.jsonl", rows({"prompt": "x", "completion": 7})),
        "line 4 (row 3) 'completion' is a number, not text",
    ),
    "NaN": (
        text_pool("pool.jsonl", rows('{"prompt": "x", "completion": NaN}')),
        "line 4 (row 3) is not valid JSON (NaN",
    ),
    "a column that the output cannot hold": (
        parquet({"prompt": ["x", "y"], "completion": ["a", "b"], "image": [None, b"x"]}),
        "column 'image' contains values that JSON lines cannot represent, such as that of row 1 (a value of the type "
        "bytes); curate's --format input keeps it",
    ),
    "NaN in a column": (
        parquet({"prompt": ["x"], "completion": [float("nan")]}),
        "row 0 'completion' is NaN, not text",
    ),
    "lone surrogate": (
        text_pool("pool.jsonl", rows('{"prompt": "x", "completion": "\\ud800"}')),
        "row 3) holds the lone surrogate \\ud800",
    ),
    "not UTF-8": (
        text_pool("pool.jsonl", rows().encode() + b'{"prompt": "\xff", "completion": "y"}\n'),
        "line 13 (row 12) is not UTF-8",
    ),
    "not UTF-8, CSV": (text_pool("pool.csv", b"prompt,completion\na,\xff\n"), "line 2 (row 0) is not UTF-8"),
    "too many cells": (
        text_pool("pool.csv", "prompt,completion\na,b,c\n"),
        "line 2 (row 0) has 3 cells where the header",
    ),
    "no known columns": (
        text_pool("pool.jsonl", '{"a": 1}\n'),
        "line 1 (row 0) fits no row format (its columns: a); known row formats are",
    ),
    "all bad under skip": (
        text_pool("pool.jsonl", '{"prompt": "x", "completion": 1}\n', "--on-bad-row", "skip"),
        "none of the 1 rows can be used",
    ),
    # --- files
    "no such file": (options("--pool", "missing.jsonl"), "--pool missing.jsonl: no such file; check the path"),
    "no such references": (options("--safe", "missing.jsonl"), "--safe missing.jsonl: no such file"),
    "unknown suffix": (text_pool("pool.xlsx", "x"), "pool.xlsx: unknown kind of file '.xlsx'; known are .jsonl"),
    "broken gzip": (text_pool("pool.jsonl.gz", gzip.compress(rows().encode() * 50)[:-20]), "damaged gzip data"),
    "no gzip at all": (text_pool("pool.jsonl.gz", rows()), "is not a gzip file although its name says so"),
    "no Parquet": (text_pool("pool.parquet", "x"), "is not a Parquet file"),
    "a name nobody can have": (options("--pool", "x" * 400 + ".jsonl"), "no such file; check the path"),
    "a directory for a file": (
        place(lambda f: (f / "thing").mkdir(), "--pool", "thing"),
        "is a directory without a saved",
    ),
    # --- places
    "a file for the folder": (place(mine, "--output-dir", "thing"), "thing: is a file; --output-dir needs a folder"),
    "a folder below a file": (
        place(mine, "--output-dir", "thing/out"),
        "thing/out: cannot be written (Not a directory)",
    ),
    "a file for the model": (
        place(mine, "--model", "thing"),
        "thing: is a file; a model folder or a Hub id is needed",
    ),
    "foreign files": (
        foreign_output,
        "out: contains files that do not belong to a pharmacist run; choose an empty --output-dir",
    ),
    "foreign files, to overwrite": (
        lambda f, files: [*foreign_output(f, files), "--overwrite"],
        "so --overwrite leaves them alone",
    ),
    "another run": (other_runs_output, "out: holds a run with other top; choose another --output-dir, or --overwrite"),
    "another pool": (changed_pool, "out: holds a run with other content of pool; choose another --output-dir"),
    # --- options
    "top 0": (options("--top", "0"), "--top 0: must lie in (0, 1]"),
    "top 1.5": (options("--top", "1.5"), "--top 1.5: must lie in (0, 1]"),
    "threshold 0": (options("--duplicate-threshold", "0"), "--duplicate-threshold 0: must lie in (0, 1]"),
    "top text": (options("--top", "third"), "--top third: must be a number"),
    "top and top-k": (options("--top", "0.3", "--top-k", "5"), "--top and --top-k exclude each other"),
    "top-k 0": (options("--top-k", "0"), "--top-k 0: must be at least 1"),
    "top-k too large": (
        options("--top-k", "61"),
        "--top-k 61: the pool has 60 rows to rank; give at most that number",
    ),
    "nobody's score": (options("--min-score", "1e9"), "min score 1e+09: no row reaches it, the best has"),
    "unknown option": (options("--divresity", "none"), "unknown option '--divresity'; did you mean '--diversity'?"),
    "unknown choice": (options("--dtype", "float16"), "--dtype float16: must be one of auto, float32, bfloat16"),
    "unknown selector": (options("--selector", "pharmacy"), "unknown selector 'pharmacy'; did you mean 'pharmacist'?"),
    "unknown selector option": (
        options("--selector.gama", "1"),
        "'--selector.gama'; did you mean '--selector.gamma'?",
    ),
    "selector option out of range": (options("--selector.gamma", "1"), "--selector.gamma 1: must lie in [0, 1)"),
    "unknown reader": (options("--selector.readers", "tea"), "selector.readers: 'tea' is not auto or any of lexical"),
    "columns of no format": (options("--columns", "question=q"), "columns: no row format has a column 'question'"),
    "columns that are not there": (options("--columns", "prompt=question"), "has no column 'question'"),
    "columns without =": (options("--columns", "question"), "--columns question: write it as prompt=question"),
    "negative length": (options("--max-length", "-1"), "--max-length -1: must not be negative"),
    "length 1": (options("--max-length", "1"), "max_length 1: a row needs at least 2 tokens"),
    "no config file": (config_file(None), "options.yaml: cannot be read (No such file or directory)"),
    "no YAML": (config_file("pool: [\n"), "options.yaml: not valid YAML"),
    "unknown key": (config_file("divresity: none\n"), "unknown key 'divresity'; did you mean 'diversity'?"),
    # --- references
    "harmful missing, twins on references alone": (
        options("--selector.form", "both", without="harmful"),
        "without harmful references the second twin learns from the pool alone, so selector.cotrain must be above 0; "
        "or give --harmful, or use --selector.form evidence",
    ),
    "harmful missing, pool without weight": (
        options("--selector.form", "both", "--selector.cotrain", "1", "--selector.gamma", "0", without="harmful"),
        "so selector.gamma must be above 0; or give --harmful",
    ),
    "harmful missing, in a mixture": (
        lambda folder, files: curate_words(
            {name: path for name, path in files.items() if name != "harmful"},
            folder / "out",
            "--selector",
            "pharmacist+length",
            "--selector.pharmacist.form",
            "both",
            "--selector.pharmacist.cotrain",
            "0",
        ),
        "so selector.cotrain must be above 0; or give --harmful",
    ),
    "nothing but safe references": (
        lambda folder, files: curate_words(
            {name: files[name] for name in ("pool", "safe")}, folder / "out", "--selector.readers", "lexical"
        ),
        "safe references alone offer no other answers to compare with; give --harmful or --utility, or use "
        "--selector.form bilevel",
    ),
    "safe missing": (options(without="safe"), "selector 'pharmacist' needs safe references; give --safe FILE"),
    "harmful = safe": (
        with_file("harmful", "h.jsonl", lambda files: lines_of(files["safe"])[::-1]),
        "--safe and --harmful hold the same rows, so they cannot be distinguished; check the two files",
    ),
    "utility = harmful": (
        with_file("utility", "u.jsonl", lambda files: lines_of(files["harmful"])),
        "--harmful and --utility hold the same rows, so they cannot be distinguished; check the two files",
    ),
    "too few": (
        with_file("safe", "s.jsonl", lambda files: lines_of(files["safe"])[:7]),
        "--safe: 7 rows are left, at least 8 are",
    ),
    "all of them ranked": (
        with_file("safe", "s.jsonl", lambda files: lines_of(files["pool"])[:20]),
        "--safe: every prompt also occurs in --pool",
    ),
    # --- models
    "no model": (options(model=None), "give --model"),
    "no name of a model": (
        text_pool("pool.jsonl", rows(), "--selector", "perplexity", "--model", ""),
        "the name of a model is empty; a model folder or a Hub id is needed",
    ),
    "a name too long": (options(model="a" * 300), "aaa: no such folder; a model folder or a Hub id is needed"),
    "no such model": (options(model="./nowhere"), "./nowhere: no such folder; a model folder or a Hub id is needed"),
    "no weights": (
        model_folder(lambda f: (f / "model.safetensors").unlink()),
        "without safetensors weights; save it with",
    ),
    "no config.json": (model_folder(lambda f: (f / "config.json").unlink()), "without config.json; save it with"),
    "half the weights": (model_folder(lambda f: cut_in_half(f / "model.safetensors")), "cannot be loaded as a causal"),
    "half a config": (model_folder(lambda f: cut_in_half(f / "config.json")), "cannot be loaded as a causal"),
    "no tokenizer": (
        model_folder(lambda f: [path.unlink() for path in f.glob("*token*")]),
        "cannot be loaded as a causal",
    ),
    "no end of sequence": (
        model_folder(no_eos),
        "has no end-of-sequence token, so no completion could end; set eos_token",
    ),
    "no language model": (model_folder(bert), "tensors of a causal language model are not in it (such as cls"),
    "part of a model": (model_folder(without_a_layer), "tensors of a causal language model are not in it (such as"),
    "no saved selector": (
        place(mine, "--resume-selector", "."),
        "no selector.json; --resume-selector needs the folder of",
    ),
}
if not torch.cuda.is_available():
    CASES["no GPU"] = (
        options("--device", "cuda"),
        "device cuda: no CUDA device is visible to torch; use the device cpu",
    )


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = CASES[case]
    words = make(tmp_path, files)
    output = Path(words[len(words) - 1 - words[::-1].index("--output-dir") + 1])
    capsys.readouterr()
    given = [tmp_path, *(Path(path) for path in files.values())]
    before = fingerprints(*given)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pharmacist curate: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err
    after = fingerprints(*given)
    if case == "nobody's score":  # everything was computed; it stays for a run that asks for less
        after = {path: content for path, content in after.items() if not f"{path}/".startswith(f"{output}/")}
    assert after == before


def test_after_bad_input_the_folder_is_free_for_mended_input(tmp_path: Path) -> None:
    bad = text_pool("pool.jsonl", rows("{"))(tmp_path, {})
    assert main([*bad, "--quiet"]) == 2
    good = text_pool("pool.jsonl", rows())(tmp_path, {})
    assert main([*good, "--quiet"]) == 0


def test_a_saved_selector_reads_with_its_own_model_only(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so with its own tokenizer; told before the pool is read."""
    assert main(curate_words(files, tmp_path / "a", *CHEAP, "--quiet")) == 0
    monkeypatch.setattr("pharmacist.pipeline.rows.read_records", lambda *_, **__: pytest.fail("the pool was read"))
    before = fingerprints(tmp_path / "a")
    words = ["--resume-selector", str(tmp_path / "a"), "--quiet"]
    pool = {"pool": files["pool"]}
    other = str(save_tiny_model(tmp_path / "model"))
    capsys.readouterr()
    assert main(curate_words(pool, tmp_path / "b", *words, model=other)) == 2
    line = capsys.readouterr().err
    assert "was trained on another model than" in line and line.count("\n") == 1
    assert main(curate_words(pool, tmp_path / "b", *words, model=None)) == 2
    assert "give --model" in capsys.readouterr().err
    (tmp_path / "a" / "selector" / "selector.json").write_text('{"selector": "other"}')
    assert main(curate_words(pool, tmp_path / "b", *words)) == 2
    line = capsys.readouterr().err
    assert "selector.json: is damaged, or was changed after" in line and line.count("\n") == 1
    shutil.copytree(tmp_path / "a" / "selector", tmp_path / "alone")
    assert main(curate_words(pool, tmp_path / "b", "--resume-selector", str(tmp_path / "alone"), "--quiet")) == 2
    line = capsys.readouterr().err
    assert "selector.json: not written by this version" in line and line.count("\n") == 1
    cut_in_half(next((tmp_path / "alone").rglob("evidence.safetensors")))
    assert main(curate_words(pool, tmp_path / "b", "--resume-selector", str(tmp_path / "alone"), "--quiet")) == 2
    assert "evidence.safetensors: is damaged; restore it" in capsys.readouterr().err
    after = fingerprints(tmp_path / "a")
    assert [path for path in before if before[path] != after[path]] == [str(tmp_path / "a/selector/selector.json")]
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


def test_a_line_of_50_megabytes_fills_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "pool.jsonl").open("wb") as file:
        file.write(rows().encode() + b'{"prompt": "x", "completion": "')
        for _ in range(50):
            file.write(b"y" * 2**20)
        file.write(b'"}\n' + rows().encode())
    words = curate_words({"pool": str(tmp_path / "pool.jsonl")}, tmp_path / "out", "--selector", "random", model=None)
    main([*words, "--help"])  # imports are not counted
    capsys.readouterr()
    tracemalloc.start()
    try:
        assert main(words) == 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "line 13 (row 12) is longer than 16 MB" in capsys.readouterr().err
    assert peak < 60 * 2**20
    assert main([*words, "--on-bad-row", "skip", "--quiet"]) == 0
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").open()]
    assert refused == [{"row": 12, "line": 13, "reason": "is longer than 16 MB"}]


def test_references_that_are_partly_ranked_are_left_out_and_counted(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranked = [row | {"prompt": f"  {row['prompt'].upper()}?"} for row in lines_of(files["pool"])[:5]]
    safe = write_rows(tmp_path / "safe.jsonl", ranked + lines_of(files["safe"]))
    words = curate_words(files | {"safe": safe}, tmp_path / "out", *CHEAP, "--selector.form", "evidence")
    assert main(words) == 0
    assert "--safe: 5 rows share a prompt with --pool and are left out" in capsys.readouterr().err
    counts = read_manifest(tmp_path / "out").counts
    assert (counts["references_safe"], counts["references_safe_left_out"]) == (16, 5)
    assert (counts["references_harmful"], counts["references_harmful_left_out"]) == (16, 0)


@pytest.mark.parametrize("damage", ["no pad token", "long prompt"])
def test_what_must_work(damage: str, files: dict[str, str], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    if damage == "no pad token":
        tiny_tokenizer(pad=False).save_pretrained(model)
    else:
        long = {"prompt": "bake bread " * 500, "completion": "no"}
        files = files | {"pool": write_rows(tmp_path / "pool.jsonl", [*GOOD, long])}
    assert main(curate_words(files, tmp_path / "out", *CHEAP, "--quiet", model=str(model))) == 0
    counts = read_manifest(tmp_path / "out").counts
    assert counts["ranked"] == counts["in"]
    assert counts["cut_prompts"] == (1 if damage == "long prompt" else 0)


OFFLINE = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pool", "somebody/some-pool"], "--pool somebody/some-pool: no such file or folder, and HF_HUB_OFF"),
        pytest.param(
            ["--model", "somebody/some-model"],
            "somebody/some-model: no such model folder, and as a Hub id: HF_HUB_OFF",
            marks=pytest.mark.slow,
        ),
        (["--safe", "{folder}/broken.jsonl"], "broken.jsonl: 1 row of 7 cannot be used: line 7 (row 6) is no"),
    ],
)
def test_bad_input_in_a_process_of_its_own(
    words: list[str], message: str, files: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD[:6]) + "{\n")
    words = [*curate_words(files, tmp_path / "out", *CHEAP), *(word.format(folder=tmp_path) for word in words)]
    before = fingerprints(tmp_path)
    done = subprocess.run([sys.executable, "-m", "pharmacist", *words], env=OFFLINE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert fingerprints(tmp_path) == before
