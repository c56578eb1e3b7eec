"""The base of judges that are local models: loading, version, logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pharmacist.core.env import offline
from pharmacist.core.errors import ConfigError, DataError, one_line
from pharmacist.core.typed import AtLeast1, Checked
from pharmacist.evaluation.judges.base import Judge, Verdict
from pharmacist.nn.devices import resolve_device, resolve_dtype
from pharmacist.nn.libraries import failures_as, silent_library
from pharmacist.nn.models import model_fingerprint


@dataclass
class LocalModelConfig(Checked):
    """Options of a judge that is a model."""

    model: str = ""
    """Local folder or Hub id of the judge."""
    batch_size: AtLeast1 = 8
    """Answers judged at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigError("judge: give its model, such as --judge.model FOLDER")


class LocalModelJudge(Judge):
    """A judge that is a model: looked up when the run begins, loaded when the first answer is judged."""

    auto_class: Any
    _version = "unread"

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.config).items() if name not in ("batch_size", "device")}

    def fingerprint(self) -> str | None:
        return model_fingerprint(self.config.model)

    @property
    def revision(self) -> str:
        """The model's content hash or hub commit, with a hash of the options if they are not the defaults."""
        return self.with_options(self._version, "model")

    def check(self) -> None:
        """Looks the model up before hours are spent on answers."""
        commit = getattr(self._read(AutoConfig), "_commit_hash", None)
        self._version = (commit or model_fingerprint(self.config.model).removeprefix("hub:"))[:8]

    def _read(self, auto: Any, **options: Any) -> Any:
        why = "HF_HUB_OFFLINE forbids downloads" if offline() else "not there, gated, or not reachable"
        what, remedy = f"{self.who}: {self.config.model}", f"give a downloaded folder with {self.option}.model"
        with (
            failures_as(DataError, lambda e: f"{what} cannot be loaded ({why}; {one_line(e, 120)}); {remedy}"),
            silent_library(),
        ):
            return auto.from_pretrained(self.config.model, local_files_only=offline(), **options)

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        device, tokenizer = resolve_device(self.config.device), self._read(AutoTokenizer)
        model = self._read(self.auto_class, dtype=resolve_dtype(self.config.dtype, device), use_safetensors=True)
        return model.to(device).eval().requires_grad_(False), tokenizer

    def close(self) -> None:
        vars(self).pop("loaded", None)

    def logits(self, ids: list[list[int]], **options: Any) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yields positions and logits of inputs (token ids) in batches of equal length, so that nothing is padded.

        `options` are those of the model's forward pass.
        """
        model, _ = self.loaded
        lengths = np.array([len(row) for row in ids])
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length).tolist()
            for start in range(0, len(same), self.config.batch_size):
                batch = same[start : start + self.config.batch_size]
                rows = torch.tensor([ids[i] for i in batch], dtype=torch.long, device=model.device)
                with torch.inference_mode():
                    found = model(input_ids=rows, **options).logits
                yield batch, found

    def highest(self, categories: Sequence[str], scores: Sequence[float]) -> Verdict:
        """A verdict from the probability of every category: harmful if the largest is above the threshold."""
        top = max(scores)
        if any(score != score for score in scores):
            return Verdict(None, note="the judge's scores are not numbers")
        return Verdict(top > self.config.threshold, top, categories=dict(zip(categories, scores, strict=True)))
