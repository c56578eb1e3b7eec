"""Harmful rows hidden in a benign task."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pharmacist.attacks.base import Attack


if TYPE_CHECKING:
    import datasets


class MixAttack(Attack):
    """Exactly round(poison ratio x samples) harmful rows, the rest of the benign task; nested across ratios.

    Paper: the attack of Vaccine, Lisa, Booster, T-Vaccine and Antidote.
    """

    name = "mix"
    paper = "arXiv 2402.01109"

    def build(
        self, rows: "Mapping[str, datasets.Dataset]", *, n: int, poison_ratio: float, seed: int
    ) -> "datasets.Dataset":
        """See `data.mixing.mix`."""
        from pharmacist.data.mixing import mix

        return mix(rows["task"], rows["harmful"], n=n, poison_ratio=poison_ratio, seed=seed)
