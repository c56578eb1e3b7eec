"""The default: the model is loaded here and answers in batches through Hugging Face ``generate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.evaluation.engines.base import Engine, ModelChoice


if TYPE_CHECKING:
    from pharmacist.evaluation.evaluator import Evaluator
    from pharmacist.evaluation.generate import Answer
    from pharmacist.nn.models import LoadedModel


class TransformersEngine(Engine):
    """See the module."""

    name = "transformers"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._loaded: LoadedModel | None = None

    def fingerprint(self, model: str) -> str:
        """sha256 of its files, or its hub id."""
        from pharmacist.nn.models import model_fingerprint

        return model_fingerprint(model)

    def open(self, choice: ModelChoice, scratch: Path) -> None:
        """Loads the model."""
        from pharmacist.nn.models import load_model

        del scratch
        self._loaded = load_model(
            choice.name,
            device=choice.device,
            dtype=choice.dtype,
            template=choice.template,
            trust_remote_code=choice.trust_remote_code,
        )

    def local(self) -> "LoadedModel":
        """The model."""
        if self._loaded is None:
            raise ValueError("an engine answers only after open")
        return self._loaded

    def answers(self, evaluator: "Evaluator", work: Path) -> "Mapping[str, list[Answer]]":
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
