"""What can be done during or after a user's fine-tuning: fine-tuning-stage defenses and repairs, as one axis."""

from typing import Any

from pharmacist.core.method import Method
from pharmacist.core.registry import Registry
from pharmacist.defenses import DEFENSES
from pharmacist.repairs import REPAIRS


class NoLaterDefense(Method):
    """Nothing is done."""

    name = "none"


LATER_DEFENSES: Registry[Any] = Registry(
    "later defense", {**DEFENSES.table(), **REPAIRS.table(), "none": f"{__name__}:NoLaterDefense"}, group=""
)
