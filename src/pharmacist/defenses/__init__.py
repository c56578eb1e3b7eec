"""Training-time defenses as gradient strategies. A new one is one file and one line in `DEFENSES`."""

from pharmacist.core.registry import Registry
from pharmacist.training.strategy import GradientStrategy


DEFENSES: Registry[GradientStrategy] = Registry(
    "defense",
    {
        "sft": "pharmacist.defenses.alignment.sft:SFT",
        "vaccine": "pharmacist.defenses.alignment.vaccine:Vaccine",
        "booster": "pharmacist.defenses.alignment.booster:Booster",
    },
    group="pharmacist.defenses",
)

__all__ = ["DEFENSES", "GradientStrategy"]
