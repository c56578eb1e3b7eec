"""The engine `openai`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.errors import DataError
from pharmacist.data.templates import conversation
from pharmacist.evaluation.answers import Answer, AnswerLog
from pharmacist.evaluation.endpoint import Endpoint, EndpointConfig, Failure, count_reasons, remedy
from pharmacist.evaluation.engines import Engine
from pharmacist.nn.distributed import on_main


if TYPE_CHECKING:
    from pharmacist.evaluation.evaluator import Evaluator


class OpenAIEngine(Engine):
    """A served model behind an OpenAI-compatible endpoint (vLLM's own server, TGI, SGLang, llama.cpp, hosted ones).

    The server applies its own chat template, which is unknown here, and the manifest says so. Every answer is written
    to disk as it arrives; questions that failed are asked again by the next run, and are unscored until then.
    """

    Config = EndpointConfig
    name = "openai"
    unused = ("template", "device", "dtype", "batch_size", "on_long_prompt")
    _model = ""

    def check(self) -> None:
        Endpoint(self.config, f"--engine {self.name}")

    def identity(self) -> dict[str, Any]:
        return dict(self.config.identity())

    def fingerprint(self, model: str) -> str:
        """The endpoint's name for the model, whose content cannot be seen."""
        return f"served:{model}"

    def open(self, model: str, scratch: Path, **how: Any) -> None:
        self._model = model

    def answers(self, evaluator: "Evaluator", work: Path) -> Mapping[str, list[Answer]]:
        """Asks with temperature 0; a DataError where the endpoint refuses, or nothing at all was answered."""
        found = on_main(lambda: {name: self._set(evaluator, name, work / name) for name in evaluator.rows})
        every = [answer for answers in found.values() for answer in answers]
        failed = [answer.error for answer in every if answer.error]
        if failed and len(failed) == len(every):
            raise DataError(
                f"--engine {self.name}: {self.config.shown} answered none of {len(every)} prompts "
                f"({count_reasons(failed)}); {remedy(failed, '--engine')} and run the same command again"
            )
        return found

    def _set(self, evaluator: "Evaluator", name: str, work: Path) -> list[Answer]:
        config: EndpointConfig = self.config
        longest = evaluator.max_new_tokens
        bodies = [config.request(self._model, conversation(row), longest) for row in evaluator.rows[name]]
        log = AnswerLog(work, bodies)
        found = log.read()
        missing = {row: body for row, body in enumerate(bodies) if row not in found}
        endpoint, what = Endpoint(config, f"--engine {self.name}"), f"answer {name.replace('_', ' ')}"
        for row, result in endpoint.ask_all(missing, what, answered=bool(found)):
            if isinstance(result, Failure):  # not kept: the next run asks again
                found[row] = Answer("", 0, False, str(result))
            else:
                found[row] = result
                log.append({row: result})
        return [found[row] for row in range(len(bodies))]

    def report(self) -> dict[str, Any]:
        return {"device": "endpoint", "template": None, "template_origin": "the endpoint's own template"}
