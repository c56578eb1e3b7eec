"""Synthetic worlds: every word is harmless, every label is known."""

from pharmacist.worlds.potions import BASE_MODEL, LABELS, SETS, Planted, World, json_lines


__all__ = ["BASE_MODEL", "LABELS", "SETS", "Planted", "World", "json_lines"]
