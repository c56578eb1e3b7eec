"""Options that several commands share: of every run, of row files, of models."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from pharmacist.core.console import without_credentials
from pharmacist.core.typed import AtLeast0, Checked, Given, NotNegative, flag


@dataclass(kw_only=True)
class RunOptions(Checked):
    """Options that every command has."""

    output_dir: str
    """Folder for the results; a second run into it resumes, or says that it is complete."""
    seed: int = 0
    """Seed of every random stream."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen weights and the forward passes; auto is bfloat16 on a GPU, and on a CPU with
    AVX512-BF16 or AMX for models of 50M parameters or more that were saved in it (2 to 3 times as fast); else float32.
    """
    checkpoint_seconds: NotNegative = 30.0
    """Time between checkpoints of a training: what an interruption can cost at most; 0 saves after every step."""
    quiet: bool = False
    """No progress bars and no summary."""
    overwrite: bool = False
    """Delete the results of an earlier run in the output folder and start again."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"output_dir"})
    """Options whose text is a name, also where the output folder is called so; those of base classes count too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output_dir = os.path.expanduser(self.output_dir)

    @classmethod
    def option_name(cls, field: str) -> str:
        """A field as messages name it: the command line's option."""
        return flag(field)


@dataclass(kw_only=True)
class RowOptions:
    """How files of rows are read."""

    columns: str | None = None
    """Columns that stand for known ones, as prompt=question,completion=answer, in every file that has them."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with rows that cannot be used: fail names the first ten, skip leaves them out and counts them; curate
    also writes them to refused.jsonl."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"columns"})


@dataclass(kw_only=True)
class ChosenRowOptions(RowOptions):
    """How files of rows are read, and which of the rows."""

    where: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Only rows with these values, as --where label=true kind=advice: of each file that has the column, or of one, as
    harmful:is_safe=false."""


@dataclass(kw_only=True)
class ModelOptions:
    """How prompts are rendered and models are loaded."""

    template: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt template; auto is the one that was saved with the model, else its own, else Alpaca."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(kw_only=True)
class LengthOptions(ModelOptions):
    """Options of models that read whole rows."""

    max_length: AtLeast0 = 0
    """Longest row in tokens; 0 means the model's own limit."""


@dataclass(kw_only=True)
class TokenOptions(LengthOptions):
    """Options of models that read whole rows, none of which may lose its completion."""

    on_long_prompt: Literal["fail", "skip", "cut"] = "fail"
    """What to do with a row whose prompt alone fills the length; cut takes tokens from the prompt's middle."""


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
