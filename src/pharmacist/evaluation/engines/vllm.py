"""The engine `vllm`."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pharmacist.core.errors import CompatibilityError
from pharmacist.core.typed import AtLeast1, Checked, Share
from pharmacist.evaluation.engines.transformers import TransformersEngine
from pharmacist.evaluation.generate import until_end


_CHUNK = 1024  # prompts between two writes to disk; vLLM batches within them by itself


@dataclass
class VllmConfig(Checked):
    """Options of the vLLM engine."""

    tensor_parallel_size: AtLeast1 = 1
    """Number of GPUs over which one copy of the model is distributed."""
    gpu_memory_utilization: Share = 0.9
    """Share of a GPU's memory that vLLM uses."""


class VllmEngine(TransformersEngine):
    """vLLM, if it is installed: many times the throughput on a GPU.

    Prompts are tokenised here, as in training, and passed on as ids. Adapters are first merged into a folder that is
    deleted after the run, since vLLM loads only whole models or one adapter on a base.
    """

    Config = VllmConfig
    name = "vllm"
    unused = ("batch_size",)
    _llm: Any = None

    def check(self) -> None:
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            raise CompatibilityError(
                "--engine vllm: vLLM cannot be imported; pip install 'pharmacist[vllm]', or --engine transformers"
            ) from error

    def open(self, model: str, scratch: Path, **how: Any) -> None:
        """Merges the model's adapters, saves it and loads it into vLLM."""
        dtype = how["dtype"]
        # Merged on the CPU, in the number format in which it will run, so that the GPU is vLLM's alone.
        super().open(model, scratch, **how | {"device": "cpu", "dtype": "float32" if dtype == "auto" else dtype})
        loaded = self.local()
        loaded.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        loaded.model.to(loaded.dtype)
        loaded.model.save_pretrained(scratch)
        loaded.tokenizer.save_pretrained(scratch)
        remote = how["trust_remote_code"]
        vllm = importlib.import_module("vllm")
        self._decoding = {"decoder": self._decode, "batch_size": _CHUNK}
        self._llm = vllm.LLM(model=str(scratch), dtype="auto", seed=0, trust_remote_code=remote, **vars(self.config))

    def _decode(self, ids: list[list[int]], new_tokens: int, ends: list[int]) -> list[tuple[list[int], bool]]:
        vllm = importlib.import_module("vllm")
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, stop_token_ids=ends)
        found = []
        for output in self._llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False):
            (first,) = output.outputs
            tokens, ended = until_end(list(first.token_ids), ends)
            found.append((tokens, ended or first.finish_reason == "stop"))
        return found

    def report(self) -> dict[str, Any]:
        return super().report() | {"device": "vllm"}

    def close(self) -> None:
        super().close()
        self._llm = None
