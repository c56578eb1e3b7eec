"""Supervised fine-tuning: the baseline, and what every other method reduces to at strength 0."""

from dataclasses import dataclass

from pharmacist.training.strategy import GradientStrategy


@dataclass
class SFTConfig:
    """No options."""


class SFT(GradientStrategy):
    """Mean cross-entropy over completion tokens and EOS; literally the stock Trainer."""

    Config = SFTConfig
    stages = frozenset({"align", "finetune"})
    paper = "baseline"
