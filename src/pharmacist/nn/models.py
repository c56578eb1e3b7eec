"""Loading a causal language model, its tokenizer and its prompt template from wherever they lie."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xxhash
from huggingface_hub.errors import GatedRepoError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pharmacist.core.console import plain
from pharmacist.core.env import offline
from pharmacist.core.errors import CompatibilityError, DataError
from pharmacist.core.files import check_ordinary, read_json
from pharmacist.core.hashing import sha256_content, sha256_json, sha256_text
from pharmacist.core.progress import console
from pharmacist.core.typed import Given
from pharmacist.data.templates import FILE_NAME as TEMPLATE_FILE
from pharmacist.data.templates import Template, check_template, choose_template, load_template
from pharmacist.nn.merge import Beneath, lora_factors, merge_adapter, read_stack, split, stack


_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"}
_PROMPTS |= {"CPT", "CARTRIDGE"}
"""Kinds of adapters that are no weights."""
_FROM_BASE = " (its base model's)"
_LARGE = 50_000_000
"""Parameters from which on `resolve_dtype` may take bfloat16 on a CPU."""


@dataclass
class LoadedModel(Given):
    """A model ready to use; stages take one in the place of a name.

    Attributes:
        model: In evaluation mode, on its device, adapters merged.
        tokenizer: With a pad token.
        template: How a prompt is rendered; the one saved with the model where there is one.
        name: As the user gave it.
        template_origin: Where the template is from, in words: "the chat template that was saved with it".
        beneath: What an adapter that is trained on the model rests on.
        dtype: Number format that it was loaded in, by default the model's; it stays where training turns the weights
            into float32.
        shared: Whether its weights are another model's too, and must not be changed in place.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    name: str
    template_origin: str = ""
    beneath: Beneath = field(default_factory=Beneath)
    dtype: torch.dtype | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        self.dtype = self.dtype or getattr(self.model, "dtype", torch.float32)

    @property
    def label(self) -> str:
        """What stands for it in messages and manifests."""
        return self.name

    def __str__(self) -> str:
        return self.name

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: how prompts are rendered, and what the model computes in."""
        return {
            "template": vars(self.template),
            "template_origin": self.template_origin,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

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
        raise CompatibilityError("device cuda: no CUDA device is visible to torch; use the device cpu")
    if device == "cuda":
        from accelerate import PartialState

        return torch.device("cuda", PartialState().local_process_index)
    return torch.device(device)


def resolve_dtype(
    dtype: str, device: torch.device, config: Any = None, *, trust_remote_code: bool = False
) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU, and on a CPU that multiplies in it for a large model that was saved in it.

    There a forward pass of SmolLM2 (135M) takes a third of the time in float32, a LoRA training step half. A small
    model would gain little, and one that was saved in float32 would lose digits that it has.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: Where the model will be.
        config: Of the model, a `transformers.PretrainedConfig`; without one a CPU takes float32.
        trust_remote_code: As in `load_model`.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    # Whether this CPU multiplies in it torch says from 2.10 on.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if not fast or getattr(config, "dtype", None) != torch.bfloat16:
        return torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return torch.bfloat16 if model.num_parameters() >= _LARGE else torch.float32


def model_fingerprint(name: str | LoadedModel) -> str:
    """sha256 of a local model's content (of its base too where it is an adapter), or a hash of a loaded one's weights.

    A hub id stands for itself; what can be neither folder nor hub id is a `DataError`.
    """
    if isinstance(name, LoadedModel):
        digest = xxhash.xxh3_128()
        for key, tensor in name.model.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        return f"weights:{digest.hexdigest()}"
    return _fingerprint(name, ())


def _fingerprint(name: str, above: tuple[Path, ...]) -> str:
    folder = _check_place(name)
    if not folder.is_dir():
        return f"hub:{name}"
    adapter = _adapter_folder(folder)
    if adapter is None:
        return sha256_content(_weights_folder(folder))
    with _below(adapter, above) as base:
        return sha256_json([sha256_content(adapter), _fingerprint(base, (*above, adapter.resolve()))])


def trained_on(name: str | LoadedModel) -> str | None:
    """Fingerprint of what a local adapter was trained on; None of whole weights, a hub id and a loaded model."""
    adapter = None if isinstance(name, LoadedModel) else _adapter_folder(Path(name))
    if adapter is None:
        return None
    parts = read_stack(adapter)
    return str(parts["trained_on"]) if parts is not None else model_fingerprint(_base_of(adapter))


def load_model(
    name: str | LoadedModel,
    *,
    device: str = "auto",
    dtype: str = "auto",
    template: str = "auto",
    trust_remote_code: bool = False,
    merge: bool = True,
) -> LoadedModel:
    """Loads a hub id, a local model, a PEFT adapter, or the folder of an earlier `align`, `attack` or `repair`.

    Adapters are merged into their base, which may itself be such a folder.

    Args:
        name: Hub id or local folder; a loaded model is taken as it is, see `again`.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        template: ``auto`` (the saved one, else chat where the tokenizer has a template, else Alpaca), ``chat`` or
            ``alpaca``. An adapter's own tokenizer and chat template go before its base's.
        trust_remote_code: Run code that comes with the model; off unless asked for.
        merge: False leaves the outermost adapter apart, trainable, on its frozen base: `LoadedModel.model` is then a
            PEFT model.

    Raises:
        DataError: Nothing loadable lies there.
        CompatibilityError: It is not a causal language model, or an adapter that cannot be merged.
    """
    if isinstance(name, LoadedModel):
        return again(name, merge=merge)
    loaded = _load(name, _How(resolve_device(device), dtype, template, trust_remote_code), merge, ())
    check_template(loaded.template, loaded.tokenizer, name)
    return loaded


def in_memory(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, template: str = "auto"
) -> LoadedModel:
    """A model that the caller has loaded; the tokenizer is by default the one that lies where it was loaded from.

    Raises:
        DataError: No tokenizer is given, and none lies there.
        CompatibilityError: The tokenizer does not fit.
    """
    place = str(getattr(model, "name_or_path", "") or "")
    with _telling(lambda error: f"the model comes with no tokenizer ({_short(error)}); give tokenizer=TOKENIZER"):
        own = AutoTokenizer.from_pretrained(place, local_files_only=offline()) if tokenizer is None else tokenizer
    own = copy.deepcopy(own)  # a pad token and a template may be set
    name = place or type(model).__name__
    _check_tokenizer(name, own, model)
    base = place if place and not isinstance(model, PeftModel) and not _of_a_run(Path(place)) else None
    loaded = LoadedModel(model, own, Template("alpaca"), name, beneath=Beneath(base))
    return _with_template(loaded, template, Path(place))


def again(loaded: LoadedModel, *, merge: bool = True) -> LoadedModel:
    """The same model for another use, which leaves the caller's own as it is.

    Modules are new, weights are shared; those of an adapter, and all of a model that is merged, are copied. Where
    `merge` is false the adapter of a PEFT model stays apart, trainable.
    """
    model: Any = loaded.model
    if isinstance(model, PeftModel) and merge:
        whole = merge_adapter(copy.deepcopy(model).eval(), loaded.name).requires_grad_(False)
        return replace(loaded, model=whole.eval())
    shared: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        trained = isinstance(model, PeftModel) and "lora_" in name
        value = parameter.detach().clone() if trained else parameter.detach()
        shared[id(parameter)] = torch.nn.Parameter(value, requires_grad=trained)
    return replace(loaded, model=copy.deepcopy(model, shared).eval(), shared=True)


@contextmanager
def _telling(message: Callable[[Exception], str]) -> Iterator[None]:
    """Libraries fail in every way there is on damaged files, and read nothing else in the block; memory apart."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(message(error)) from error


