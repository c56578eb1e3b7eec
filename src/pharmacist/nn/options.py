"""Options of what trains here, apart from it: the command line's help must not wait for torch."""

from dataclasses import dataclass

from pharmacist.core.errors import ConfigError


@dataclass
class AdapterOptions:
    """Shape and training of the selector's LoRA adapters."""

    r: int = 8
    """Rank."""
    alpha: int = 16
    """Scale: the update is multiplied by alpha / r."""
    learning_rate: float = 2e-3
    """Peak of the AdamW learning rate; linear warm-up over a tenth of the steps, then linear decay to zero."""
    batch_size: int = 16
    """Rows per step and stream."""

    def __post_init__(self) -> None:
        for name in ("r", "alpha", "learning_rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
