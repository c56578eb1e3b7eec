"""Data in and out: formats, canonical rows, templates, tokens, duplicates, splits, mixtures."""
