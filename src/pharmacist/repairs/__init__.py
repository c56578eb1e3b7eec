"""Repairs of a model after a user's fine-tuning. A new one is one file and one line in `REPAIRS`."""

from typing import TYPE_CHECKING

from pharmacist.core.registry import Registry


if TYPE_CHECKING:
    from pharmacist.repairs.base import Repair

REPAIRS: "Registry[Repair]" = Registry(
    "repair",
    {
        "antidote": "pharmacist.repairs.antidote:Antidote",
        "nlsr": "pharmacist.repairs.nlsr:NLSR",
        "safe-lora": "pharmacist.repairs.safe_lora:SafeLora",
    },
    group="pharmacist.repairs",
    options={"safe-lora": "pharmacist.repairs.options:SafeLoraConfig"},
)
