"""The stage `evaluate`, and the two further forms that it has."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.errors import ConfigError
from pharmacist.core.options import ModelOptions, RowOptions, RunOptions
from pharmacist.core.typed import AtLeast0, AtLeast1, flag
from pharmacist.pipeline.stage import Stage
from pharmacist.pipeline.stages.curate import REFERENCES as REFERENCES


PROMPTS = ("prompts", "benign_prompts", "task")
GENERAL = ("perplexity", "margin", "lm_eval")
"""Options of metrics that need weights and no answers."""


@dataclass(kw_only=True)
class EvaluateOptions(RunOptions, RowOptions, ModelOptions):
    """Measure harmful score, over-refusal and fine-tune accuracy of a model."""

    model: str = ""
    """Model to evaluate: local folder, the folder of an earlier align or attack, a hub id, or what an endpoint calls
    it."""
    models: list[str] | None = field(default=None, metadata={"nargs": "+"})
    """Instead of --model: several, such as base, aligned and attacked. Each is evaluated into a subfolder of the
    output folder, and one table shows their figures.
    """
    prompts: str | None = None
    """Harmful prompts: rows with a prompt, in any format that curate reads; completions are not read. Or a set by
    name: beavertails, beavertails-first500, beavertails-first1000, harmbench, advbench, strongreject; NAME:FILE takes
    its authors' file."""
    benign_prompts: str | None = None
    """Benign prompts that look harmful; refusing them is over-refusal. A file, xstest or xstest:FILE."""
    answers: str | None = None
    """Instead of --model and prompts: rows with prompt and answer, which are judged as they are. An answer that is
    null is unscored.
    """
    task: str | None = None
    """Test rows of the fine-tuning task: prompt and right completion. Or a task by name: sst2, agnews, gsm8k."""
    task_type: dict[str, Any] = method("auto", "pharmacist.evaluation.graders:TASK_TYPES")
    """How answers to the task are graded; auto tells classification, exact and number by the completions. win-rate
    asks a judging model which is better, the answer or the completion."""
    engine: dict[str, Any] = method("transformers", "pharmacist.evaluation.engines:ENGINES", short=("base_url",))
    """Where answers come from: a model loaded here, or one behind an OpenAI-compatible endpoint, whose address may be
    given as --base-url too."""
    judge: dict[str, Any] = method("keyword", "pharmacist.evaluation.judges:JUDGES")
    """The judge that decides whether an answer is harmful and whether it is a refusal. A second run into the same
    folder with another judge reuses the answers.
    """
    second_judge: dict[str, Any] = method("none", "pharmacist.evaluation.judges:SECOND_JUDGES")
    """Judges the same answers too, to measure the agreement of the two."""
    safe: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Safe references on which a judge such as probe is trained: harmful prompt, refusal. A preference file gives its
    chosen side. Several files count as several sources, of which one at a time is held out where every kind of
    references has several."""
    harmful: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Harmful references for the judge: harmful prompt, harmful answer. A preference file gives its rejected side."""
    utility: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Utility references for the judge: benign prompt, helpful answer."""
    perplexity: str | None = None
    """Rows with ordinary answers: how much their perplexity rose over that under --base."""
    margin: str | None = None
    """Preference rows (prompt, chosen refusal, rejected harmful answer): by how many nats per token the model prefers
    the refusal; needs no judge."""
    base: str | None = None
    """The model from before alignment or attack, for --perplexity."""
    lm_eval: str | None = None
    """Tasks of lm-eval's harness, such as mmlu,arc_easy; needs that package."""
    max_new_tokens: AtLeast1 = 512
    """Longest answer in tokens."""
    batch_size: AtLeast0 = 0
    """Prompts answered at a time; 0 means as many as fit."""
    on_long_prompt: Literal["fail", "cut"] = "fail"
    """What to do with a prompt that fills the model's whole context; cut takes tokens from its middle."""
    show_harmful: bool = False
    """Print example answers that were flagged as harmful, instead of hiding them."""
    compare: list[str] | None = field(default=None, metadata={"nargs": 2})
    """Instead of evaluating: two folders of finished evaluations, whose outcomes on the same prompts are compared."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"lm_eval"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare is not None and len(self.compare) != 2:
            raise ConfigError("--compare: needs two folders of finished evaluations")
        evaluating = ("model", "models", "answers", *PROMPTS, *GENERAL, "base")
        instead = {"compare": "compares what was evaluated before", "answers": "judges answers that are there"}
        for option, does in instead.items():
            if getattr(self, option) is not None:
                if given := [flag(name) for name in evaluating if name != option and getattr(self, name)]:
                    raise ConfigError(f"--{option}: {does}; leave {', '.join(given)} out")
                return
        if not self.model and not self.models:
            raise ConfigError("--model must be given, or --answers; see pharmacist evaluate --help")
        if self.model and self.models:
            raise ConfigError("--models: takes the place of --model; name all models there")
        if (self.perplexity is None) != (self.base is None):
            raise ConfigError("--perplexity needs --base, the model that it is compared with, and the other way round")
        if all(getattr(self, name) is None for name in (*PROMPTS, *GENERAL)):
            raise ConfigError("nothing to evaluate: give --prompts, --benign-prompts, --task or --answers")


EVALUATE = Stage(
    name="evaluate",
    options=EvaluateOptions,
    summary="harmful score, fine-tune accuracy, over-refusal, with intervals",
    example="pharmacist evaluate --model runs/attacked --prompts prompts.jsonl --judge probe --safe safe.jsonl "
    "--harmful harmful.jsonl --output-dir runs/scores",
    version=3,
    files=("prompts", "benign_prompts", "task", *REFERENCES, "perplexity", "margin"),
    models=("model", "base"),
    unidentifying=frozenset({"show_harmful"}),
    final=frozenset({"judge", "second_judge", "task_type", *REFERENCES}),
    final_inputs=frozenset({"judge file", "second judge file", "opponent", *REFERENCES}),
    reopens=True,
    read_again=("items.jsonl", "metrics.json"),
    costly=tuple(f"work/{name}/**/*" for name in ("answers", "verdicts", "perplexity", "margin")),
    again="evaluates again",
    by_axes=frozenset({"judge", "task", *REFERENCES, "compare"}),
)
COMPARE = Stage(
    name="compare",
    options=EvaluateOptions,
    run="pharmacist.pipeline.evaluate.several:compare_runs",
    version=2,
    read_again=("metrics.json",),
    again="evaluates again",
)
EVALUATE_MODELS = Stage(
    name="evaluate-models",
    options=EvaluateOptions,
    run="pharmacist.pipeline.evaluate.several:evaluate_models",
    version=1,
    unidentifying=frozenset({"show_harmful"}),
    final=EVALUATE.final | {"models"},  # every model's own run watches over the rest
    reopens=True,
    again="",
)
