"""Options that several commands share: of every run, of row files, of models."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from pharmacist.core.console import without_credentials
from pharmacist.core.errors import ConfigError
from pharmacist.core.typed import AtLeast0, Checked, Given, NotNegative


@dataclass(kw_only=True)
class RunOptions(Checked):
    """Options that every command has."""

    output_dir: str
    """Folder for the results; a second run into the same folder resumes, or says that the run is complete."""
    seed: int = 0
    """Seed of all random number generators."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that the model runs on."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the frozen weights and the forward passes. auto is bfloat16 on a GPU, and also (2 to 3 times as
    fast) on a CPU with AVX512-BF16 or AMX, for models saved in bfloat16 with 50M parameters or more; otherwise
    float32.
    """
    checkpoint_seconds: NotNegative = 30.0
    """Seconds between checkpoints of a training, the most that an interruption can cost; 0 saves after every step."""
    quiet: bool = False
    """Print no progress bars and no summary."""
    overwrite: bool = False
    """Delete the results of an earlier run in the output folder and start again."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"output_dir"})
    """Options whose text is a name, also where the output folder is called so; those of base classes count too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "://" in self.output_dir:
            raise ConfigError(f"--output-dir {self.output_dir}: must be a folder, such as one that all machines share")
        self.output_dir = os.path.expanduser(self.output_dir)


@dataclass(kw_only=True)
class RowOptions:
    """How files of rows are read."""

    columns: str | None = None
    """Other column names, such as prompt=question,completion=answer, in every file that has these columns."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with rows that cannot be used: fail stops and names the first ten; skip leaves them out and counts
    them, and curate also writes them to refused.jsonl."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"columns"})


@dataclass(kw_only=True)
class ChosenRowOptions(RowOptions):
    """How files of rows are read, and which of the rows."""

    where: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Only use rows with these values, such as --where label=true kind=advice, in each file that has the column, or in
    one file, such as harmful:is_safe=false."""


@dataclass(kw_only=True)
class ModelOptions:
    """How prompts are rendered and models are loaded."""

    template: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt template; auto is the template saved with the model, else its chat template, else Alpaca."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""


@dataclass(kw_only=True)
class LengthOptions(ModelOptions):
    """Options of models that read whole rows."""

    max_length: AtLeast0 = 0
    """Longest row in tokens; 0 means the model's own limit."""


@dataclass(kw_only=True)
class TokenOptions(LengthOptions):
    """Options of models that read whole rows, none of which may lose its completion."""

    on_long_prompt: Literal["fail", "skip", "cut"] = "fail"
    """What to do with a row whose prompt alone fills the maximum length; cut removes tokens from the middle of the
    prompt."""


_UNIDENTIFYING = frozenset({"output_dir", "checkpoint_seconds", "quiet", "overwrite"})


def as_json(options: RunOptions) -> dict[str, Any]:
    """The options of a stage as JSON for the manifest: addresses are without credentials."""
    config = {field.name: getattr(options, field.name) for field in fields(options)}
    text = json.dumps(config, default=lambda v: v.label if isinstance(v, Given) else asdict(v), allow_nan=False)

    def clean(options: dict[str, Any]) -> dict[str, Any]:
        url = options.get("base_url")
        return options | {"base_url": without_credentials(url)} if isinstance(url, str) else options

    found: dict[str, Any] = json.loads(text, object_hook=clean)
    return found


def identifying(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a stage that can change its results."""
    return {name: value for name, value in config.items() if name not in _UNIDENTIFYING}
