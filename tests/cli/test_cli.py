"""The command line: exit codes, one line on standard error, help."""

import errno
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pharmacist
from pharmacist.cli import main as cli
from pharmacist.cli.main import COMMANDS, main
from pharmacist.core import files as core_files
from pharmacist.core.manifest import read_manifest
from pharmacist.core.registry import Registry
from pharmacist.defenses import DEFENSES
from pharmacist.pipeline import curate as stage
from pharmacist.repairs import REPAIRS
from pharmacist.selectors import SELECTORS
from tests.support.world_files import CHEAP, curate_words, write_rows, write_world


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def pool(files: dict[str, str]) -> dict[str, str]:
    return {"pool": files["pool"]}


def chance(pool: dict[str, str], output: Path, *more: str) -> list[str]:
    """The cheapest run: no model, no references."""
    return curate_words(pool, output, "--selector", "random", *more, model=None)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert "Traceback" not in captured.err
    return captured.err.rstrip()


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    usage, error = capsys.readouterr()
    assert error == "pharmacist: error: needs a command, such as: pharmacist demo --output-dir DIR\n"
    assert all(name in usage and command.summary in usage for name, command in COMMANDS.items())
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == usage


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pharmacist {pharmacist.__version__}\n"


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curat"]) == 2
    assert one_line(capsys) == "pharmacist: error: unknown command 'curat'; did you mean 'curate'?"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_options_and_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    example = COMMANDS[name].example
    assert f"example: {example}" in shown
    assert "--config FILE.yaml" in shown
    # The example is a line that the command understands.
    options = [word for word in shlex.split(example)[2:] if word.startswith("--")]
    assert all(option in shown for option in options)


HEAVY = "torch transformers peft datasets pandas scipy sklearn pyarrow".split()
"""Each takes a second or more to import, several of them half a dozen."""


def test_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from pharmacist.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    assert main([name, '--help']) == 0\n"
        f"    print(name, *(heavy for heavy in {HEAVY} if heavy in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (0, list(COMMANDS))


