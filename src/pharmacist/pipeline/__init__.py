"""The stages: one options dataclass and one function each, the same for command line and Python."""
