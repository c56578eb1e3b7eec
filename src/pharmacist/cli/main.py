"""Entry point: finds the command, reads its options, runs its stage, turns errors into exit codes."""

import os
import sys
import tempfile
import traceback
import warnings

from pharmacist import __version__
from pharmacist.core.config import parse
from pharmacist.core.console import plain
from pharmacist.core.errors import PharmacistError, one_line
from pharmacist.core.files import FULL_DISK
from pharmacist.core.registry import closest
from pharmacist.pipeline.commands import COMMANDS


_FULL_DISK_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing file",
    "unexpected pos ",
)
"""Messages of libraries (Rust, Arrow, torch) that raise no `OSError` where the disk is full."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    after = "`pharmacist COMMAND --help` shows its options and an example; `pharmacist --version` the version."
    return f"usage: pharmacist COMMAND [options]\n\ncommands:\n{commands}\n\n{after}"


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
        return 0 if arguments else _fail("pharmacist", "needs a command, such as: pharmacist demo --output-dir DIR", 2)
    if arguments[0] == "--version":
        print(f"pharmacist {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail("pharmacist", f"unknown command '{name}'{closest(name, COMMANDS)}", 2)
    command, where = COMMANDS[name], f"pharmacist {name}"
    options = None
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; warnings for users are printed by `warn`
    try:
        options = parse(command.options, rest, prog=where, example=command.example)
        command(options)
    except PharmacistError as error:
        return _fail(where, str(error), 2)
    except KeyboardInterrupt:
        after_echo = "\n" if sys.stderr.isatty() else ""  # the terminal has just shown ^C
        kept = "interrupted; what was finished is kept, run the same command again to resume"
        print(f"{after_echo}{where}: {kept}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help, or of a library
        return _fail(where, stop.code, 1) if isinstance(stop.code, str) else int(stop.code or 0)
    except PermissionError as error:
        return _fail(where, f"{error.filename or one_line(error)}: permission denied; check its permissions", 2)
    except Exception as error:
        output_dir = getattr(options, "output_dir", None)
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        if full or any(message in str(error) for message in _FULL_DISK_MESSAGES):
            folder = f"{output_dir}: " if output_dir else ""
            remedy = "free some space and run the same command again to resume"
            return _fail(where, f"{folder}the disk is full; {remedy}", 1)
        log = _write_log(output_dir)
        return _fail(where, f"{type(error).__name__}: {str(error)[:200]} (traceback in {log})", 1)
    return 0


def _write_log(output_dir: str | None) -> str:
    # Only in the folder of a run: a log alone would make a folder look like one with files of others.
    folder = output_dir if output_dir and os.path.isfile(os.path.join(output_dir, "manifest.json")) else None
    try:  # a new file, so that no link of this name is followed
        descriptor, path = tempfile.mkstemp(".log", f"pharmacist-error-{os.getpid()}-", folder)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(traceback.format_exc())
    except OSError:
        return "no file: the log could not be written"
    return path
