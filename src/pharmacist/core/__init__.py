"""Errors, configuration, run folders and other plumbing; imports neither torch nor datasets."""
