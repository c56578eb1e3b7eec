"""Labels of the rows that a ranking asks for: by a person in a terminal (`label`), or known before (in a grid)."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import Any

import pandas as pd

from pharmacist.core.console import plain
from pharmacist.core.env import process_index
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import read_json_lines
from pharmacist.core.hashing import sha256_file
from pharmacist.nn.distributed import barrier
from pharmacist.pipeline.pages import ranking_manifest, read_table
from pharmacist.pipeline.stages.curate import KNOWN_LABELS, KnownLabelsOptions, LabelOptions
from pharmacist.report import words
from pharmacist.selectors.labels import REASON_OF, labels_of, read_entries, write_labels


_SKIP, _UNDO, _QUIT = _OTHERS = ("skip", "undo", "quit")


def known_labels(options: KnownLabelsOptions) -> Path:
    """Writes ``labels.json`` with the known labels of the rows of ``to_label.jsonl``, and returns its path.

    Raises:
        DataError: The ranking asks for none, or a row that it asks for has no label.
    """
    pool, asked, scores = _asked(Path(options.ranking))
    inputs = {"to_label": sha256_file(Path(options.ranking) / "to_label.jsonl"), "labels": sha256_file(options.labels)}
    with KNOWN_LABELS.open(options, inputs=inputs) as run:
        path = run.path("labels.json")
        if process_index() == 0 and not run.complete:
            with run.phase("label"):
                known = read_entries(options.labels, pool, scores["row"].to_numpy(), where=f"labels {options.labels}")
                rows = [row["row"] for row in asked]
                if missing := [row for row in rows if row not in known]:
                    raise DataError(f"labels {options.labels}: row {missing[0]} has none; label every row of the pool")
                write_labels(path, pool, {row: known[row] for row in rows})
            run.finish(outputs=[path.name], counts={"labels": len(rows)})
        barrier()
        return path


def label(options: LabelOptions) -> dict[int, str]:
    """Asks for a label of each row of ``to_label.jsonl`` that has none, and writes the labels to ``--output``.

    A text is shown only when an empty line asks for it.

    Returns:
        Row number -> label, those of earlier sessions included.

    Raises:
        ConfigError: The output lies in the run's folder or cannot be written, or there is no terminal.
        DataError: The folder is no finished ranking with rows to label, or the output holds something else.
    """
    folder, output = Path(options.run), Path(os.path.expanduser(options.output))
    pool, asked, scores = _asked(folder)
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(folder)):
        raise ConfigError(f"--output {output}: lies in the run's folder, which --overwrite empties; choose another")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; give the name of a file, such as {output / 'labels.json'}")
    # The labels that the ranking was made with, overruled by those in the output.
    labels = labels_of(scores)
    if output.exists():
        labels |= read_entries(output, pool, scores["row"].to_numpy(), where=f"--output {output}")
    if not sys.stdin.isatty():
        raise ConfigError("standard input is not a terminal; use a terminal, or label the rows in report.html")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror}); choose another file") from error
    width = max(map(len, REASON_OF))
    _say(f"{len(asked)} rows to label; answer with a label or its first letter, then Enter.")
    _say(*(f"  {name:<{width}}  {words.REASONS[reason].meaning}" for name, reason in REASON_OF.items()))
    _ask(asked, labels, keep=lambda: write_labels(output, pool, labels))
    given = quote(str(output))
    kept = f"labels in {output}; give them to the command that made the ranking: --labels {given}"
    _say(kept if output.is_file() else "nothing was written")
    return labels


def _asked(folder: Path) -> tuple[str, list[Any], pd.DataFrame]:
    """Of a finished ranking: fingerprint of its pool, lines of ``to_label.jsonl``, and ``scores.parquet``."""
    pool = ranking_manifest(folder).inputs["pool"]
    if not (folder / "to_label.jsonl").is_file():
        raise DataError(
            f"{folder}: no to_label.jsonl; rank with the selector pharmacist, of form evidence or both, and not with "
            "--to-label 0"
        )
    return pool, read_json_lines(folder / "to_label.jsonl"), read_table(folder / "scores.parquet", "row")


def _ask(asked: Sequence[Any], labels: dict[int, str], keep: Callable[[], None]) -> None:
    """Asks for labels of the rows without one, in order; `keep` is called whenever `labels` has changed."""
    waiting = [row for row in asked if row["row"] not in labels]
    past: list[bool] = []  # whether a label was given, per row of `waiting` that has been asked
    shown: Any = None  # the row that was shown last
    while len(past) < len(waiting):
        row = waiting[len(past)]
        done = sum(one["row"] in labels for one in asked)
        hidden = f"row {row['row']}, {done} of {len(asked)} labelled: Enter shows it"
        said = _answer(f"{', '.join(REASON_OF) if shown is row else hidden}, or skip, undo, quit > ")
        if said is None or (said and _QUIT.startswith(said)):
            return
        if not said:
            if shown is not row:
                _show(row)
            shown = row
        elif _UNDO.startswith(said):
            if not past:
                _say("nothing to undo")
                continue
            shown = None
            if past.pop():
                del labels[waiting[len(past)]["row"]]
                keep()
        elif _SKIP.startswith(said):
            past.append(False)
        elif found := [name for name in REASON_OF if name.startswith(said)]:
            if shown is not row:
                _say("not seen yet; Enter shows it")
                continue
            labels[row["row"]] = found[0]
            keep()
            past.append(True)
        else:
            _say(f"'{plain(said)}' is none of {', '.join((*REASON_OF, *_OTHERS))}")
    skipped = past.count(False)
    _say(f"all rows are done{f', {skipped} of them skipped' if skipped else ''}")


def _say(*lines: str) -> None:
    for line in lines:
        _write(plain(line) + "\n")


def _show(row: Any) -> None:
    """Shows a row; its text can neither control the terminal nor look like a line of the program."""
    for name in ("prompt", "completion"):
        lines = plain(row[name], lines=True).split("\n")
        _write("".join([f"{name}:\n", *(f"  | {line}\n" for line in lines)]))


def _answer(prompt: str) -> str | None:
    """The person's answer in lower case; None at the end of the input."""
    _write(prompt)
    line = sys.stdin.readline()
    return line.strip().lower() if line else None


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
