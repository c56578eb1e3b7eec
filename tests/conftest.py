"""For all tests."""

import pytest

from pharmacist.core.progress import set_quiet


@pytest.fixture(autouse=True)
def _speaks() -> None:
    """A run that was told to be quiet must not silence the tests after it."""
    set_quiet(False)
