"""Readers: each turns a row into log-probabilities over the evidence classes, having seen references only."""
