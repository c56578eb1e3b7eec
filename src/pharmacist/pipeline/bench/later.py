"""What can be done during or after a user's fine-tuning: fine-tuning-stage defenses and repairs, as one axis."""

from dataclasses import dataclass
from typing import Any

from pharmacist.core.registry import Registry
from pharmacist.defenses import DEFENSES
from pharmacist.repairs import REPAIRS


@dataclass(frozen=True)
class NoOptions:
    """It has none."""


class NoLaterDefense:
    """Nothing is done."""

    Config = NoOptions


LATER_DEFENSES: Registry[Any] = Registry(
    "later defense",
    {
        **{name: place for name, place in DEFENSES.table().items() if ".finetuning." in place},
        **REPAIRS.table(),
        "none": f"{__name__}:NoLaterDefense",
    },
    group="pharmacist.later_defenses",
)
