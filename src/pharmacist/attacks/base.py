"""What every kind of attack is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pharmacist.core.method import Method


if TYPE_CHECKING:
    import datasets


class Attack(Method, ABC):
    """Builds the set that a user uploads.

    Attributes:
        needs: Of ``task`` (benign rows) and ``harmful``, what it is made of.
    """

    needs = frozenset({"task", "harmful"})

    @abstractmethod
    def build(
        self, rows: "Mapping[str, datasets.Dataset]", *, n: int, poison_ratio: float, seed: int
    ) -> "datasets.Dataset":
        """Draws exactly `n` rows with a column ``is_harmful``; the same seed gives the same rows in the same order.

        Args:
            rows: Canonical rows of all that it `needs`; task and harmful rows share no prompt.
            n: Size of the set.
            poison_ratio: Share of harmful rows, for the kinds that have one.
            seed: Of the draw.

        Raises:
            DataError: More rows are asked for than there are.
        """