@pytest.mark.slow
def test_help_of_another_method_shows_its_own_options() -> None:
    """And loads what it works with: the modules above are seen where they are."""
    code = (
        "import sys; from pharmacist.cli.main import main; main(['curate', '--selector', 'seal', '--help'])\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--selector.auxiliary" in done.stdout and "--selector.cotrain" not in done.stdout
    assert done.stderr.splitlines()[-1] == "True"


@pytest.mark.parametrize("registry", [SELECTORS, DEFENSES, REPAIRS])
def test_options_that_lie_apart_are_those_of_the_method(registry: Registry[Any]) -> None:
    assert registry._options
    for name in registry._options:
        assert registry.config_type(name) is registry.get(name).Config


def test_examples_parse() -> None:
    from pharmacist.core.config import parse

    for command in COMMANDS.values():
        assert parse(command.options, shlex.split(command.example)[2:]) is not None


def test_done_is_0_and_the_result_is_said(
    pool: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(chance(pool, tmp_path / "my out")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""  # what people read goes to standard error
    assert "60 rows ranked, 18 selected" in captured.err
    selected = tmp_path / "my out" / "selected.jsonl"
    assert f"next: pharmacist align --data '{selected}' --model MODEL --output-dir DIR\n" in captured.err
    assert main(chance(pool, tmp_path / "my out")) == 0
    assert "already complete" in capsys.readouterr().err
    assert main(chance(pool, tmp_path / "quiet", "--quiet")) == 0
    assert "".join(capsys.readouterr()) == ""


def test_the_next_command_reads_the_columns_that_the_pool_has(
    pool: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ["--columns", "prompt=my question,completion=answer"]
    renamed = [{"my question": f"how do i hex cow {number}?", "answer": "i will not."} for number in range(20)]
    own = write_rows(tmp_path / "own.jsonl", renamed)
    assert main(chance({"pool": own}, tmp_path / "a", *columns)) == 0
    needed = "--columns 'prompt=my question,completion=answer'"
    assert f"align --data {tmp_path}/a/selected.jsonl {needed} --model" in capsys.readouterr().err
    assert main(chance(pool | {"safe": own}, tmp_path / "b", *columns)) == 0
    assert f"align --data {tmp_path}/b/selected.jsonl --model" in capsys.readouterr().err


def test_options_from_a_file(pool: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "curate.yaml"
    config.write_text(
        f"pool: {pool['pool']}\noutput_dir: {tmp_path / 'out'}\nselector: random\ntop: 5e-1\nquiet: true\n"
    )
    assert main(["curate", "--config", str(config), "--top", "0.1"]) == 0
    assert read_manifest(tmp_path / "out").counts["selected"] == 6
    assert main(["curate", "--config", str(config), "--output-dir", str(tmp_path / "other")]) == 0
    assert read_manifest(tmp_path / "other").counts["selected"] == 30


def test_bad_usage_is_2(pool: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate"]) == 2
    assert one_line(capsys).startswith("pharmacist curate: error: --pool and --output-dir must be given")
    assert main(chance(pool, tmp_path / "out", "--topk", "3")) == 2
    assert "unknown option '--topk'; did you mean '--top-k'?" in one_line(capsys)
    for given, near in (
        ("--max-steps", "--train.max_steps"),
        ("--per-device-train-batch-size", "--train.per_device_train_batch_size"),
        ("--epochs", "--train.num_train_epochs"),
        ("--alpha", "--lora.alpha' or '--train.neftune_noise_alpha"),
    ):
        assert main(["align", given, "3"]) == 2
        assert f"unknown option '{given}'; did you mean '{near}'?" in one_line(capsys)
    (tmp_path / "align.yaml").write_text("learning_rate: 0.1\n")
    assert main(["align", "--config", str(tmp_path / "align.yaml")]) == 2
    assert "unknown key 'learning_rate'; did you mean 'train.learning_rate'?" in one_line(capsys)
    (tmp_path / "align.yaml").unlink()
    assert main(chance(pool, tmp_path / "deep" / "out" / ("a" * 300))) == 2
    assert "cannot be written (File name too long)" in one_line(capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "given", "near"),
    [
        ("sweep", "--margin", "--accuracy-margin"),
        ("attack", "--ratio", "--poison-ratio"),
        ("curate", "--Dir", "--output-dir"),
        ("align", "--r", "--lora.r"),
        ("align", "--sede", "--seed"),
    ],
)
def test_an_option_with_the_given_word_is_nearer_than_one_spelled_alike(
    command: str, given: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, given, "1"]) == 2
    assert f"unknown option '{given}'; did you mean '{near}'?" in one_line(capsys)


def test_an_unexpected_failure_is_1_with_a_log(
    pool: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the spoon\nbroke")

    monkeypatch.setattr(stage, "find_duplicates", fail)
    assert main(chance(pool, tmp_path / "out", "--quiet")) == 1
    line = one_line(capsys)
    assert line.startswith("pharmacist curate: error: RuntimeError: the spoon broke (traceback in ")
    log = Path(line.rpartition(" in ")[2].rstrip(")"))
    assert log.parent == tmp_path / "out"
    assert "in fail" in log.read_text() and "RuntimeError: the spoon" in log.read_text()
    monkeypatch.undo()
    assert main(chance(pool, tmp_path / "out", "--quiet")) == 0  # and the folder is still good


@pytest.mark.parametrize(("code", "status"), [("no such luck", 1), (3, 3), (None, 0)])
def test_a_library_that_exits(
    code: object, status: int, pool: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(stage, "find_duplicates", stop)
    assert main(chance(pool, tmp_path / "out", "--quiet")) == status
    assert ("no such luck" in capsys.readouterr().err) == (status == 1)


@pytest.mark.parametrize("shut", ["out", "saved"])
def test_folders_of_other_users_are_bad_input(
    shut: str,
    pool: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def is_file(path: Path) -> bool:
        if path.parent == tmp_path / shut:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.path.isfile(path)

    (tmp_path / shut).mkdir()
    monkeypatch.setattr(Path, "is_file", is_file)
    given = {"pool": str(tmp_path / "saved")} if shut == "saved" else pool
    assert main(chance(given, tmp_path / "out", "--quiet")) == 2
    line = one_line(capsys)
    assert f"error: {tmp_path / shut}/" in line and line.endswith("permission denied; check its permissions")


def test_a_log_is_not_left_in_somebody_elses_folder(
    pool: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broke")

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(stage.CurateInputs, "fingerprints", fail)
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path))
    assert main(chance(pool, tmp_path / "mine")) == 1
    assert f"(traceback in {tmp_path}/pharmacist-error-" in one_line(capsys)
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_interruption_is_130_and_says_how_to_resume(
    pool: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "ranked_table", stop)
    assert main(chance(pool, tmp_path / "out", "--quiet")) == 130
    assert "interrupted; what was finished is kept, run the same command again to resume" in one_line(capsys)
    assert read_manifest(tmp_path / "out").status == "started"
    monkeypatch.undo()
    assert main(chance(pool, tmp_path / "out", "--quiet")) == 0
    assert read_manifest(tmp_path / "out").status == "success"


def test_ctrl_c(files: dict[str, str], tmp_path: Path) -> None:
    words = curate_words(
        files,
        tmp_path / "out",
        *CHEAP,
        "--selector.form",
        "bilevel",
        "--selector.twin_steps",
        "100000",
        "--checkpoint-seconds",
        "0",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pharmacist", *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs, and so their children, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 600
    while not list((tmp_path / "out").glob("work/twins/*/*.partial.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert out == b""
    assert err.count(b"\n") == 1 and b"run the same command again to resume" in err
    assert list((tmp_path / "out").glob("work/twins/*/*.partial.safetensors"))  # what was finished is kept


def test_a_full_disk_is_1_and_loses_nothing(
    pool: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = core_files.commit_file

    def full(temporary: Path, path: Path) -> None:
        if path.name == "scores.parquet":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(temporary, path)

    monkeypatch.setattr(core_files, "commit_file", full)
    assert main(chance(pool, tmp_path / "out", "--quiet")) == 1
    line = one_line(capsys)
    assert line.endswith(
        f"{tmp_path / 'out'}: the disk is full; free some space and run the same command again to resume"
    )
    assert not [path for path in (tmp_path / "out").iterdir() if "scores" in path.name or path.suffix == ".log"]
    monkeypatch.undo()
    assert main(chance(pool, tmp_path / "out", "--quiet")) == 0


def test_a_file_size_limit_is_a_full_disk(pool: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pharmacist", *chance(pool, tmp_path / "out")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "the disk is full" in done.stderr
    assert not (tmp_path / "out" / "scores.parquet").exists()


@pytest.mark.parametrize(
    ("size", "selector"), [("12k", "random"), ("40k", "random"), ("80k", "random"), ("1m", "random"), ("500k", "own")]
)
def test_a_disk_that_is_really_full(
    size: str, selector: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "mine").write_text("my own file")
        words = chance({"pool": files["pool"]}, disk / "out", "--quiet")
        if selector == "own":
            words = curate_words(files, disk / "out", *CHEAP, "--quiet")
        assert main(words) == 1
        assert f"{disk / 'out'}: the disk is full" in one_line(capsys)
        assert (disk / "mine").read_text() == "my own file"
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)  # space is freed
        assert main(words) == 0
        assert read_manifest(disk / "out").status == "success"
        elsewhere = [str(tmp_path / "out") if word == str(disk / "out") else word for word in words]
        assert main(elsewhere) == 0
        for name in ("scores.parquet", "selected.jsonl"):
            assert (disk / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
