"""Options of the default defense, apart from it: the command line's help must not wait for torch."""

from dataclasses import dataclass


@dataclass
class SFTConfig:
    """No options."""
