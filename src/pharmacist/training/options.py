"""Options of every training stage, and how they become transformers and PEFT objects."""

import copy
import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Lt

from pharmacist.core.errors import ConfigError
from pharmacist.core.options import ChosenRowOptions, RunOptions, TokenOptions
from pharmacist.core.registry import closest
from pharmacist.core.typed import AtLeast1, Checked


if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import TrainingArguments


@dataclass
class LoraOptions(Checked):
    """Shape of the LoRA adapter that is trained."""

    r: AtLeast1 = 8
    """Rank."""
    alpha: AtLeast1 = 16
    """Scale: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: list[str] | None = None
    """Modules by the end of their names (q_proj v_proj); all linear layers but the output head by default."""

    @classmethod
    def option_name(cls, field: str) -> str:
        """A field as messages name it."""
        return f"lora.{field}"

    def config(self) -> "LoraConfig":
        """PEFT's configuration of the adapter."""
        from peft import LoraConfig

        modules: Any = self.target_modules or "all-linear"
        shape: dict[str, Any] = {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return LoraConfig(**shape, bias="none", task_type="CAUSAL_LM", target_modules=modules)


@dataclass
class GivenLora(LoraOptions):
    """An adapter as a PEFT configuration shapes it; `other` is what of that the options do not say."""

    other: dict[str, str] = field(default_factory=dict)
    _config = typing.cast(Any, None)  # of an instance; no option

    @classmethod
    def of(cls, config: "LoraConfig") -> "GivenLora":
        """The options of a configuration, which is used as it is."""
        target = config.target_modules
        known = {"r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "inference_mode"}
        other = {name: str(value) for name, value in config.to_dict().items() if name not in known and value}
        found = cls(
            r=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=sorted(target) if isinstance(target, set | list) else target and [target],
            other=other,
        )
        found._config = config
        return found

    def config(self) -> "LoraConfig":
        """A copy, since PEFT notes in it where it was used."""
        return copy.copy(self._config)


@dataclass(kw_only=True)
class TrainingStageOptions(RunOptions, ChosenRowOptions, TokenOptions):
    """What `align` and `attack` have in common."""

    model: str
    """Model to train: local folder, the folder of an earlier stage, or a hub id."""
    tuning: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter on the frozen model, or all its weights."""
    merge: bool = False
    """Also write model/: the whole model with the adapter merged into it."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """The adapter."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' TrainingArguments, as --train.max_steps 20; the stage's own defaults are in its docs."""

    TRAIN_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """The stage's own defaults for `train`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = check_train_options(self.train)

    @property
    def effective_train(self) -> dict[str, Any]:
        """`train` over the stage's defaults."""
        return {**self.TRAIN_DEFAULTS, **self.train}


_OURS = {
    "output_dir": "--output-dir",
    "seed": "--seed",
    "data_seed": "--seed",
    "use_cpu": "--device",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype bfloat16 (scaled gradients are not what a defense expects)",
    "disable_tqdm": "--quiet",
    "push_to_hub": "the hub's own tools on the finished folder",
    "resume_from_checkpoint": "the same command again, which resumes",
    "auto_find_batch_size": "a fixed batch size",
    "deepspeed": "accelerate launch with DDP",
}
_CHECKPOINTS = ("save_strategy", "save_steps", "save_total_limit", "save_only_model")
_OURS |= dict.fromkeys(_CHECKPOINTS, "--checkpoint-seconds")
_OURS |= dict.fromkeys(("eval_strategy", "do_eval", "do_predict", "load_best_model_at_end"), "pharmacist evaluate")
"""Fields of `TrainingArguments` that something else decides, and what."""
_FIXED = (
    "remove_unused_columns",
    "label_names",
    "do_train",
    "label_smoothing_factor",
    "logging_nan_inf_filter",
    "ignore_data_skip",
    "average_tokens_across_devices",
    "use_liger_kernel",
)
_DECIDED = {"output_dir", "seed", "data_seed", "use_cpu", "bf16", "disable_tqdm", *_CHECKPOINTS, *_FIXED}
"""What `train_options` leaves to the stage, whatever it is."""
_LEAST = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "neftune_noise_alpha": 0}
"""What transformers lets pass below, and then trains nothing or fails in the middle."""
_REMOVED = {
    "warmup_ratio": "give warmup_steps below 1, which is the ratio",
    "evaluation_strategy": "use pharmacist evaluate",
    "overwrite_output_dir": "use --overwrite",
    "no_cuda": "use --device cpu",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "weights are always safetensors",
    "group_by_length": "give train_sampling_strategy",
}


def train_options(arguments: "TrainingArguments", defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``train`` that say the same as some `TrainingArguments`: those that are not transformers' own.

    Args:
        arguments: As the user made them. Output folder, checkpoints, seeds, device and number format are the stage's.
        defaults: The stage's own, in whose place the arguments' values are taken, whatever they are.
    """
    from transformers import TrainingArguments

    usual = TrainingArguments(use_cpu=arguments.use_cpu)
    given = {}
    for item in dataclasses.fields(TrainingArguments):
        value = getattr(arguments, item.name)
        if item.init and item.name not in _DECIDED and (item.name in defaults or value != getattr(usual, item.name)):
            given[item.name] = value.value if isinstance(value, Enum) else value
    return given


def check_train_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the values of the types that `transformers.TrainingArguments` gives its fields."""
    if not given:
        return {}
    from pydantic import PydanticUserError, TypeAdapter, ValidationError
    from transformers import TrainingArguments

    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    hints = typing.get_type_hints(TrainingArguments)
    checked = {}
    for name, value in given.items():
        if name in _OURS:
            raise ConfigError(f"train.{name}: is decided by another option; use {_OURS[name]}")
        if name in _FIXED:
            raise ConfigError(f"train.{name}: cannot be changed here; leave it out")
        if name in _REMOVED:
            raise ConfigError(f"train.{name}: transformers no longer has it; {_REMOVED[name]}")
        if name not in known:
            raise ConfigError(f"train.{name}: transformers.TrainingArguments has no such field{closest(name, known)}")
        try:
            found = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"train.{name}: {value!r} does not fit ({error.errors()[0]['msg']})") from error
        except PydanticUserError:  # a type that TrainingArguments checks itself
            found = value
        if isinstance(found, float) and not math.isfinite(found):
            raise ConfigError(f"train.{name}: {value!r} is not a finite number")
        if isinstance(found, int | float) and found < _LEAST.get(name, found):
            raise ConfigError(f"train.{name}: {value!r} must be at least {_LEAST[name]}")
        if name == "num_train_epochs" and found <= 0:
            raise ConfigError(f"train.{name}: {value!r} must be above 0")
        if name == "max_steps" and found < 1 and found != -1:  # transformers trains one step, or all epochs
            raise ConfigError(f"train.{name}: {value!r} must be at least 1, or -1 for num_train_epochs")
        checked[name] = found
    return checked


def training_arguments(
    options: TrainingStageOptions, *, folder: str, device: "torch.device", dtype: "torch.dtype", seed: int
) -> "TrainingArguments":
    """The `TrainingArguments` of a stage, with a folder for checkpoints and a seed of dropout and data order."""
    import torch
    from transformers import TrainingArguments

    values: dict[str, Any] = {
        "logging_steps": 10,
        "report_to": "none",
        "dataloader_pin_memory": device.type == "cuda",
        **options.effective_train,
    }
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # the older name and the newer one
        if values.get(name):
            values.setdefault(f"{name}_kwargs", {"use_reentrant": False})
    try:
        return TrainingArguments(
            output_dir=folder,
            seed=seed,
            data_seed=seed,
            use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            save_strategy="no",
            save_total_limit=2,
            logging_nan_inf_filter=False,
            **values,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
