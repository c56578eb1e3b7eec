"""Engines generate the answers. A new one is one file and one line in `ENGINES`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pharmacist.core.errors import ConfigError
from pharmacist.core.method import Method
from pharmacist.core.registry import Registry
from pharmacist.evaluation.answers import Answer


if TYPE_CHECKING:
    from pharmacist.evaluation.evaluator import Evaluator
    from pharmacist.nn.models import LoadedModel


class Engine(Method, ABC):
    """Answers the prompt sets of an `Evaluator`, greedily.

    Attributes:
        unused: Options of ``evaluate`` that it does not use.
    """

    unused: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:  # noqa: B027 - most engines have nothing to check
        """Checks packages and options before any input is read.

        Raises:
            PharmacistError: Missing package or option.
        """

    def identity(self) -> dict[str, Any]:
        """Options that can change the answers; others, such as waiting times, do not identify a run."""
        return {}

    @abstractmethod
    def fingerprint(self, model: str) -> str:
        """What identifies the content of a model."""

    @abstractmethod
    def open(self, model: str, scratch: Path, **how: Any) -> None:
        """Loads or connects to a model.

        Args:
            model: Local folder, Hub id, or the endpoint's name for it.
            scratch: Path at which the engine may make a folder for temporary files.
            **how: ``device``, ``dtype``, ``template`` and ``trust_remote_code``, as in `nn.models.load_model`.
        """

    @abstractmethod
    def answers(self, evaluator: "Evaluator", work: Path) -> Mapping[str, list[Answer]]:
        """Answers by prompt set; they are kept under `work` as they arrive, so that an interrupted call continues."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """For the manifest: ``device``, ``template`` (as JSON; None if the server applies its own),
        ``template_origin`` (in words) and ``dtype`` if that is known.
        """

    def local(self) -> "LoadedModel":
        """The loaded model, for metrics that need its weights.

        Raises:
            ConfigError: The engine has no weights.
        """
        raise ConfigError(
            f"--engine {self.name}: perplexity, margin and lm-eval need the weights; use --engine transformers"
        )

    def close(self) -> None:  # noqa: B027 - most engines have nothing to free
        """Frees the model's memory for a judge."""


ENGINES: Registry[Engine] = Registry(
    "engine",
    {
        "openai": "pharmacist.evaluation.engines.openai:OpenAIEngine",
        "transformers": "pharmacist.evaluation.engines.transformers:TransformersEngine",
        "vllm": "pharmacist.evaluation.engines.vllm:VllmEngine",
    },
    group="pharmacist.engines",
    options={"transformers": "pharmacist.core.method:NoOptions"},
)
