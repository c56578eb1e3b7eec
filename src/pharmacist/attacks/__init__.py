"""Kinds of attack: ways to make a user's fine-tuning set. A new kind is one file and one line in `ATTACKS`."""

from pharmacist.attacks.kinds import Attack as Attack
from pharmacist.core.registry import Registry


ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "mix": "pharmacist.attacks.kinds:MixAttack",
        "harmful": "pharmacist.attacks.kinds:HarmfulAttack",
        "benign": "pharmacist.attacks.kinds:BenignAttack",
        "identity": "pharmacist.attacks.kinds:IdentityAttack",
    },
    group="pharmacist.attacks",
)
