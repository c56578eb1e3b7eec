"""The environment of a run: versions, launcher, network."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


_PACKAGES = "pharmacist torch transformers peft accelerate datasets trl tokenizers scikit-learn numpy pyarrow".split()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def process_index() -> int:
    """This process's number under a launcher, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
