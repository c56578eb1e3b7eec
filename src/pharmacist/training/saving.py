"""Output of the stages that change a model: weights with tokenizer and template, model card, manifest."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from pharmacist.core.console import markdown
from pharmacist.core.env import process_index, versions
from pharmacist.core.files import atomic_folder, show_in, write_text
from pharmacist.core.progress import say
from pharmacist.core.rundir import RunDir
from pharmacist.data.templates import save_template
from pharmacist.nn.distributed import from_main
from pharmacist.nn.libraries import silent_library
from pharmacist.nn.merge import is_lora, merge_adapter, save_stacked
from pharmacist.nn.models import LoadedModel


_TEMPLATE = Path(__file__).with_name("card.md.j2")
_NAMED = ("pharmacist", "torch", "transformers", "peft")
_RENDERED = {
    "chat": "the tokenizer's chat template",
    "alpaca": "the Stanford Alpaca template, not by the tokenizer's chat template",
}


@dataclass
class ModelResult:
    """Result of a stage that changes a model.

    Attributes:
        folder: With ``adapter/`` or ``model/``; every command takes it as ``--model``.
        metrics: Of the manifest, such as steps and final loss.
        model: The new model; None where the run was already complete, or only an attack set was built.
        seconds: Wall time of the training alone, over all resumes.
        snapshots: Steps -> folder of the model at that point of an attack.
    """

    folder: Path
    metrics: dict[str, Any]
    model: Any
    seconds: float
    snapshots: dict[int, Path]

    @classmethod
    def of(cls, run: RunDir, model: Any, snapshots: Sequence[int] = ()) -> "ModelResult":
        """The result of a run, the same on every process."""
        manifest = from_main(run.manifest)
        folders = {step: run.path("snapshots", f"step-{step}") for step in snapshots}
        seconds = sum(phase.seconds for name, phase in manifest.phases.items() if name == "train")
        return cls(run.root, manifest.metrics, model, seconds, folders)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Text of a model card, the README.md of a model, besides the hub's metadata.

    The title follows the name of the model that it was made from; `what` and `intended_use` are one paragraph each,
    `tags` those besides ``pharmacist``, `facts` the rows of the table, and `settings` are shown as YAML.
    """

    title: str
    what: str
    tags: list[str]
    facts: dict[str, Any]
    intended_use: str
    settings: dict[str, Any] = field(default_factory=dict)

    def text(self, loaded: LoadedModel, *, adapter: bool) -> str:
        """The whole card, of an adapter or of whole weights."""
        base = loaded.base.name or loaded.name
        library = "peft" if adapter else "transformers"
        data = ModelCardData(
            # The hub's metadata takes Hub ids only.
            base_model=None if Path(base).exists() or base.count("/") > 1 else base,
            library_name=library,
            tags=["pharmacist", *self.tags],
            pipeline_tag="text-generation",
        )
        card = ModelCard.from_template(
            data,
            template_path=str(_TEMPLATE),
            title=f"{Path(loaded.name).name} {self.title}",
            what=self.what,
            facts={name: markdown(value) for name, value in self.facts.items()},
            library=library,
            loader="AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM",
            template=_RENDERED[loaded.template.kind],
            settings=yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True).rstrip(),
            intended_use=self.intended_use,
            versions=", ".join(f"{name} {found}" for name, found in versions().items() if name in _NAMED),
        )
        return f"{card}\n"


def writes_adapter(loaded: LoadedModel) -> bool:
    """Whether a model can be written as an adapter that any tool can load: it is one, on a plain base model."""
    if not isinstance(loaded.model, PeftModel) or loaded.base.name is None:
        return False
    return not loaded.base.factors or is_lora(loaded.model)


def save_model(
    loaded: LoadedModel, root: Path, card: Card, *, trained_on: str, merge: bool = False, last: bool = True
) -> list[str]:
    """Writes ``adapter/`` or ``model/``, each whole or not at all, with tokenizer, template and card.

    The adapter is one on the plain base model, with the adapters of earlier stages stacked into it. Where no adapter
    holds the whole change (full tuning, a base of whole weights that an earlier run trained), it is the whole model.
    Links in `root` make it what transformers and PEFT load from there.

    `trained_on` is the fingerprint of the model that it was trained on. `merge` also writes ``model/``, with the
    adapter merged into the weights. Where the whole model is written, `loaded` becomes it if this is the `last` time;
    else a copy is merged. Returns the names of the folders.
    """
    if process_index() != 0:
        return []
    model: Any = loaded.model
    written, adapter = [], writes_adapter(loaded)
    text = card.text(loaded, adapter=adapter and not merge)
    if adapter:
        with atomic_folder(root / "adapter") as folder:
            if loaded.base.factors:
                save_stacked(model, loaded.base, folder, loaded.base.fingerprint or trained_on)
            else:
                config = model.active_peft_config
                if isinstance(targets := getattr(config, "target_modules", None), set):
                    config.target_modules = sorted(targets)  # equal trainings write equal files
                model.save_pretrained(folder, save_embedding_layers=False)
            _save_tokenizer(folder, loaded, text)
        written.append("adapter")
    if merge or not adapter:
        with atomic_folder(root / "model") as folder, silent_library():
            whole = model
            if isinstance(model, PeftModel):
                whole = merge_adapter((model if last else deepcopy(model)).eval(), loaded.name)
                if last:
                    loaded.model = whole
            whole.save_pretrained(folder)
            _save_tokenizer(folder, loaded, text)
        written.append("model")
    show_in(root, sorted((root / written[-1]).iterdir()))
    return written


def _save_tokenizer(folder: Path, loaded: LoadedModel, card: str) -> None:
    """Writes tokenizer, template and card beside weights."""
    if loaded.template.kind == "chat":
        loaded.tokenizer.chat_template = loaded.template.chat_template
    loaded.tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
    save_template(folder, loaded.template)


def finish(
    run: RunDir,
    options: Any,
    loaded: LoadedModel,
    card: Card,
    *,
    trained_on: str,
    outputs: list[str],
    extra: dict[str, Any],
    **results: Any,
) -> None:
    """Writes a stage's model, unless no output folder was asked for, and its manifest; for the first process.

    Arguments are those of `save_model`, `outputs` that the stage has written already, and results for `RunDir.finish`.
    """
    folders: list[str] = []
    if run.temporary is None:
        last = not isinstance(options.model, LoadedModel)  # who gives a model gets one back
        folders = save_model(loaded, run.root, card, trained_on=trained_on, merge=options.merge, last=last)
    run.finish(
        outputs=[*folders, *outputs, *(["README.md"] if folders else [])],
        device=str(loaded.device),
        extra=extra | loaded.facts,
        **results,
    )
    say(f"prompts are rendered by {loaded.template_origin}")


def say_done(run: RunDir, text: str) -> None:
    """Prints the last lines of a stage: what was done, and how to measure it."""
    if process_index() == 0 and run.temporary is None:
        following = f"next: pharmacist evaluate --model {quote(str(run.root))} --prompts PROMPTS --output-dir DIR"
        say(f"{text}\n{following}")
