"""No harmful row: safety that is lost by accident."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pharmacist.attacks.base import Attack


if TYPE_CHECKING:
    import datasets


class BenignAttack(Attack):
    """The benign task alone: what an honest user does to a model's safety. `--poison-ratio` does not count.

    Paper: Qi et al., "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!",
    ICLR 2024, benign fine-tuning.
    """

    needs = frozenset({"task"})
    name = "benign"
    paper = "arXiv 2310.03693"

    def build(
        self, rows: "Mapping[str, datasets.Dataset]", *, n: int, poison_ratio: float, seed: int
    ) -> "datasets.Dataset":
        """Draws from the task; the same rows as `mix` at ratio 0."""
        from pharmacist.data.mixing import mix

        return mix(rows["task"], rows["task"].select([]), n=n, poison_ratio=0.0, seed=seed)
