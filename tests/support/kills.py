"""Runs that are killed at any moment and started again, until they leave what an undisturbed one leaves."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from pharmacist.cli.main import main
from pharmacist.core import files as core_files
from pharmacist.core.manifest import read_manifest
from tests.support.world_files import fingerprints


DISTURBED = {"report.html", "log.jsonl", "README.md"}


def run(words: list[str], last_file: int, half_written: bool, count: Path | None) -> None:
    """In a process of its own: one command, killed when it is about to rename, or has just renamed, its n-th file."""
    real, made = core_files.commit_file, 0

    def commit(temporary: Path, path: Path) -> None:
        nonlocal made
        made += 1
        if made == last_file and half_written:
            os.kill(os.getpid(), signal.SIGKILL)
        real(temporary, path)
        if made == last_file:
            os.kill(os.getpid(), signal.SIGKILL)

    core_files.commit_file = commit
    code = main(words)
    if count is not None:
        count.write_text(str(made))
    sys.exit(code)


def start(
    forks: ForkServerContext,
    words: list[str],
    last_file: int = 0,
    half_written: bool = False,
    count: Path | None = None,
) -> BaseProcess:
    process = forks.Process(target=run, args=(words, last_file, half_written, count))
    process.start()
    return process


def undisturbed(forks: ForkServerContext, words: list[str], output: Path) -> tuple[dict[str, str | None], float, int]:
    """What a run leaves, how long it takes, and how many files it makes."""
    begin, count = time.monotonic(), output.with_name("count")
    process = start(forks, words, count=count)
    process.join()
    assert process.exitcode == 0
    return results(output), time.monotonic() - begin, int(count.read_text())


def results(output: Path) -> dict[str, str | None]:
    """Fingerprints of everything but what holds times, or averages since the last resume."""
    found = {os.path.relpath(path, output): content for path, content in fingerprints(output).items()}
    assert found.pop("manifest.json")
    return {path: content for path, content in found.items() if Path(path).name not in DISTURBED}


def kill_until_done(
    forks: ForkServerContext, words: list[str], output: Path, kills: Iterator[float], expected: dict[str, str | None]
) -> int:
    """Starts a run again and again, killed after the given seconds each time; returns how often it was killed."""
    killed = 0
    for seconds in kills:
        process = start(forks, words)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        assert not (output / "manifest.json").exists() or read_manifest(output).status in ("started", "success")
    process = start(forks, words)
    process.join()
    assert process.exitcode == 0
    assert results(output) == expected
    return killed
