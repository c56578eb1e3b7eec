"""Options of every training stage, and the transformers and PEFT objects that are made from them."""

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
from pharmacist.core.progress import warn
from pharmacist.core.registry import closest
from pharmacist.core.typed import AtLeast1, Checked


if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import TrainingArguments


@dataclass
class LoraOptions(Checked):
    """Configuration of the LoRA adapter that is trained."""

    r: AtLeast1 = 8
    """Rank of the LoRA adapter."""
    alpha: AtLeast1 = 16
    """Scale of the LoRA adapter: its update is multiplied by alpha / r."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: list[str] | None = None
    """Modules to adapt, given by the ends of their names (q_proj v_proj); by default all linear layers except the
    output head."""

    def config(self) -> "LoraConfig":
        """PEFT's configuration of the adapter."""
        from peft import LoraConfig

        modules: Any = self.target_modules or "all-linear"
        shape: dict[str, Any] = {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return LoraConfig(**shape, bias="none", task_type="CAUSAL_LM", target_modules=modules)


_NO_INITS = {
    "pissa_niter": "takes something else from the base model's weights each time that the adapter is loaded; give "
    "'pissa', which is exact",
    "eva": "needs a pass over the data that is not made here; leave it out",
}
"""Initial weights of adapters that would not be what they say, by the beginning of their names, and why."""


@dataclass
class PeftLoraOptions(LoraOptions):
    """Shape of a LoRA adapter as a PEFT configuration has it; `other` are settings for which there is no option."""

    other: dict[str, str] = field(default_factory=dict)
    _config = typing.cast(Any, None)  # of an instance; no option

    @classmethod
    def of(cls, config: "LoraConfig") -> "PeftLoraOptions":
        """The options of a configuration, which itself makes the adapter."""
        for init, why in _NO_INITS.items():
            if str(config.init_lora_weights).startswith(init):
                raise ConfigError(f"peft_config: init_lora_weights {config.init_lora_weights!r} {why}")
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
        """A copy of the configuration, which PEFT changes."""
        return copy.copy(self._config)


PROTOCOL = {
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 10,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.1,
}
"""Fields of `TrainingArguments` in the alignment-stage papers (batch of 10, 20 epochs as in T-Vaccine and Booster)."""


@dataclass(kw_only=True)
class TrainingStageOptions(RunOptions, ChosenRowOptions, TokenOptions):
    """Options of the stages `align` and `attack`."""

    model: str
    """Model to train: a local folder, the folder of an earlier stage, or a Hub id."""
    tuning: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter on the frozen model, or all weights of the model."""
    merge: bool = False
    """Also write model/, the whole model with the adapter merged into it."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """The adapter."""
    train: dict[str, Any] = field(default_factory=dict, metadata={"keys": "transformers:TrainingArguments"})
    """Fields of transformers' TrainingArguments, such as --train.max_steps 20; the docs list the defaults."""

    TRAIN_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """The stage's own defaults for `train`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = check_train_options(self.train)

    @property
    def effective_train(self) -> dict[str, Any]:
        """The stage's defaults, overridden by `train`."""
        return {**self.TRAIN_DEFAULTS, **self.train}


_CHECKPOINTS = ("save_strategy", "save_steps", "save_total_limit", "save_only_model")
_HUB = "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision".split()
_EVALUATION = (
    "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object per_device_eval_batch_size prediction_loss_only "
    "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval load_best_model_at_end "
    "metric_for_best_model greater_is_better"
).split()
_OWN = {"remove_unused_columns": False, "label_names": ["labels"], "logging_nan_inf_filter": False}
"""Fields that have these values in every stage."""
_FIXED = (
    *_OWN,
    "do_train",
    "label_smoothing_factor",
    "ignore_data_skip",
    "average_tokens_across_devices",
    "use_liger_kernel",
    "liger_kernel_config",
)
_SET_BY_OPTION = {
    "output_dir": "--output-dir",
    "seed": "--seed",
    "data_seed": "--seed",
    "use_cpu": "--device",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype bfloat16 (scaled gradients are not what a defense expects)",
    "disable_tqdm": "--quiet",
    "resume_from_checkpoint": "the same command again, which resumes",
    "auto_find_batch_size": "a fixed batch size",
    "deepspeed": "accelerate launch with DDP",
    **dict.fromkeys(_CHECKPOINTS, "--checkpoint-seconds"),
    **dict.fromkeys(_HUB, "the Hub's own tools on the finished folder"),
    **dict.fromkeys(_EVALUATION, "pharmacist evaluate"),
}
_REMOVED = {
    "warmup_ratio": "give warmup_steps below 1, which is the ratio",
    "evaluation_strategy": "use pharmacist evaluate",
    "overwrite_output_dir": "use --overwrite",
    "no_cuda": "use --device cpu",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "weights are always safetensors",
    "group_by_length": "give train_sampling_strategy",
}
_REFUSED = {
    **{name: f"is decided by another option; use {option}" for name, option in _SET_BY_OPTION.items()},
    **dict.fromkeys(_FIXED, "cannot be changed here; leave it out"),
    **{name: f"transformers no longer has it; {remedy}" for name, remedy in _REMOVED.items()},
}
"""Fields of `TrainingArguments` that ``train`` does not take, and why."""
_DECIDED = {"output_dir", "seed", "data_seed", "use_cpu", "bf16", "disable_tqdm", "do_train", *_CHECKPOINTS}
"""Fields that the stage sets, whatever arguments from Python say."""
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "neftune_noise_alpha": 0,
}
"""Least values; transformers itself accepts lower ones, or refuses them only when it has begun."""