@dataclass(frozen=True)
class _How:
    device: torch.device
    dtype: str
    template: str
    trust_remote_code: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": offline()}


def _load(name: str, how: _How, merge: bool, above: tuple[Path, ...]) -> LoadedModel:
    folder = _check_place(name)
    adapter, local = _adapter_folder(folder), folder.is_dir()
    if adapter is not None:
        return _load_adapter(name, folder, adapter, how, merge, above)
    where = str(_weights_folder(folder)) if local else name
    with _telling(lambda error: _why_not_loaded(name, folder, error)), silent_library():
        config = AutoConfig.from_pretrained(where, **how.options)
        tokenizer = AutoTokenizer.from_pretrained(where, **how.options)
        dtype = resolve_dtype(how.dtype, how.device, config, trust_remote_code=how.trust_remote_code)
        model, report = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, output_loading_info=True, **how.options
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CompatibilityError(
            f"{name}: {len(missing)} tensors of a causal language model are not in it (such as {missing[0]}) and "
            "would be random; give a complete model"
        )
    _check_tokenizer(name, tokenizer, model)
    model = model.to(how.device).eval().requires_grad_(False)
    base = name if not local else None if _of_a_run(folder) else str(Path(where).resolve())
    loaded = LoadedModel(model, tokenizer, Template("alpaca"), name, beneath=Beneath(base), dtype=dtype)
    return _with_template(loaded, how.template, folder)


