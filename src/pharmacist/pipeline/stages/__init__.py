"""The stages: one module per declaration, with its options; the work is in the modules of `pipeline`."""
