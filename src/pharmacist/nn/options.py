"""Options of adapters, in a module without torch, for which the command line's help must not wait."""

from dataclasses import dataclass

from pharmacist.core.typed import AtLeast1, Checked, Positive


@dataclass
class AdapterOptions(Checked):
    """Shape and training of the selector's LoRA adapters."""

    r: AtLeast1 = 8
    """Rank of the LoRA adapters."""
    alpha: AtLeast1 = 16
    """Scale of the LoRA adapters: their update is multiplied by alpha / r."""
    learning_rate: Positive = 2e-3
    """Peak AdamW learning rate, with linear warm-up over a tenth of the steps and then linear decay to zero."""
    batch_size: AtLeast1 = 16
    """Rows per training step, of the pool and of each kind of references."""
