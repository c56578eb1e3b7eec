"""Supervised fine-tuning: the baseline, to which every other method reduces at strength 0."""

from pharmacist.training.strategy import GradientStrategy


class SFT(GradientStrategy):
    """Mean cross-entropy over completion tokens and EOS; the stock Trainer."""

    stages = frozenset({"align", "finetune"})
    paper = "baseline"
