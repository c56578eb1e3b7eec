"""The manifest: the record of a finished or started run in one JSON file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.hashing import sha256_file, sha256_json


SCHEMA_VERSION = 1
_FOR_PEOPLE = frozenset({"README.md", "log.jsonl", "report.html"})
"""Outputs with times and dates in them, which no other run reads."""


class Phase(BaseModel):
    """Cost of one phase of a run, summed over resumes."""

    seconds: float = 0.0
    tokens: int = 0
    extra: dict[str, Any] = Field(default_factory=dict)


class RunManifest(BaseModel):
    """Record of one run, written last and atomically, so that ``status == "success"`` means complete.

    A ``partial`` run has results, but some requests failed; the same command repeats these.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    stage: str
    status: Literal["started", "partial", "success"]
    key: str
    """sha256 of stage, stage version, identifying options and input fingerprints."""
    work_key: str = ""
    """The same without options that do not affect partial state; runs with the same value share partial state."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprint (sha256 of content) of each input, or its Hub id and revision."""
    counts: dict[str, int] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    phases: dict[str, Phase] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    """Reasons not to trust the results, as printed on the console."""
    outputs: list[str] = Field(default_factory=list)
    """Files and folders that make up the result."""
    files: dict[str, str] = Field(default_factory=dict)
    """Every output file -> sha256 of its content when the run was finished; for runs within the folder only their
    manifests, which contain the rest."""
    made_from: dict[str, str] = Field(default_factory=dict)
    """In a benchmark: stage -> `content` of the result from which this one was made."""
    created: str = ""
    finished: str = ""
    extra: dict[str, Any] = Field(default_factory=dict)
    """What only this stage records, such as a selector's report."""

    @property
    def content(self) -> str:
        """sha256 of the files of the result that other runs read; empty where the manifest does not list them."""
        read = {name: digest for name, digest in self.files.items() if Path(name).name not in _FOR_PEOPLE}
        return sha256_json(read) if read else ""

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json`` into `folder`, atomically."""
        write_json(folder / "manifest.json", self.model_dump(mode="json"))


def read_manifest(folder: str | Path) -> RunManifest:
    """Reads the manifest of a run folder; a DataError where there is none that this version can read."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder}: no manifest.json, so this is not the folder of a run; give the folder of one")
    try:
        content = read_json(path)
        # Before the validation, which refuses the further fields of a newer version.
        if not (isinstance(content, dict) and content.get("schema_version", 0) > SCHEMA_VERSION):
            return RunManifest.model_validate(content)
    except (ValidationError, DataError, TypeError) as error:
        detail = str(error.__cause__ or error).splitlines()[0]
        raise DataError(
            f"{path}: not a manifest that this version reads ({detail}); if it was, it is damaged: delete the folder"
        ) from error
    raise DataError(f"{path}: written by a newer version of pharmacist; update the package")


def options_in(folder: Path, manifest: RunManifest, *names: str) -> dict[str, Any]:
    """A run's options; a DataError where one of these names is not among them."""
    if missing := [name for name in names if name not in manifest.config]:
        raise DataError(f"{folder}: manifest.json lacks the option {missing[0]}; run the command again")
    return manifest.config


def output_files(folder: Path, outputs: list[str]) -> dict[str, str]:
    """`RunManifest.files` of a folder with these outputs."""
    found = sorted(file.relative_to(folder).as_posix() for output in outputs for file in _files(folder / output))
    return {name: sha256_file(folder / name) for name in found}


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif (path / "manifest.json").is_file():
        yield path / "manifest.json"
    elif path.is_dir() and not path.is_symlink():
        for part in path.iterdir():
            yield from _files(part)


def check_unchanged(folder: str | Path, *names: str) -> None:
    """Refuses outputs of a finished run that are no longer as they were written, by a DataError.

    `names` are files, or folders with all that is in them; missing ones, and folders without a run, are not looked at.
    """
    root = Path(folder)
    if not (root / "manifest.json").is_file():
        return
    manifest = read_manifest(root)
    for name, digest in manifest.files.items() if manifest.status == "success" else ():
        named = any(name == other or name.startswith(f"{other}/") for other in names)
        if named and (root / name).exists() and not ((root / name).is_file() and sha256_file(root / name) == digest):
            raise DataError(
                f"{root / name}: is damaged, or was changed after the run had finished; delete it, and run the "
                "command that writes it again"
            )


def missing_output(folder: str | Path, manifest: RunManifest) -> str | None:
    """The first file or folder of a finished run's outputs that is missing, of runs within it too."""
    root = Path(folder)
    for name in (*manifest.outputs, *manifest.files):
        path = root / name
        if not path.exists():
            return name
        if path.name == "manifest.json" and (lost := missing_output(path.parent, read_manifest(path.parent))):
            return f"{Path(name).parent}/{lost}"
    return None
