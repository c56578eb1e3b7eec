"""The stage `evaluate`, and the two further forms that it has."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pharmacist.core.config import method
from pharmacist.core.errors import ConfigError
from pharmacist.core.naming import flag
from pharmacist.core.options import ModelOptions, RowOptions, RunOptions
from pharmacist.core.typed import AtLeast0, AtLeast1, default_of
from pharmacist.pipeline.stage import Stage
from pharmacist.pipeline.stages.curate import REFERENCES as REFERENCES


PROMPTS = ("prompts", "benign_prompts", "task")
GENERAL = ("perplexity", "margin", "lm_eval")
"""Options of metrics that need weights and no answers."""
NOT_ALONG_ATTACKS = ("benign_prompts", "task", "perplexity", "base", "lm_eval")
"""Options of what is not measured at the snapshots of an attack."""


@dataclass(kw_only=True)
class EvaluateOptions(RunOptions, RowOptions, ModelOptions):
    """Measure harmful score, over-refusal and fine-tune accuracy of a model."""

    model: str = ""
    """Model to evaluate: a local folder, the folder of an earlier align or attack, a Hub id, or the name of the model
    at an endpoint."""
    models: list[str] | None = field(default=None, metadata={"nargs": "+"})
    """Instead of --model: several models, such as base, aligned and attacked. Each is evaluated into a subfolder of
    the output folder, and one table shows all metrics.
    """
    prompts: str | None = None
    """Harmful prompts: rows with a prompt, in any format that curate reads; completions are not read. Or a public set:
    beavertails, beavertails-first500, beavertails-first1000, harmbench, advbench, strongreject; NAME:FILE reads the
    file of its authors."""
    benign_prompts: str | None = None
    """Benign prompts that look harmful; refusing them is over-refusal. A file, xstest or xstest:FILE."""
    answers: str | None = None
    """Instead of --model and prompts: rows with prompt and answer, which are judged as they are. An answer that is
    null is unscored.
    """
    task: str | None = None
    """Test rows of the fine-tuning task: prompt and right completion. Or a public task: sst2, agnews, gsm8k."""
    task_type: dict[str, Any] = method("auto", "pharmacist.evaluation.graders:TASK_TYPES")
    """How answers to the task are graded; auto chooses classification, exact or number by the completions. win-rate
    asks an LLM judge whether the answer or the completion is better."""
    engine: dict[str, Any] = method("transformers", "pharmacist.evaluation.engines:ENGINES", short=("base_url",))
    """How answers are generated: by a model loaded here, or by one behind an OpenAI-compatible endpoint, whose address
    may also be given as --base-url."""
    judge: dict[str, Any] = method("keyword", "pharmacist.evaluation.judges:JUDGES")
    """The judge that decides whether an answer is harmful and whether it is a refusal. A second run into the same
    folder with another judge reuses the answers.
    """
    second_judge: dict[str, Any] = method("none", "pharmacist.evaluation.judges:SECOND_JUDGES")
    """A second judge of the same answers, to measure how often the two agree."""
    safe: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Safe references (harmful prompt, refusal), on which a judge such as probe is trained. Of a preference file, the
    chosen answers are used. Several files count as several sources; if every kind of references has several, one at a
    time is held out."""
    harmful: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Harmful references for the judge: harmful prompt, harmful answer. Of a preference file, the rejected answers are
    used."""
    utility: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    """Utility references for the judge: benign prompt, helpful answer."""
    perplexity: str | None = None
    """Rows with ordinary answers, to measure the rise of their perplexity over the model --base."""
    margin: str | None = None
    """Preference rows (prompt, chosen refusal, rejected harmful answer): by how many nats per token the model prefers
    the refusal; needs no judge."""
    base: str | None = None
    """The model before alignment or attack, for --perplexity."""
    lm_eval: str | None = None
    """Tasks of lm-eval, such as mmlu,arc_easy; needs the extra lm-eval."""
    max_new_tokens: AtLeast1 = 512
    """Longest answer in tokens."""
    batch_size: AtLeast0 = 0
    """Prompts per batch; 0 means as many as fit."""
    on_long_prompt: Literal["fail", "cut"] = "fail"
    """What to do with a prompt that fills the whole context of the model; cut removes tokens from its middle."""
    show_harmful: bool = False
    """Print example answers that were judged harmful, instead of hiding them."""
    compare: list[str] | None = field(default=None, metadata={"nargs": 2})
    """Instead of evaluating: two folders of finished evaluations, to be compared on the same prompts."""

    NOT_PATHS: ClassVar[frozenset[str]] = frozenset({"lm_eval"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare is not None and len(self.compare) != 2:
            raise ConfigError("--compare: needs two folders of finished evaluations")
        generating = {"model", "models", *PROMPTS, *GENERAL, "base"}
        deciding = {"judge", "second_judge", "task_type", *REFERENCES}
        instead = {
            "compare": ("compares finished evaluations", {"answers"} | generating | deciding),
            "answers": ("judges existing answers", generating),
        }
        for option, (does, unused) in instead.items():
            if getattr(self, option) is not None:
                others = [item for item in fields(self) if item.name in unused]
                given = [item for item in others if _chosen(getattr(self, item.name)) != _chosen(default_of(item))]
                if given:
                    raise ConfigError(f"--{option}: {does}; leave {', '.join(flag(item.name) for item in given)} out")
                return
        if not self.model and not self.models:
            raise ConfigError("--model must be given, or --answers; see pharmacist evaluate --help")
        if self.model and self.models:
            raise ConfigError("--models: takes the place of --model; name all models there")
        if (self.perplexity is None) != (self.base is None):
            raise ConfigError(
                "--perplexity and --base, the model to compare with, need each other; give both or neither"
            )
        if all(getattr(self, name) is None for name in (*PROMPTS, *GENERAL)):
            raise ConfigError("nothing to evaluate: give --prompts, --benign-prompts, --task or --answers")


def _chosen(value: Any) -> Any:
    """What an option names: the name of a method, or None for nothing."""
    return value["name"] if isinstance(value, dict) else value or None


EVALUATE = Stage(
    name="evaluate",
    options=EvaluateOptions,
    summary="harmful score, fine-tune accuracy, over-refusal, with intervals",
    example="pharmacist evaluate --model runs/attacked --prompts prompts.jsonl --judge probe --safe safe.jsonl "
    "--harmful harmful.jsonl --output-dir runs/scores",
    version=3,
    files=("prompts", "benign_prompts", "answers", "task", *REFERENCES, "perplexity", "margin"),
    models=("model", "base"),
    unidentifying=frozenset({"show_harmful"}),
    final=frozenset({"judge", "second_judge", "task_type", *REFERENCES}),
    final_inputs=frozenset({"judge file", "second judge file", "opponent", *REFERENCES}),
    reopens=True,
    keeps=True,
    read_again=("items.jsonl", "metrics.json"),
    costly=("replies/*", *(f"work/{name}/**/*" for name in ("answers", "verdicts", "perplexity", "margin"))),
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
