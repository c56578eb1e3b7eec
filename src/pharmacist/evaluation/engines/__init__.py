"""Engines: where answers come from. A new one is one file and one line in `ENGINES`."""

from pharmacist.core.registry import Registry
from pharmacist.evaluation.engines.base import Engine


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

__all__ = ["ENGINES", "Engine"]
