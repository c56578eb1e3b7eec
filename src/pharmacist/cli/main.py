"""Entry point: finds the command, reads its options, runs its stage, turns errors into exit codes."""

import os
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pharmacist import __version__
from pharmacist.core.console import plain
from pharmacist.core.errors import PharmacistError
from pharmacist.core.files import FULL_DISK
from pharmacist.core.progress import set_quiet
from pharmacist.core.registry import closest


@dataclass(frozen=True)
class Command:
    """One command: where its options and its function are, what it does, an example, and the name of its how-to page
    where that is not its own.
    """

    module: str
    options: str
    function: str
    summary: str
    example: str
    page: str | None = None


COMMANDS = {
    "demo": Command(
        "pharmacist.pipeline.demo",
        "DemoOptions",
        "demo",
        "the whole story on the embedded world, offline, in minutes",
        "pharmacist demo --output-dir runs/demo",
    ),
    "curate": Command(
        "pharmacist.pipeline.curate",
        "CurateOptions",
        "curate",
        "rank an alignment pool and write its core subset",
        "pharmacist curate --pool pool.jsonl --safe safe.jsonl --harmful harmful.jsonl --utility utility.jsonl "
        "--model MODEL --top 0.3 --output-dir runs/core",
    ),
    "label": Command(
        "pharmacist.pipeline.label",
        "LabelOptions",
        "label",
        "label the rows of a ranking that would teach it most, in a terminal",
        "pharmacist label runs/core --output labels.json",
        page="label-forty-rows",
    ),
    "align": Command(
        "pharmacist.pipeline.align",
        "AlignOptions",
        "align",
        "train on an alignment set with an alignment-stage defense",
        "pharmacist align --data runs/core/selected.jsonl --model MODEL --output-dir runs/aligned",
    ),
    "attack": Command(
        "pharmacist.pipeline.attack",
        "AttackOptions",
        "attack",
        "build a poisoned fine-tuning set and fine-tune on it",
        "pharmacist attack --model runs/aligned --task task.jsonl --harmful attack.jsonl --poison-ratio 0.1 "
        "--samples 1000 --output-dir runs/attacked",
    ),
    "sweep": Command(
        "pharmacist.pipeline.sweep",
        "SweepOptions",
        "sweep",
        "attack in many ways and report the worst case that keeps the task",
        "pharmacist sweep --model runs/aligned --task task.jsonl --harmful attack.jsonl --samples 640 "
        "--grid.learning_rate '[1e-4, 1e-3]' --grid.poison_ratio '[0.05, 0.1]' --evaluate.prompts prompts.jsonl "
        "--evaluate.task task-test.jsonl --evaluate.judge probe --evaluate.safe judge-safe.jsonl "
        "--evaluate.harmful judge-harmful.jsonl --output-dir runs/sweep",
    ),
    "repair": Command(
        "pharmacist.pipeline.repair",
        "RepairOptions",
        "repair",
        "take safety lost in fine-tuning back, without training",
        "pharmacist repair --model runs/attacked --aligned runs/aligned --method safe-lora --output-dir runs/repaired",
    ),
    "evaluate": Command(
        "pharmacist.pipeline.evaluate",
        "EvaluateOptions",
        "evaluate",
        "harmful score, fine-tune accuracy, over-refusal, with intervals",
        "pharmacist evaluate --model runs/attacked --prompts prompts.jsonl --judge probe --safe safe.jsonl "
        "--harmful harmful.jsonl --output-dir runs/scores",
    ),
    "bench": Command(
        "pharmacist.pipeline.bench",
        "BenchOptions",
        "bench",
        "a grid of selectors, defenses and attacks, every stage of it once",
        "pharmacist bench --config recipes/embedded.yaml --output-dir runs/bench",
    ),
    "report": Command(
        "pharmacist.pipeline.report",
        "ReportOptions",
        "report",
        "write the page of a finished folder again",
        "pharmacist report runs/core",
    ),
}

_FULL_DISK_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing file",
    "unexpected pos ",
)
"""What libraries that have no `OSError` of their own (Rust, Arrow, torch) say."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: pharmacist COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "`pharmacist COMMAND --help` shows its options and an example; `pharmacist --version` the version."]
    return "\n".join(lines)


def _fail(where: str, message: str, code: int) -> int:
    print(f"{where}: error: {plain(' '.join(message.split()))}", file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done; 1 an unexpected failure, with the traceback in a log file; 2 bad usage or bad input; 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"pharmacist {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail("pharmacist", f"unknown command '{name}'{closest(name, COMMANDS)}", 2)
    command, where = COMMANDS[name], f"pharmacist {name}"
    options = None
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries among themselves; what a user has to know, we say
    try:
        from pharmacist.core.config import parse

        module = import_module(command.module)
        options = parse(getattr(module, command.options), rest, prog=where, example=command.example)
        set_quiet(getattr(options, "quiet", False))
        getattr(module, command.function)(options)
    except PharmacistError as error:
        return _fail(where, str(error), 2)
    except KeyboardInterrupt:
        after_echo = "\n" if sys.stderr.isatty() else ""  # the terminal has just shown ^C
        kept = "interrupted; what was finished is kept, run the same command again to resume"
        print(f"{after_echo}{where}: {kept}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except Exception as error:
        output_dir = getattr(options, "output_dir", None)
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        if full or any(message in str(error) for message in _FULL_DISK_MESSAGES):
            place = f"{output_dir}: " if output_dir else ""
            remedy = "free some space and run the same command again to resume"
            return _fail(where, f"{place}the disk is full; {remedy}", 1)
        log = _write_log(output_dir)
        return _fail(where, f"{type(error).__name__}: {str(error)[:200]} (traceback in {log})", 1)
    return 0


def _write_log(output_dir: str | None) -> str:
    # Only beside a run of ours: a log alone in a folder would make it look like somebody else's.
    beside = output_dir is not None and (Path(output_dir) / "manifest.json").is_file()
    folder = output_dir if beside else None
    try:  # a new file, so that nothing that somebody put there under this name is written through
        descriptor, path = tempfile.mkstemp(".log", f"pharmacist-error-{os.getpid()}-", folder)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(traceback.format_exc())
    except OSError:
        return "no file: the log could not be written"
    return path
