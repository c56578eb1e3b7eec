"""What users, models and servers write is shown as it is: no markup, no escapes, no line that poses as ours."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from pharmacist.cli.main import COMMANDS, main
from pharmacist.core import progress
from pharmacist.core.console import markdown, plain
from pharmacist.core.progress import bar, console
from tests.support.server import Raw, serve
from tests.support.tiny import save_tiny_model


EVIL = "[/] [bold]a[/bold] \x1b[2J\x1b]8;;http://x\x07b\x9b31m \u202ec :smile: [link=x]d"
LINES = EVIL + "\nmetrics: all is well\r\x08"


def harmless(text: str) -> bool:
    """Whether a terminal shows a text and does nothing else; ends of lines are ours."""
    control = r"\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff"
    unseen = r"\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f"
    return not re.search(f"[{control}{unseen}]", text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal with colours and links would get."""
    console.cache_clear()
    progress._progress.cache_clear()
    monkeypatch.setenv("FORCE_COLOR", "1")
    console().file = out = io.StringIO()
    yield out
    console.cache_clear()
    progress._progress.cache_clear()


def test_plain_spells_out_what_does_not_show() -> None:
    assert plain("a\x1b[2J\n\u202e\ud800\u2028\U000e0041") == "a\\x1b[2J\\n\\u202e\\ud800\\u2028\\U000e0041"
    assert plain("día, नमस्ते, می\u200cخواهم, 👩\u200d🔬") == "día, नमस्ते, می\u200cخواهم, 👩\u200d🔬"
    assert plain(7) == "7" and plain("a\nb\tc", lines=True) == "a\nb\tc"
    assert all(harmless(plain(chr(code))) for code in range(0x3000))
    assert plain(plain(LINES)) == plain(LINES)


def test_markdown_makes_no_markup() -> None:
    assert markdown("a|b*c*`d`[e](f)<g>&\n# h") == "a\\|b\\*c\\*\\`d\\`\\[e\\](f)&lt;g&gt;&amp;\\\\n# h"
    assert markdown("toxic_lora __x__") == "toxic_lora \\_\\_x\\_\\_"


def test_the_console_shows_texts_tables_and_bars_as_they_are(terminal: io.StringIO) -> None:
    table = Table(title=EVIL)
    table.add_column(EVIL, no_wrap=True)
    table.add_row(EVIL)
    console().print(EVIL, soft_wrap=True)
    console().print(table, soft_wrap=True)
    with bar(LINES, 1) as progressing:
        progressing.advance()
    found = terminal.getvalue()
    assert found.count("[/] [bold]a[/bold]") >= 3 and ":smile:" in found
    for hostile in ("\x1b[2J", "\x1b]8", "\x07", "\x9b", "\u202e"):
        assert hostile not in found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_hostile_values_in_one_harmless_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = LINES.replace("/", "")
    for words in (["--config", hostile], [f"--{hostile}"], ["--output-dir", str(tmp_path / "o"), "--seed", hostile]):
        assert main([name, *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and harmless(error), words


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([LINES]) == 2
    assert harmless(capsys.readouterr().err)


def evaluated(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["evaluate", "--output-dir", str(folder / "o[/]"), *words]) == 0
    told = capsys.readouterr().err
    assert harmless(told) and "\nmetrics: all is well" not in told
    assert "metrics " in "".join(told.splitlines()[-3:]), "all of it is said"
    return told


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_models_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"how {word}"} for word in ("a", "b", "c")])
    refused = Raw(json.dumps({"error": {"message": LINES}}).encode(), 400)
    said = {"a": f"I cannot help with that. {LINES}", "b": refused, "c": f"take the root {LINES}"}
    with serve(lambda question, before: said[question[-1]]) as served:
        words = ["--engine", "openai", "--base-url", served.url, "--engine.attempts", "1", "--prompts", prompts]
        told = evaluated(tmp_path, ["--model", LINES, *words, "--show-harmful"], capsys)
        assert "I cannot help with that. [/] [bold]a[/bold] \\x1b[2J" in told and "1 x HTTP 400: [/] [bold]a" in told


def test_labels_and_columns_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    rows = [{"prompt": "tell me", "completion": label} for label in (LINES, "x") * 2]
    words = ["--model", str(model), "--device", "cpu", "--max-new-tokens", "2"]
    task = ["--task", write(tmp_path / "t.jsonl", rows), "--task-type", "classification"]
    told = evaluated(tmp_path, [*words, *task], capsys)
    assert "no answer is one of the labels [/] [bold]a" in told
    bad = write(tmp_path / "bad.jsonl", [{LINES: "x"}])
    assert main(["evaluate", *words, "--prompts", bad, "--output-dir", str(tmp_path / "p")]) == 2
    assert harmless(capsys.readouterr().err)
