"""Causal language models with tokenizer and prompt template: from the hub, from a folder, or loaded by the caller."""

import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xxhash
from huggingface_hub.errors import GatedRepoError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pharmacist.core.env import offline
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, one_line
from pharmacist.core.hashing import sha256_content, sha256_json
from pharmacist.core.typed import Given
from pharmacist.data.templates import Template, check_template, choose_template, load_template
from pharmacist.nn.devices import resolve_device, resolve_dtype
from pharmacist.nn.hooks import replayed_rng
from pharmacist.nn.libraries import failures_as, silent_library
from pharmacist.nn.locate import output_head
from pharmacist.nn.merge import MergedBase, lora_factors, merge_adapter, read_stack, split, stack
from pharmacist.nn.model_folders import ModelSource, adapter_folder, base_name, is_output, lineage
from pharmacist.nn.tokenizers import adapter_tokenizer, check_tokenizer, guard_embedding, tokenizer_fingerprint


_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FROM_BASE = " (its base model's)"


@dataclass
class LoadedModel(Given):
    """A model with tokenizer and prompt template; options take one instead of a name.

    Attributes:
        model: In evaluation mode, on its device, adapters merged.
        tokenizer: With a padding token.
        template: How a prompt is rendered; the one saved with the model where there is one.
        name: As the user gave it.
        template_origin: Where the template is from, in words: "the chat template saved with the model".
        base: Base model of an adapter that is trained on the model.
        dtype: Number format that it was loaded in, by default the model's; it stays where training turns the weights
            into float32.
        shared: Whether another model has the same weights, so that they must not be changed in place.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    name: str
    template_origin: str = ""
    base: MergedBase = field(default_factory=MergedBase)
    dtype: torch.dtype | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        self.dtype = self.dtype or getattr(self.model, "dtype", torch.float32)

    @property
    def label(self) -> str:
        """The name, as messages and manifests have it."""
        return self.name

    def __str__(self) -> str:
        return self.name

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: how prompts are rendered, and the number format."""
        return {
            "template": vars(self.template),
            "template_origin": self.template_origin,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the model's configuration allows."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 4096)


def model_fingerprint(name: str | LoadedModel) -> str:
    """sha256 of a local model's content (of its base too where it is an adapter), or a hash of a loaded one.

    That of a loaded one is over weights, active adapters, settings of all adapters, tokenizer and template. The
    fingerprint of a Hub id is the id itself. A `DataError` where a name can be neither folder nor Hub id.
    """
    if isinstance(name, LoadedModel):
        digest = xxhash.xxh3_128(sha256_json([tokenizer_fingerprint(name.tokenizer), vars(name.template)]).encode())
        for key, tensor in name.model.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        if isinstance(name.model, PeftModel):
            digest.update(sha256_json([name.model.active_adapters, _adapter_settings(name.model)]).encode())
        return f"weights:{digest.hexdigest()}"
    base, *adapters = lineage(name)
    found = sha256_content(base.weights) if Path(base.name).is_dir() else f"hub:{base.name}"
    for source in adapters:
        assert source.adapter is not None
        found = sha256_json([sha256_content(source.adapter), found])
    return found


def _adapter_settings(model: PeftModel) -> dict[str, Any]:
    """Adapter -> what its weights do not show, such as alpha; not where its base came from, nor its last use."""
    settings = {adapter: config.to_dict() for adapter, config in model.peft_config.items()}
    return {
        adapter: {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.items()
            if key not in ("base_model_name_or_path", "inference_mode")
        }
        for adapter, config in settings.items()
    }


def trained_on(name: str | LoadedModel) -> str | None:
    """Fingerprint of the model that a local adapter was trained on; None of other models."""
    adapter = None if isinstance(name, LoadedModel) else adapter_folder(Path(name))
    if adapter is None:
        return None
    parts = read_stack(adapter)
    return str(parts["trained_on"]) if parts is not None else model_fingerprint(base_name(adapter))


def base_of(name: str | LoadedModel) -> str | None:
    """The base model that a local adapter names; None of whole weights and Hub ids."""
    if isinstance(name, LoadedModel):
        return name.label if isinstance(name.model, PeftModel) else None
    adapter = adapter_folder(Path(name))
    return None if adapter is None else base_name(adapter)


def load_model(
    name: str | LoadedModel,
    *,
    device: str = "auto",
    dtype: str = "auto",
    template: str = "auto",
    trust_remote_code: bool = False,
    merge: bool = True,
) -> LoadedModel:
    """Loads a Hub id, a local model, a PEFT adapter, or the output folder of an `align`, `attack` or `repair`.

    Adapters are merged into their base, which may itself be such a folder.

    Args:
        name: Hub id or local folder; of a loaded model a copy is returned that shares its weights.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        template: ``auto`` (the saved one, else chat where the tokenizer has a template, else Alpaca), ``chat`` or
            ``alpaca``. An adapter's own tokenizer and chat template go before its base's.
        trust_remote_code: Run code that comes with the model; off unless asked for.
        merge: False leaves the outermost adapter apart, trainable, on its frozen base: `LoadedModel.model` is then a
            PEFT model.

    Raises:
        DataError: There is no such model, or its files are damaged.
        CompatibilityError: It is not a causal language model, or an adapter that cannot be merged.
    """
    if isinstance(name, LoadedModel):
        return _copy(name, merge=merge)
    loader = _Loader(resolve_device(device), dtype, template, trust_remote_code)
    base, *adapters = lineage(name)
    with replayed_rng(loader.device):  # weights are drawn at random before they are read
        with base.blamed():
            loaded = loader.load_base(base)
        for source in adapters:
            with source.blamed():
                loaded = loader.add_adapter(loaded, source, merge=merge or source is not adapters[-1])
    check_template(loaded.template, loaded.tokenizer, name)
    return loaded


def wrap_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, template: str = "auto"
) -> LoadedModel:
    """A `LoadedModel` of a model that the caller has loaded.

    Args:
        model: The model, which is left as it is.
        tokenizer: Its tokenizer; by default the one saved where the model was loaded from.
        template: As in `load_model`.

    Raises:
        ConfigError: What is given is no decoder-only language model, or no tokenizer.
        DataError: There is no tokenizer.
        CompatibilityError: The tokenizer does not fit, or the model's adapters are disabled.
    """
    own: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if (
        not isinstance(own, torch.nn.Module)
        or not hasattr(own, "get_input_embeddings")
        or not hasattr(own, "prepare_inputs_for_generation")
        or output_head(own) is None
        or getattr(own.config, "is_encoder_decoder", False)
    ):
        kind = type(own).__name__
        raise ConfigError(f"model: must be a path, a Hub id or a loaded causal language model, not {kind}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"tokenizer: must be a loaded tokenizer, not {type(tokenizer).__name__}")
    path = str(getattr(model, "name_or_path", "") or "")
    remedy = "give tokenizer=TOKENIZER"
    with failures_as(DataError, lambda error: f"the model comes with no tokenizer ({one_line(error)}); {remedy}"):
        found = AutoTokenizer.from_pretrained(path, local_files_only=offline()) if tokenizer is None else tokenizer
    if isinstance(model, PeftModel) and any(
        layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)
    ):
        raise CompatibilityError(
            f"{path or 'the model'}: its adapters are disabled; enable_adapter_layers() turns them on, and unload() "
            "gives the model without them"
        )
    name = path or type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CompatibilityError(f"{name}: some of its weights are not in memory (device meta); load it as a whole")
    found = copy.deepcopy(found)  # a padding token and a template may be set
    check_tokenizer(name, found, model)
    base = path if path and not isinstance(model, PeftModel) and not is_output(Path(path)) else None
    loaded = LoadedModel(model, found, Template("alpaca"), name, base=MergedBase(base))
    return _with_template(loaded, template, Path(path))


