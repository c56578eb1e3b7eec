"""Every alignment-stage defense in settings in which it acts on a single step, and with strength 0; what it reads."""

from typing import Any

import datasets
import torch

from pharmacist.data.streams import PairedRows, SideStream
from pharmacist.data.tokenize import encode
from pharmacist.defenses import DEFENSES
from pharmacist.training.strategy import GradientStrategy
from tests.support.training_toy import Setting, rows


ON: dict[str, dict[str, Any]] = {
    "vaccine": {"rho": 0.5},
    "t-vaccine": {"rho": 0.5, "layers": 1, "sample_every": 2, "score_every": 4, "score_rows": 4},
    "repnoise": {"alpha": 0.5, "beta": 0.1},
    "booster": {"lam": 5.0, "alpha": 0.1, "rho": 0.1},
    "tar": {"lam": 1.0, "inner_steps": 3, "every": 2, "inner_learning_rates": [1e-3], "representation": 0.5},
}
OFF: dict[str, dict[str, Any]] = {
    "vaccine": {"rho": 0.0},
    "t-vaccine": ON["t-vaccine"] | {"rho": 0.0, "layers": 2},
    "repnoise": {"alpha": 0.0, "beta": 0.0},
    "booster": {"lam": 0.0},
    "tar": ON["tar"] | {"lam": 0.0, "representation": 0.0},
}
NAMES = sorted(ON)
FINETUNING: dict[str, dict[str, Any]] = {
    "ldifs": {"lam": 100.0},
    "ewc": {"lam": 1e3, "rows": 10},
    "kl": {"lam": 10.0},
    "constrained-sft": {"beta": 1.0},
    "lisa": {"rho": 10.0, "align_steps": 1, "finetune_steps": 2},
    "vlguard": {"mode": "joint", "lam": 0.5},
}
"""Fine-tuning-stage defenses in settings in which they act within three steps."""


def build(name: str, options: dict[str, Any] | None = None) -> GradientStrategy:
    """The defense, acting unless told otherwise."""
    return DEFENSES.build(name, ON[name] if options is None else options)


def harmful_rows(n: int) -> datasets.Dataset:
    """A harmful row for each of `tests.support.training_toy.rows`, with the same prompt and number."""
    own, other = rows(n), rows(n, seed=1)
    made = [{**mine, "completion": their["completion"]} for mine, their in zip(own, other, strict=True)]
    return datasets.Dataset.from_list(made)


def streams(own: Setting, batch_size: int = 2) -> dict[str, Any]:
    """All streams there are."""
    loaded = own.loaded
    harmful = encode(harmful_rows(len(own.encoded)), loaded.tokenizer, loaded.template, max_length=64)
    held_out = encode(rows(6, seed=5), loaded.tokenizer, loaded.template, max_length=64)
    place = {"pad_token_id": loaded.tokenizer.pad_token_id, "device": torch.device("cpu")}
    sets = {"harmful": harmful, "held_out": held_out, "retain": own.encoded}
    found: dict[str, Any] = {
        name: SideStream(encoded, batch_size, seed=number, **place)
        for number, (name, encoded) in enumerate(sets.items())
    }
    partners = {row: position for position, row in enumerate(harmful.dataset["row"])}
    return found | {"paired": PairedRows(harmful, partners, **place)}