def _load_adapter(
    name: str, folder: Path, adapter: Path, how: _How, merge: bool, above: tuple[Path, ...]
) -> LoadedModel:
    with _below(adapter, above) as base:
        loaded = _load(base, how, True, (*above, adapter.resolve()))
    parts = None if merge else read_stack(adapter)
    options = {"torch_device": str(how.device), "is_trainable": not merge}
    with _telling(lambda error: _why_no_adapter(adapter, loaded.name, error)), silent_library():
        model = PeftModel.from_pretrained(loaded.model, str(adapter), **options)
        # Once more, for what it says of the tensors; from_pretrained only warns.
        result = model.load_adapter(str(adapter), "default", **options)
    wrong = [*result.missing_keys, *result.unexpected_keys]
    if wrong:
        raise DataError(_why_no_adapter(adapter, loaded.name, f"{len(wrong)} tensors differ, such as {wrong[0]}"))
    below = loaded.beneath
    if merge:
        factors = lora_factors(model.eval(), adapter) if below.base is not None else None
        loaded.beneath = Beneath() if factors is None else Beneath(below.base, stack(below.factors, factors))
        loaded.model = merge_adapter(model, str(adapter))
    elif parts is None:
        loaded.model = model
    else:
        loaded.model, lower = split(model, parts, str(adapter))
        loaded.beneath = Beneath(below.base, stack(below.factors, lower), str(parts["trained_on"]))
    loaded.model.eval()
    loaded.name = name
    return _with_own_tokenizer(loaded, folder, adapter, how)


def _with_own_tokenizer(loaded: LoadedModel, folder: Path, adapter: Path, how: _How) -> LoadedModel:
    """What was trained with is what is used: an adapter's own tokenizer and chat template, where it has them."""
    below = loaded.tokenizer.chat_template
    if (adapter / "tokenizer_config.json").is_file():
        with _telling(
            lambda error: (
                f"{adapter}: its own tokenizer cannot be loaded ({_short(error)}); mend it, or delete its "
                "tokenizer files for the base's"
            )
        ):
            tokenizer = AutoTokenizer.from_pretrained(str(adapter), **how.options)
        own = tokenizer.chat_template
        if own is None:
            tokenizer.chat_template = below
        _check_tokenizer(str(adapter), tokenizer, loaded.model)
        loaded.tokenizer = tokenizer
    else:
        path, own = adapter / "chat_template.jinja", None
        try:
            own = path.read_text(encoding="utf-8") if path.is_file() else None
        except ValueError as error:
            raise DataError(f"{path}: is not UTF-8; delete it, or copy it from the original model") from error
        loaded.tokenizer.chat_template = own or below
    if own is not None or (how.template == "auto" and load_template(folder) is not None):
        return _with_template(loaded, how.template, folder)
    if how.template == "auto":
        loaded.template_origin = loaded.template_origin.removesuffix(_FROM_BASE) + _FROM_BASE
    return loaded


