"""The stages of a ranking: `curate`, `rank` (from Python, without files), `select`, and labels of its rows."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from pharmacist.core.config import method
from pharmacist.core.errors import ConfigError
from pharmacist.core.options import ChosenRowOptions, LengthOptions, RunOptions
from pharmacist.core.typed import AtLeast0, AtLeast1, Share
from pharmacist.pipeline.stage import Stage


REFERENCES = ("safe", "harmful", "utility")
Diversity = Literal["none", "near-duplicates", "k-center", "facility-location"]
SPREAD = frozenset({"k-center", "facility-location"})
"""Diversities that need distances between rows."""


@dataclass(kw_only=True)
class CurateOptions(RunOptions, ChosenRowOptions, LengthOptions):
    """Rank an alignment pool and write its core subset."""

    pool: str
    """Rows to rank: .jsonl, .json, .csv (each also .gz, .zst) or .parquet, a folder saved by datasets, or a Hub id."""
    safe: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Safe references: harmful prompt, refusal. Of a preference file, the chosen answers are used. Several files count
    as several sources; if every kind of references has several, one at a time is held out."""
    harmful: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Harmful references: harmful prompt, harmful answer. Of a preference file, the rejected answers are used."""
    utility: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Utility references: benign prompt, helpful answer. They help to detect over-refusals."""
    labels: str | None = None
    """Human labels of some rows of the pool (labels.json), from the HTML report or `pharmacist label`. The selector
    pharmacist learns from them, and updates a finished ranking in seconds; with every selector, no row labelled bad is
    selected."""
    to_label: AtLeast0 = 40
    """Number of rows to write to to_label.jsonl, those whose labels are most informative; 0 writes none."""
    model: str | None = None
    """Model that reads the pool: a local folder or Hub id. It need not be the model that is aligned later."""
    selector: dict[str, Any] = method("pharmacist", "pharmacist.selectors:SELECTORS")
    """How rows are ranked; a+b ranks by the mean of the ranks by several selectors."""
    resume_selector: str | None = None
    """Folder selector/ of an earlier curate, whose trained selector scores this pool without training."""
    top: Share | None = None
    """Share of the ranked rows to select, in (0, 1]; 0.3 if none of --top, --top-k and --min-score is given."""
    top_k: AtLeast1 | None = None
    """Number of rows to select."""
    min_score: float | None = None
    """Select the rows with at least this score."""
    fill: bool = False
    """Fill --top or --top-k with rows whose own reason speaks against them if there are too few others."""
    diversity: Diversity = "none"
    """near-duplicates: never select a near-duplicate of a higher-ranked row; k-center, facility-location: select rows
    that cover the best-ranked ones, instead of the very best."""
    diversity_margin: Annotated[float, Ge(1)] = 1.5
    """k-center and facility-location choose from this many times as many best-ranked rows as are selected."""
    balance: str | None = None
    """Column of the pool, such as category or source, whose values should all remain in the core subset."""
    balance_share: Share = 0.5
    """Each value of the column keeps at least this share, in (0, 1], of the rows that it would have in a proportional
    sample, and at least one row; 1 is a stratified selection."""
    duplicate_threshold: Share = 0.8
    """Jaccard similarity of word shingles from which two rows are near-duplicates."""
    format: Literal["jsonl", "input"] = "jsonl"
    """Format of the selected rows: JSON lines, or the format of the input (JSON lines if the input is not a file)."""
    embedder: str | None = None
    """Folder or Hub id of a sentence-transformers model that measures distances between rows, for selectors and
    --diversity; without it, the hidden states of --model are used. Needs the extra embeddings."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"balance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("top", "top_k", "min_score") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
        check_min_score(self.min_score, self.diversity, self.balance is not None)


def check_min_score(min_score: float | None, diversity: str, balance: bool) -> None:
    """Raises a ConfigError where rows are to be selected by their score and by something that a score cannot heed."""
    if min_score is not None and (balance or diversity in SPREAD):
        option = "--balance" if balance else f"--diversity {diversity}"
        raise ConfigError(f"--min-score selects every row that reaches it, so {option} has no effect; leave one out")


CURATE = Stage(
    name="curate",
    options=CurateOptions,
    summary="rank an alignment pool and write its core subset",
    example="pharmacist curate --pool pool.jsonl --safe safe.jsonl --harmful harmful.jsonl --utility utility.jsonl "
    "--model MODEL --top 0.3 --output-dir runs/core",
    version=8,
    files=("pool", *REFERENCES, "labels"),
    models=("model",),
    folders=("embedder",),
    final=frozenset("top top_k min_score fill diversity diversity_margin balance balance_share".split())
    | {"format", "labels", "to_label"},
    final_inputs=frozenset({"labels"}),
    costly=("work/**/*.safetensors",),
    again="ranks again",
    by_axes=frozenset("pool selector resume_selector top top_k min_score fill format labels".split()) | {*REFERENCES},
)
RANK = replace(CURATE, name="rank", run="pharmacist.pipeline.curate:rank", final_inputs=frozenset())


@dataclass(kw_only=True)
class SelectOptions(RunOptions):
    """Write the top of a ranking."""

    ranking: str
    """Folder of a finished curate."""
    top: Share = 0.3
    """Share of the ranked rows to select, in (0, 1]."""
    fill: bool = True
    """Fill the share with rows whose own reason speaks against them if there are too few others."""


SELECT = Stage(
    name="select", options=SelectOptions, run="pharmacist.pipeline.curate:select", version=3, files=("ranking",)
)


@dataclass(kw_only=True)
class LabelOptions:
    """Label the rows of a ranking whose labels are most informative, in a terminal."""

    run: str = field(metadata={"first": True})
    """Folder of a finished curate; as the first argument it needs no --run."""
    output: str = "labels.json"
    """File of labels, written after each label; an existing file is continued."""


LABEL = Stage(
    name="label",
    options=LabelOptions,
    summary="label the most informative rows of a ranking, in a terminal",
    example="pharmacist label runs/core --output labels.json",
    page="label-forty-rows",
)


@dataclass(kw_only=True)
class KnownLabelsOptions(RunOptions):
    """Take the labels of the rows that a ranking suggests from known labels of the pool."""

    ranking: str
    """Folder of a finished curate with rows to label."""
    labels: str
    """Human labels of every row of its pool: labels.json, as curate reads it."""


KNOWN_LABELS = Stage(
    name="label",
    options=KnownLabelsOptions,
    run="pharmacist.pipeline.label:known_labels",
    version=1,
    files=("ranking", "labels"),
)
