"""What every engine is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.errors import ConfigError
from pharmacist.core.method import Method
from pharmacist.evaluation.answers import Answer


if TYPE_CHECKING:
    from pharmacist.evaluation.evaluator import Evaluator
    from pharmacist.nn.models import LoadedModel


class Engine(Method, ABC):
    """Answers the prompt sets of an `Evaluator`, greedily."""

    def check(self) -> None:  # noqa: B027 - most engines have nothing to check
        """Refuses at once what cannot work, before any input is read.

        Raises:
            PharmacistError: Missing package or option.
        """

    def identity(self) -> dict[str, Any]:
        """Options that decide on the answers; others, such as waiting times, identify no run."""
        return {}

    @abstractmethod
    def fingerprint(self, model: str) -> str:
        """What stands for the model's content."""

    @abstractmethod
    def open(self, model: str, scratch: Path, **how: Any) -> None:
        """Makes ready to answer.

        Args:
            model: Local folder, hub id, or what an endpoint calls it.
            scratch: Folder that is not there yet, for files that the engine needs only while it runs.
            **how: ``device``, ``dtype``, ``template`` and ``trust_remote_code``, as in `nn.models.load_model`.
        """

    @abstractmethod
    def answers(self, evaluator: "Evaluator", work: Path) -> Mapping[str, list[Answer]]:
        """Answers by prompt set, kept under `work` as they come, so that a second call goes on where one stopped."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """For the manifest: ``device``, ``template`` (as JSON; None where the other side applies its own),
        ``template_origin``, where it is from, in words, and ``dtype`` where that is known.
        """

    def local(self) -> "LoadedModel":
        """The loaded model, for what is measured without answers.

        Raises:
            ConfigError: It is not here.
        """
        raise ConfigError(f"--engine {self.name}: perplexity and lm-eval need the weights; use --engine transformers")

    def close(self) -> None:  # noqa: B027 - nor anything to free
        """Frees the model, so that a judge has room."""
