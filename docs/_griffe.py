"""Docstrings of the Python interface as they are at run time: options are explained where they are declared."""

import inspect
from typing import Any

import griffe

from pharmacist import api


class Completed(griffe.Extension):
    """Reads the docstrings that `pharmacist.api.explained` completes."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function that is read."""
        if func.path.startswith("pharmacist.api.") and func.docstring is not None:
            func.docstring.value = inspect.getdoc(getattr(api, func.name)) or ""
