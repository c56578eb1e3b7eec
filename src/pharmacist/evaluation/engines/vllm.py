"""vLLM, where it is installed: many times the throughput on a GPU, for models that are loaded here.

Prompts are tokenised by us, as in training, and handed over as ids. Adapters are merged first into a folder that lives
as long as the run does, since vLLM loads only whole models or one adapter on a base.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pharmacist.core.errors import CompatibilityError
from pharmacist.core.typed import AtLeast1, Checked, Share
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.engines.base import ModelChoice
from pharmacist.evaluation.engines.transformers import TransformersEngine
from pharmacist.evaluation.evaluator import Evaluator
from pharmacist.evaluation.generate import until_end


_CHUNK = 1024  # prompts between two writes to disk; vLLM batches within them by itself


@dataclass
class VllmConfig(Checked):
    """Options of the vLLM engine."""

    tensor_parallel_size: AtLeast1 = 1
    """GPUs that one copy of the model is spread over."""
    gpu_memory_utilization: Share = 0.9
    """Share of a GPU's memory that vLLM takes."""


class VllmEngine(TransformersEngine):
    """See the module."""

    Config = VllmConfig
    name = "vllm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._llm: Any = None

    def check(self) -> None:
        """The package must be there."""
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            raise CompatibilityError(
                "--engine vllm: vLLM cannot be imported; pip install 'pharmacist[vllm]', or --engine transformers"
            ) from error

    def open(self, choice: ModelChoice, scratch: Path) -> None:
        """Loads, merges, saves, and loads again into vLLM."""
        merged_in = "float32" if choice.dtype == "auto" else choice.dtype
        super().open(replace(choice, device="cpu", dtype=merged_in), scratch)
        loaded = self.local()
        # Merged on the CPU, in the number format in which it will run, so that the GPU is vLLM's alone.
        loaded.dtype = torch.bfloat16 if choice.dtype in ("auto", "bfloat16") else torch.float32
        loaded.model.to(loaded.dtype)
        loaded.model.save_pretrained(scratch)
        loaded.tokenizer.save_pretrained(scratch)
        vllm = importlib.import_module("vllm")
        self._llm = vllm.LLM(
            model=str(scratch), dtype="auto", seed=0, trust_remote_code=choice.trust_remote_code, **vars(self.config)
        )

    def answers(self, evaluator: Evaluator, work: Path) -> Mapping[str, list[Answer]]:
        """The same ids, limits and ends as the default engine."""
        loaded = self.local()
        return evaluator.answers(
            loaded.model, loaded.tokenizer, loaded.template, work=work, decoder=self._decode, batch_size=_CHUNK
        )

    def _decode(self, ids: list[list[int]], new_tokens: int, ends: list[int]) -> list[tuple[list[int], bool]]:
        vllm = importlib.import_module("vllm")
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, stop_token_ids=ends)
        outputs = self._llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        found = []
        for output in (output.outputs[0] for output in outputs):
            tokens, ended = until_end(list(output.token_ids), ends)
            found.append((tokens, ended or output.finish_reason == "stop"))
        return found

    def report(self) -> dict[str, Any]:
        """The GPU, and the template."""
        return super().report() | {"device": "vllm"}

    def close(self) -> None:
        """Drops both copies."""
        super().close()
        self._llm = None
