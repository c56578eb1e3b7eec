"""Loading a causal language model, its tokenizer and its prompt template from wherever they lie."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pharmacist.core.env import offline
from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.files import check_ordinary, read_json
from pharmacist.core.hashing import sha256_folder, sha256_json, sha256_text
from pharmacist.core.progress import console
from pharmacist.data.templates import Template, choose_template, load_template


_FINGERPRINTED = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass
class LoadedModel:
    """A model ready to use.

    Attributes:
        model: In evaluation mode, on its device, adapters merged.
        tokenizer: With a pad token.
        template: How a prompt is rendered; the one saved with the model where there is one.
        name: As the user gave it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    name: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the model's configuration allows."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 4096)


def resolve_device(device: str) -> torch.device:
    """``auto`` is the (local) GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CompatibilityError("--device cuda: no CUDA device is visible to torch; use --device cpu")
    if device == "cuda":
        from accelerate import PartialState

        return torch.device("cuda", PartialState().local_process_index)
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def model_fingerprint(name: str) -> str:
    """sha256 of a local model's content (of its base too where it is an adapter); a hub id stands for itself.

    Raises:
        DataError: Neither a model folder nor what could be a hub id.
    """
    folder = _check_place(name)
    if not folder.is_dir():
        return f"hub:{name}"
    adapter = _adapter_folder(folder)
    if adapter is None:
        return sha256_folder(_weights_folder(folder), _FINGERPRINTED)
    return sha256_json([sha256_folder(adapter, _FINGERPRINTED), model_fingerprint(_base_of(adapter))])


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", template: str = "auto", trust_remote_code: bool = False,
    merge: bool = True,
) -> LoadedModel:  # fmt: skip
    """Loads a hub id, a local model, a PEFT adapter, or the folder of an earlier `align`, `attack` or `repair`.

    Adapters are merged into their base, which may itself be such a folder.

    Args:
        name: Hub id or local folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        template: ``auto`` (the saved one, else chat where the tokenizer has a template, else Alpaca), ``chat`` or
            ``alpaca``.
        trust_remote_code: Run code that comes with the model; off unless asked for.
        merge: False leaves the outermost adapter apart, trainable, on its frozen base: `LoadedModel.model` is then a
            PEFT model.

    Raises:
        DataError: Nothing loadable lies there.
        CompatibilityError: It is not a causal language model.
    """
    target = resolve_device(device)
    number_format = resolve_dtype(dtype, target)
    folder = _check_place(name)
    adapter = _adapter_folder(folder) if folder.is_dir() else None
    if adapter is not None:
        loaded = load_model(
            _base_of(adapter), device=device, dtype=dtype, template=template, trust_remote_code=trust_remote_code
        )  # fmt: skip
        try:
            model = PeftModel.from_pretrained(
                loaded.model, adapter, torch_device=str(target), is_trainable=not merge
            )  # fmt: skip
            model = model.merge_and_unload() if merge else model
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{adapter}: does not fit its base model {loaded.name} ({reason})") from error
        saved = load_template(folder) if template == "auto" else None
        return LoadedModel(model.eval(), loaded.tokenizer, saved or loaded.template, name)
    source = _weights_folder(folder) if folder.is_dir() else folder
    where = str(source) if folder.is_dir() else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": offline()}
    try:
        AutoConfig.from_pretrained(where, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        with silent_library():
            model, report = AutoModelForCausalLM.from_pretrained(
                where, dtype=number_format, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise DataError(_why_not_loaded(name, folder, error)) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CompatibilityError(
            f"{name}: {len(missing)} tensors of a causal language model are not in it (such as {missing[0]}) and "
            "would be random; give a complete model"
        )
    if tokenizer.eos_token_id is None:
        raise CompatibilityError(
            f"{name}: the tokenizer has no end-of-sequence token, so no completion could end; "
            "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Harmless: masks come from lengths and labels from concatenation, so no padding id is ever read.
        console().print(f"{name}: no pad token; padding with the end-of-sequence token, masked everywhere")
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(target).eval()
    model.requires_grad_(False)
    saved = load_template(folder) if folder.is_dir() and template == "auto" else None
    return LoadedModel(model, tokenizer, saved or choose_template(tokenizer, template), name)


@contextmanager
def silent_library() -> Iterator[None]:
    """Keeps transformers' own progress bars, reports and advice out of our output, whatever they are set to."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()


def base_of(name: str) -> str | None:
    """What a local adapter rests on; None where a model is whole weights or a hub id."""
    adapter = _adapter_folder(Path(name)) if Path(name).is_dir() else None
    return None if adapter is None else _base_of(adapter)


def _adapter_folder(folder: Path) -> Path | None:
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    return None


def _base_of(adapter: Path) -> str:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise DataError(f"{adapter}/adapter_config.json: names no base model, so the adapter cannot be loaded")
    return str(base)


def _weights_folder(folder: Path) -> Path:
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _check_place(name: str) -> Path:
    """Refuses at once, before anything is read, what can be no model."""
    folder = Path(name)
    exists = os.path.isdir(folder)
    check_ordinary(folder, name)
    if os.path.isfile(folder):
        raise DataError(f"{name}: is a file; --model needs a model folder or a hub id")
    if not exists and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"{name}: no such folder; --model needs a model folder or a hub id")
    if exists and _adapter_folder(folder) is None:
        if not (_weights_folder(folder) / "config.json").is_file():
            raise DataError(f"{name}: a model folder without config.json; save it with model.save_pretrained")
        if not any(_weights_folder(folder).glob("*.safetensors")):
            raise DataError(f"{name}: a model folder without safetensors weights; save it with model.save_pretrained")
    return folder


def _why_not_loaded(name: str, folder: Path, error: Exception) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{name}: is gated: accept its terms on the hub and log in (hf auth login), or give the path of a "
            "downloaded model folder"
        )
    if not folder.is_dir():
        reason = "HF_HUB_OFFLINE forbids the hub" if offline() else "not found on the hub or not reachable"
        return f"{name}: no such model folder, and as a hub id: {reason}; give the path of a downloaded model folder"
    return f"{name}: cannot be loaded as a causal language model ({' '.join(str(error).split())[:200]})"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over vocabulary and special tokens; equal for tokenizers that give equal ids."""
    vocabulary, special = sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())
    return sha256_text(repr(vocabulary) + repr(special))
