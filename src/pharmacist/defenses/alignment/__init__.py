"""Alignment-stage defenses: harden a model before users fine-tune it."""
