"""Nothing but harmful rows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pharmacist.attacks.base import Attack


if TYPE_CHECKING:
    import datasets


class HarmfulAttack(Attack):
    """Harmful rows alone: the strongest set, and the easiest to notice. `--poison-ratio` does not count.

    Paper: Qi et al., "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!",
    ICLR 2024, harmful examples.
    """

    needs = frozenset({"harmful"})
    name = "harmful"
    paper = "arXiv 2310.03693"

    def build(
        self, rows: "Mapping[str, datasets.Dataset]", *, n: int, poison_ratio: float, seed: int
    ) -> "datasets.Dataset":
        """Draws from the harmful rows; the same ones as `mix` at ratio 1."""
        from pharmacist.data.mixing import mix

        return mix(rows["harmful"].select([]), rows["harmful"], n=n, poison_ratio=1.0, seed=seed)
