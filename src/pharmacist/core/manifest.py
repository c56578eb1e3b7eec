"""The manifest: what a finished (or started) run was, in one JSON file."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json, write_json


SCHEMA_VERSION = 1


class Phase(BaseModel):
    """Cost of one phase of a run, summed over resumes."""

    seconds: float = 0.0
    tokens: int = 0
    extra: dict[str, Any] = Field(default_factory=dict)


class RunManifest(BaseModel):
    """Record of one run; written last and atomically, so that ``status == "success"`` means complete.

    ``partial`` has results too, but some of what was asked for failed on the way; the same run asks for that again.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    stage: str
    status: Literal["started", "partial", "success"]
    key: str
    """sha256 of stage, stage version, options that matter and input fingerprints."""
    work_key: str = ""
    """The same without options that only matter once all is computed: runs that share it share partial state."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprint (sha256 of content) of each input, or its hub id and revision."""
    counts: dict[str, int] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    phases: dict[str, Phase] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    outputs: list[str] = Field(default_factory=list)
    created: str = ""
    finished: str = ""
    extra: dict[str, Any] = Field(default_factory=dict)
    """What only this stage records, such as a selector's report."""

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json`` into `folder`, atomically."""
        write_json(folder / "manifest.json", self.model_dump(mode="json"))


def read_manifest(folder: str | Path) -> RunManifest:
    """Reads the manifest of a run folder.

    Raises:
        DataError: There is none, or it was written by another program or a newer version.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder}: no manifest.json, so this is no run's folder; give the --output-dir of one")
    try:
        manifest = RunManifest.model_validate(read_json(path))
    except (ValidationError, ValueError) as error:
        detail = str(error).splitlines()[0]
        raise DataError(f"{path}: not a manifest that this version reads ({detail})") from error
    if manifest.schema_version > SCHEMA_VERSION:
        raise DataError(f"{path}: written by a newer version of pharmacist; update the package")
    return manifest
