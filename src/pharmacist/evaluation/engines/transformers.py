"""The engine `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.engines import Engine
from pharmacist.evaluation.evaluator import Evaluator
from pharmacist.nn.models import LoadedModel, load_model, model_fingerprint


class TransformersEngine(Engine):
    """The default: the model is loaded locally and answers in batches with Hugging Face ``generate``."""

    name = "transformers"
    _loaded: LoadedModel | None = None
    _decoding: Mapping[str, Any] = {}
    """Keyword arguments of `Evaluator.answers` that replace its decoder."""

    def fingerprint(self, model: str) -> str:
        return model_fingerprint(model)

    def open(self, model: str, scratch: Path, **how: Any) -> None:
        self._loaded = load_model(model, **how)

    def local(self) -> LoadedModel:
        if self._loaded is None:
            raise ValueError("an engine answers only after open")
        return self._loaded

    def answers(self, evaluator: Evaluator, work: Path) -> Mapping[str, list[Answer]]:
        loaded = self.local()
        return evaluator.answers(loaded.model, loaded.tokenizer, loaded.template, work=work, **self._decoding)

    def report(self) -> dict[str, Any]:
        return {"device": str(self.local().device), **self.local().facts}

    def close(self) -> None:
        self._loaded = None
