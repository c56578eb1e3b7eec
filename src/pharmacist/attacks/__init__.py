"""Kinds of attack: what a user's fine-tuning set is made of. A new kind is one file and one line in `ATTACKS`."""

from pharmacist.attacks.base import Attack
from pharmacist.core.registry import Registry


ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "mix": "pharmacist.attacks.mix:MixAttack",
        "harmful": "pharmacist.attacks.harmful:HarmfulAttack",
        "benign": "pharmacist.attacks.benign:BenignAttack",
        "identity": "pharmacist.attacks.identity:IdentityAttack",
    },
    group="pharmacist.attacks",
)

__all__ = ["ATTACKS", "Attack"]
