"""Training-time defenses as gradient strategies. A new one is one file and one line in `DEFENSES`."""

from typing import TYPE_CHECKING

from pharmacist.core.registry import Registry


if TYPE_CHECKING:
    from pharmacist.training.strategy import GradientStrategy

DEFENSES: "Registry[GradientStrategy]" = Registry(
    "defense",
    {
        "sft": "pharmacist.defenses.alignment.sft:SFT",
        "vaccine": "pharmacist.defenses.alignment.vaccine:Vaccine",
        "t-vaccine": "pharmacist.defenses.alignment.t_vaccine:TVaccine",
        "repnoise": "pharmacist.defenses.alignment.repnoise:RepNoise",
        "booster": "pharmacist.defenses.alignment.booster:Booster",
        "tar": "pharmacist.defenses.alignment.tar:TAR",
        "constrained-sft": "pharmacist.defenses.finetuning.constrained_sft:ConstrainedSFT",
        "ewc": "pharmacist.defenses.finetuning.ewc:EWC",
        "kl": "pharmacist.defenses.finetuning.kl:KL",
        "ldifs": "pharmacist.defenses.finetuning.ldifs:LDIFS",
        "lisa": "pharmacist.defenses.finetuning.lisa:Lisa",
        "vlguard": "pharmacist.defenses.finetuning.vlguard:VLGuard",
    },
    group="pharmacist.defenses",
    options={"sft": "pharmacist.core.method:NoOptions"},
)
