"""The default: the model is loaded here and answers in batches through Hugging Face ``generate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.engines.base import Engine, ModelChoice
from pharmacist.evaluation.evaluator import Evaluator
from pharmacist.nn.models import LoadedModel, load_model, model_fingerprint


class TransformersEngine(Engine):
    """See the module."""

    name = "transformers"

    def __post_init__(self) -> None:
        self._loaded: LoadedModel | None = None

    def fingerprint(self, model: str) -> str:
        """sha256 of its files, or its hub id."""
        return model_fingerprint(model)

    def open(self, choice: ModelChoice, scratch: Path) -> None:
        """Loads the model."""
        del scratch
        self._loaded = load_model(**vars(choice))

    def local(self) -> LoadedModel:
        """The model."""
        if self._loaded is None:
            raise ValueError("an engine answers only after open")
        return self._loaded

    def answers(self, evaluator: Evaluator, work: Path) -> Mapping[str, list[Answer]]:
        """Batches with left padding, prompts of like length together."""
        loaded = self.local()
        return evaluator.answers(loaded.model, loaded.tokenizer, loaded.template, work=work)

    def report(self) -> dict[str, Any]:
        """Device, template and number format."""
        loaded = self.local()
        return {"device": str(loaded.device), **loaded.facts}

    def close(self) -> None:
        """Drops the weights."""
        self._loaded = None