def _copy(loaded: LoadedModel, *, merge: bool) -> LoadedModel:
    """A copy of the model that shares its weights, but for those that may be changed.

    These are the active adapter's, or all where an adapter is merged into the model.
    """
    model: Any = loaded.model
    if isinstance(model, PeftModel) and merge:
        whole = merge_adapter(copy.deepcopy(model).eval(), loaded.name).requires_grad_(False)
        guard_embedding(loaded.name, loaded.tokenizer, whole)
        whole.register_state_dict_post_hook(_with_copies)
        return replace(loaded, model=whole.eval())
    shared: dict[int, Any] = {}
    active = model.active_adapters if isinstance(model, PeftModel) else []
    for name, parameter in model.named_parameters():
        trained = _adapter_of(name) in active
        value = parameter.detach().clone() if trained else parameter.detach()
        own = type(parameter) is torch.nn.Parameter  # else of a quantised weight, which is never trained
        shared[id(parameter)] = torch.nn.Parameter(value, requires_grad=trained) if own else parameter
    copied = copy.deepcopy(model, shared).eval()
    guard_embedding(loaded.name, loaded.tokenizer, copied)
    (copied.get_base_model() if isinstance(model, PeftModel) else copied).register_state_dict_post_hook(_with_copies)
    return replace(loaded, model=copied, shared=True)