def train_options(arguments: "TrainingArguments", defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``train`` that equal some `TrainingArguments`: the values that differ from transformers' defaults.

    Those that a stage cannot give are among them, for `check_train_options` to refuse; output folder, checkpoints,
    seeds, device and number format are left out, with a warning about those that the stage decides otherwise. For the
    fields of `defaults`, those of the stage, the arguments' values are taken in any case.

    Raises:
        ConfigError: A subclass, such as TRL's SFTConfig, was given a field that only its own trainer follows.
    """
    from transformers import TrainingArguments

    kind, usual = type(arguments), TrainingArguments(use_cpu=arguments.use_cpu)
    for name, value in vars(kind(use_cpu=arguments.use_cpu)).items():
        if name in kind.__dataclass_fields__ and not hasattr(usual, name) and getattr(arguments, name) != value:
            raise ConfigError(f"args: {name} of {kind.__name__} has no effect here; leave it out, or train with TRL")
    if ignored := [name for name in (*_CHECKPOINTS, "data_seed") if getattr(arguments, name) != getattr(usual, name)]:
        warn(
            f"args: no effect here: {', '.join(ignored)} (checkpoints come by the clock; one seed decides everything)"
        )
    options = {}
    for item in dataclasses.fields(TrainingArguments):
        name, value, default = item.name, getattr(arguments, item.name), getattr(usual, item.name)
        asked = name in defaults or value not in (default, _OWN.get(name, default))
        if item.init and name not in _DECIDED and asked:
            options[name] = value.value if isinstance(value, Enum) else value
    return options


def check_train_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks options of ``train`` and converts their values to the types of the fields of `TrainingArguments`."""
    if not options:
        return {}
    from pydantic import PydanticUserError, TypeAdapter, ValidationError
    from transformers import TrainingArguments

    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    hints = typing.get_type_hints(TrainingArguments)
    checked = {}
    for name, value in options.items():
        if name in _REFUSED:
            raise ConfigError(f"train.{name}: {_REFUSED[name]}")
        if name not in known:
            nearest = closest(name, known, "its documentation lists them")
            raise ConfigError(f"train.{name}: transformers.TrainingArguments has no such field{nearest}")
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
    options: TrainingStageOptions, *, folder: str, device: "torch.device", bf16: bool, seed: int
) -> "TrainingArguments":
    """Makes the `TrainingArguments` of a stage.

    Checkpoints go to `folder`; `bf16` passes are in bfloat16 instead of float32; `seed` is that of dropout and order.
    """
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
            bf16=bf16,
            disable_tqdm=True,
            save_strategy="no",
            save_total_limit=2,
            **_OWN,
            **values,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