def _with_template(loaded: LoadedModel, kind: str, place: Path) -> LoadedModel:
    saved = load_template(place) if kind == "auto" and place.is_dir() else None
    loaded.template = saved or choose_template(loaded.tokenizer, kind)
    chat = loaded.template.kind == "chat"
    if saved is not None:
        origin = " that was saved with it"
    elif kind != "auto":
        origin = ", as asked for"
    else:
        origin = " of its tokenizer" if chat else ", as it has no chat template"
    loaded.template_origin = ("the chat template" if chat else "the Alpaca template") + origin
    return loaded


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """An end, something to pad with, and no token that the model has no embedding for."""
    if tokenizer.eos_token_id is None:
        raise CompatibilityError(
            f"{name}: the tokenizer has no end-of-sequence token, so no completion could end; "
            "set eos_token in tokenizer_config.json"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    needed = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    refused = sorted(i for i in beyond if i in needed or i not in special)
    if refused:
        raise CompatibilityError(
            f"{name}: the tokenizer has {len(beyond)} tokens more than the embedding's {rows} rows (such as "
            f"{beyond[refused[0]]!r}, id {refused[0]}); give the model that was trained with them, or the tokenizer "
            "that belongs to this one"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in beyond:
        # Harmless: masks come from lengths and labels from concatenation, so no padding id is ever read.
        why = "no pad token" if tokenizer.pad_token_id is None else "no embedding for the pad token"
        console().print(f"{plain(name)}: {why}; padding with the end-of-sequence token, masked everywhere")
        tokenizer.pad_token = tokenizer.eos_token
    if not beyond:
        return

    def check(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        highest = int(args[0].max()) if args else -1
        if highest in beyond:
            raise DataError(f"{name}: a text holds {beyond[highest]!r}, a token that the model has no embedding for")

    # Special tokens without an embedding do no harm unless a text spells one (an image mark in a text model).
    model.get_input_embeddings().register_forward_pre_hook(check)


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


def base_of(name: str | LoadedModel) -> str | None:
    """The base model that a local adapter names; None where a model is whole weights or a hub id."""
    if isinstance(name, LoadedModel):
        return name.label if isinstance(name.model, PeftModel) else None
    adapter = _adapter_folder(Path(name))
    return None if adapter is None else _base_of(adapter)


def _adapter_folder(folder: Path) -> Path | None:
    found = (at for at in (folder / "adapter", folder) if (at / "adapter_config.json").is_file())
    return next(found, None)


def _base_of(adapter: Path) -> str:
    path = adapter / "adapter_config.json"
    try:
        config = read_json(path)
    except (OSError, DataError) as error:
        raise DataError(f"{path}: is damaged ({_short(error.__cause__ or error)}); save the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise DataError(f"{path}: names no kind of adapter (peft_type); save the adapter again")
    if kind in _PROMPTS:
        raise CompatibilityError(
            f"{path}: this kind of adapter ({kind.lower().replace('_', ' ')}) has no weights that could be merged "
            "into its base model; give a LoRA adapter or a whole model"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise DataError(f"{path}: names no base model; set base_model_name_or_path to the one it was trained on")
    beside = base.startswith(".") and not Path(base).is_dir() and (adapter / base).is_dir()
    return str((adapter / base).resolve()) if beside else base


@contextmanager
def _below(adapter: Path, above: tuple[Path, ...]) -> Iterator[str]:
    """The base model of an adapter, to be loaded within; what is wrong with it is said with the key that names it."""
    base, key = _base_of(adapter), f"{adapter}/adapter_config.json: base_model_name_or_path"
    if Path(base).is_dir() and (_adapter_folder(Path(base)) or Path(base)).resolve() in (*above, adapter.resolve()):
        raise DataError(f"{key} names {base}, the adapter itself; set it to the model that it was trained on")
    try:
        yield base
    except DataError as error:
        if not str(error).startswith(f"{base}: "):
            raise
        wrong = str(error).partition(";")[0]
        raise DataError(f"{key} names {wrong}; set it to where the base model is now") from error


def _weights_folder(folder: Path) -> Path:
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _of_a_run(folder: Path) -> bool:
    """Whether whole weights were written by an earlier stage, so that they move with its folder."""
    weights = _weights_folder(folder).resolve()
    above = list(weights.parents)[:3]  # RUN/model, RUN/snapshots/step-N/model
    return (weights / TEMPLATE_FILE).is_file() and any((place / "manifest.json").is_file() for place in above)


def _check_place(name: str) -> Path:
    """Refuses at once, before anything is read, what can be no model."""
    folder = Path(name)
    exists = os.path.isdir(folder)
    check_ordinary(folder, name)
    if os.path.isfile(folder):
        raise DataError(f"{name}: is a file; a model folder or a hub id is needed")
    if not exists and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"{name}: no such folder; a model folder or a hub id is needed")
    if exists and _adapter_folder(folder) is None:
        for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors weights")):
            if not any(_weights_folder(folder).glob(pattern)):
                raise DataError(f"{name}: a model folder without {what}; save it with model.save_pretrained")
    return folder


def _why_not_loaded(name: str, folder: Path, error: Exception) -> str:
    if folder.is_dir():
        return f"{name}: cannot be loaded as a causal language model ({_short(error)})"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__
    if cause is not None:
        what = "is gated: accept its terms on the hub and log in (hf auth login), or"
    elif offline():
        what = "no such model folder, and as a hub id: HF_HUB_OFFLINE forbids the hub;"
    else:
        what = "no such model folder, and as a hub id: not found on the hub or not reachable;"
    return f"{name}: {what} give the path of a downloaded model folder"


def _why_no_adapter(adapter: Path, base: str, error: Exception | str) -> str:
    weights = next((file for name in _ADAPTER_WEIGHTS if (file := adapter / name).is_file()), None)
    if weights is None:
        return f"{adapter}: has no {_ADAPTER_WEIGHTS[0]}; save the adapter again"
    if isinstance(error, (SafetensorError, UnpicklingError, EOFError)) or "PytorchStreamReader" in str(error):
        return f"{weights}: is damaged ({_short(error)}); save the adapter again"
    return (
        f"{weights}: does not fit its base model {base} ({_short(error)}); base_model_name_or_path in "
        f"{adapter}/adapter_config.json must name the model it was trained on, with the same vocabulary"
    )


def _short(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over vocabulary and special tokens; equal for tokenizers that give equal ids."""
    vocabulary, special = sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())
    return sha256_text(repr(vocabulary) + repr(special))
