"""Toxic LoRA: how much a little more weight on a row would lower the safety loss of a model that is under attack."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pharmacist.core.seeding import derive
from pharmacist.core.typed import AtLeast0, NotNegative, Share
from pharmacist.nn.adapters import AdapterBank, AdapterOptions
from pharmacist.nn.batching import Sequences
from pharmacist.selectors.gradients import pool_job, run_jobs
from pharmacist.selectors.unrolled import LEARNER, UnrolledSelector


TOXIC = "toxic"
"""The adapter trained on harmful references."""


@dataclass
class ToxicLoraConfig(AdapterOptions):
    """Options of the selector."""

    toxic_steps: AtLeast0 = 60
    """Training steps of the toxic LoRA on the harmful references, after the training on the pool; with 0 the selector
    is `unrolled` with the same lookahead."""
    attached: Literal["upper", "both"] = "both"
    """Where the toxic LoRA is attached. upper: for the safety loss alone. both: also for the losses of the pool's
    rows, so that rows are ranked by what they teach a model under attack."""
    steps: AtLeast0 = 60
    """Training steps on the pool, with equal weights, before the attack; with 0 the model is attacked as it is."""
    share: Share = 0.25
    """Share of the pool (at least 256 rows) that the model is trained on, and that gives the gradient of the lookahead
    step."""
    lookahead: NotNegative = 0.0
    """Learning rate of the step on the pool after which the safety loss is computed; 0 is the limit of small steps and
    needs none. If the toxic LoRA fits the references well, a long step is harmful."""


class ToxicLoraSelector(UnrolledSelector):
    """Prefers rows that keep a model safe to which a frozen LoRA, trained on harmful references, is attached.

    The score is minus the derivative of F(s) = U(theta - lookahead * grad mean_i s_i l_i(theta) + Delta) by the row's
    weight s_i, but for the factor lookahead / rows: <grad l_i(theta), grad U(theta+ + Delta)>. U is the loss on the
    safe references, Delta the toxic LoRA.
    """

    Config = ToxicLoraConfig
    name = "toxic-lora"
    needs = frozenset({"safe", "harmful", "model"})
    paper = "after descriptions of the Pharmacist paper's selector; neither its text nor its code was available"

    def attack(
        self, bank: AdapterBank, references: Mapping[str, Sequences], seed: int, folder: Path
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        harmful, steps = references["harmful"], self.config.toxic_steps
        bank.add(TOXIC)
        if steps:
            every = np.arange(len(harmful.lengths))
            job = pool_job(bank, TOXIC, harmful, every, steps, derive(seed, TOXIC), folder, frozen=(LEARNER,))
            run_jobs(bank, [job], self.name)
        return (TOXIC,) if self.config.attached == "both" else (), (TOXIC,)
