"""A stage's declaration: what identifies a run of it, and how a run begins and ends."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pharmacist.core.errors import ConfigError, DataError, OtherRunError
from pharmacist.core.manifest import read_manifest
from pharmacist.core.options import RunOptions
from pharmacist.core.progress import kept_warnings, warn
from pharmacist.core.typed import AtLeast1
from pharmacist.pipeline.commands import COMMANDS
from pharmacist.pipeline.stage import Stage


@dataclass(kw_only=True)
class BrewOptions(RunOptions):
    """Brew a potion."""

    stirs: AtLeast1 = 1
    """How often to stir."""
    kind: dict[str, Any] = field(default_factory=lambda: {"name": "soup"})
    """What it becomes."""
    loud: bool = False
    """Say more."""


BREW = Stage(
    name="brew",
    options=BrewOptions,
    run=f"{__name__}:brew",
    version=1,
    unidentifying=frozenset({"loud"}),
    costly=("work/**/*.txt",),
    early=("recipe.txt",),
)
SOUP = SimpleNamespace(identity=lambda: {"salt": 1})


def brew(options: BrewOptions, fail: str = "") -> bool:
    """Whether anything was done."""
    with BREW.open(options, inputs={"water": "1"}, methods={"kind": SOUP}) as run:
        for kettle in ("small", "small", "large")[: options.stirs - 1]:
            warn(f"the {kettle} kettle boils over")
        if run.complete:
            return False
        run.path("recipe.txt").write_text("water")
        if fail == "late":
            run.work("half.txt").write_text("half a potion")
        if fail:
            raise DataError("the water is bad")
        run.finish(outputs=["recipe.txt"])
    return True


def options(folder: Path, **more: Any) -> BrewOptions:
    return BrewOptions(output_dir=str(folder / "out"), **more)


def test_a_finished_run_is_told_and_identified_by_what_changes_results(tmp_path: Path, capsys: Any) -> None:
    assert BREW(options(tmp_path)) is True
    assert read_manifest(tmp_path / "out").config["kind"] == {"name": "soup", "salt": 1}, "defaults count too"
    assert brew(options(tmp_path, loud=True, quiet=True)) is False
    assert f"{tmp_path}/out: already complete; --overwrite runs it again" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out").config["loud"] is False
    with pytest.raises(OtherRunError, match="holds a run with other stirs"):
        brew(options(tmp_path, stirs=2))
    assert brew(options(tmp_path, stirs=2, overwrite=True)) is True


def test_the_manifest_keeps_the_warnings_of_its_own_run(tmp_path: Path, capsys: Any) -> None:
    with kept_warnings() as around:
        warn("it rains")
        with pytest.raises(DataError):
            brew(options(tmp_path), fail="late")
        assert brew(options(tmp_path, stirs=4, overwrite=True)) is True
    own = ["the small kettle boils over", "the large kettle boils over"]
    assert around == ["it rains"] and read_manifest(tmp_path / "out").warnings == own
    assert brew(options(tmp_path, stirs=4)) is False and read_manifest(tmp_path / "out").warnings == own
    assert capsys.readouterr().err.count("warning: ") == 1 + 3 + 3


def test_quiet_lasts_for_the_one_call(tmp_path: Path, capsys: Any) -> None:
    for quiet, told in ((False, ""), (True, ""), (False, "already complete")):
        BREW(options(tmp_path, quiet=quiet))
        err = capsys.readouterr().err
        assert told in err and bool(err) is bool(told)


def test_bad_input_frees_the_folder_unless_it_holds_costly_results(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        brew(options(tmp_path), fail="early")
    assert not any(tmp_path.iterdir())
    with pytest.raises(DataError):
        brew(options(tmp_path), fail="late")
    assert read_manifest(tmp_path / "out").status == "started" and (tmp_path / "out/work/half.txt").is_file()
    assert brew(options(tmp_path)) is True
    assert not (tmp_path / "out/work").exists()


def test_options_from_python_are_checked_by_their_types(tmp_path: Path) -> None:
    assert options(tmp_path).stirs == 1
    for value, message in ((0, "stirs must be at least 1, not 0"), ("much", "stirs must be a whole number, not much")):
        with pytest.raises(ConfigError, match=f"^{message}"):
            options(tmp_path, stirs=value)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_declared_by_a_stage_whose_function_is_there(name: str) -> None:
    stage = COMMANDS[name]
    assert callable(stage.function) and stage.summary and stage.options.__doc__
    known = {*stage.options.__dataclass_fields__}
    assert known >= {*stage.files, *stage.models, *stage.unidentifying, *stage.final, *stage.by_axes}