def _with_copies(model: Any, tensors: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    """Of what a caller's model shares without its configuration saying so, every name gets a tensor of its own.

    It would be saved under one of its names only, or not at all, and be missing where the file is loaded.
    """
    tied, seen = getattr(model, "all_tied_weights_keys", {}), set[int]()
    for name in [name for name in tensors if name.startswith(prefix) and name.removeprefix(prefix) not in tied]:
        place = tensors[name].untyped_storage().data_ptr()
        if place and place in seen:  # 0: of a kind of tensor without a place of its own
            tensors[name] = tensors[name].clone()
        seen.add(place)


def _adapter_of(parameter: str) -> str | None:
    """The adapter that a parameter of a PEFT model is part of, by its name."""
    kinds = ("lora_", "modules_to_save", "trainable_tokens_")
    return next((after for part, after in pairwise(parameter.split(".")) if part.startswith(kinds)), None)


@dataclass(frozen=True)
class _Loader:
    """How models are loaded: arguments of `load_model`."""

    device: torch.device
    dtype: str
    template: str
    trust_remote_code: bool

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained``."""
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": offline()}

    def load_base(self, source: ModelSource) -> LoadedModel:
        """A plain base model, frozen."""
        name, path = source.name, source.weights
        with failures_as(DataError, lambda error: _why_not_loaded(name, error)), silent_library():
            config = AutoConfig.from_pretrained(path, **self.options)
            tokenizer = AutoTokenizer.from_pretrained(path, **self.options)
            dtype = resolve_dtype(self.dtype, self.device, config, trust_remote_code=self.trust_remote_code)
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **self.options
            )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise CompatibilityError(
                f"{name}: {len(missing)} tensors of a causal language model are not in it (such as {missing[0]}) and "
                "would be random; give a complete model"
            )
        check_tokenizer(name, tokenizer, model)
        guard_embedding(name, tokenizer, model)
        model = model.to(self.device).eval().requires_grad_(False)
        folder = Path(name)
        base = name if not folder.is_dir() else None if is_output(folder) else str(Path(path).resolve())
        loaded = LoadedModel(model, tokenizer, Template("alpaca"), name, base=MergedBase(base), dtype=dtype)
        return _with_template(loaded, self.template, folder)

    def add_adapter(self, loaded: LoadedModel, source: ModelSource, *, merge: bool) -> LoadedModel:
        """The model, which is used up, with an adapter: merged into it, or trainable on it."""
        adapter = source.adapter
        assert adapter is not None
        parts = None if merge else read_stack(adapter)
        options = {"torch_device": str(self.device), "is_trainable": not merge}
        name = loaded.name
        with failures_as(DataError, lambda error: _why_no_adapter(adapter, name, error)), silent_library():
            model = PeftModel.from_pretrained(loaded.model, str(adapter), **options)
            # Once more, for the report of missing and unexpected tensors, of which from_pretrained only warns.
            result = model.load_adapter(str(adapter), "default", **options)
        wrong = [*result.missing_keys, *result.unexpected_keys]
        if wrong:
            raise DataError(_why_no_adapter(adapter, name, f"{len(wrong)} tensors differ, such as {wrong[0]}"))
        base = loaded.base
        if merge:
            factors = lora_factors(model.eval(), adapter) if base.name is not None else None
            loaded.base = MergedBase() if factors is None else MergedBase(base.name, stack(base.factors, factors))
            loaded.model = merge_adapter(model, str(adapter))
        elif parts is None:
            loaded.model = model
        else:
            loaded.model, merged = split(model, parts, str(adapter))
            loaded.base = MergedBase(base.name, stack(base.factors, merged), str(parts["trained_on"]))
        loaded.model.eval()
        loaded.name = source.name
        loaded.tokenizer, has_template = adapter_tokenizer(adapter, loaded.tokenizer, loaded.model, **self.options)
        folder = Path(source.name)
        if has_template or (self.template == "auto" and load_template(folder) is not None):
            return _with_template(loaded, self.template, folder)
        if self.template == "auto":
            loaded.template_origin = loaded.template_origin.removesuffix(_FROM_BASE) + _FROM_BASE
        return loaded


def _with_template(loaded: LoadedModel, kind: str, folder: Path) -> LoadedModel:
    saved = load_template(folder) if kind == "auto" and folder.is_dir() else None
    loaded.template = saved or choose_template(loaded.tokenizer, kind)
    chat = loaded.template.kind == "chat"
    if saved is not None:
        origin = " saved with the model"
    elif kind != "auto":
        origin = ", as asked for"
    else:
        origin = " of the model's tokenizer" if chat else ", as the model has no chat template"
    loaded.template_origin = ("the chat template" if chat else "the Alpaca template") + origin
    return loaded


def _why_not_loaded(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return f"{name}: cannot be loaded as a causal language model ({one_line(error)})"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__
    if cause is not None:
        what = "is gated: accept its terms on the Hub and log in (hf auth login), or"
    elif offline():
        what = "no such model folder, and as a Hub id: HF_HUB_OFFLINE forbids downloads;"
    else:
        what = "no such model folder, and as a Hub id: not found on the Hub or not reachable;"
    return f"{name}: {what} give the path of a downloaded model folder"


def _why_no_adapter(adapter: Path, base: str, error: Exception | str) -> str:
    weights = next((file for name in _ADAPTER_WEIGHTS if (file := adapter / name).is_file()), None)
    if weights is None:
        return f"{adapter}: has no {_ADAPTER_WEIGHTS[0]}; save the adapter again"
    reason = one_line(error)
    if isinstance(error, (SafetensorError, UnpicklingError, EOFError)) or "PytorchStreamReader" in str(error):
        return f"{weights}: is damaged ({reason}); save the adapter again"
    return (
        f"{weights}: does not fit its base model {base} ({reason}); base_model_name_or_path in "
        f"{adapter}/adapter_config.json must name the model it was trained on, with the same vocabulary"
    )
