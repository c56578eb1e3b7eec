"""Made-up worlds: every word is harmless, every label is known."""

from pharmacist.worlds.potions import BASE_MODEL, LABELS, Planted, World


__all__ = ["BASE_MODEL", "LABELS", "Planted", "World"]
