"""Ranges in types, and how they are told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt

from pharmacist.core.errors import ConfigError
from pharmacist.core.typed import AtLeast0, AtLeast1, Checked, NotNegative, Positive, Share, checked


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (Share, 0, "--x 0: must lie in (0, 1]"),
        (Share | None, 1.5, "--x 1.5: must lie in (0, 1]"),
        (Annotated[float, Ge(0), Lt(1)], 1, "--x 1: must lie in [0, 1)"),
        (AtLeast0, -1, "--x -1: must not be negative"),
        (AtLeast1, 0, "--x 0: must be at least 1"),
        (Positive, 0, "--x 0: must be positive"),
        (Annotated[int, Gt(3)], 3, "--x 3: must be above 3"),
        (Annotated[int, Le(3)], 4, "--x 4: must be at most 3"),
        (Annotated[int, Lt(3)], 3, "--x 3: must be below 3"),
        (NotNegative, float("nan"), "--x nan: must not be negative"),
        (float, float("inf"), "--x inf: must be a finite number"),
        (list[AtLeast1], [1, 0], "--x [1, 0]: must be at least 1"),
        (list[float], [0.001, "fast"], "--x [0.001, 'fast']: must be a list of numbers, written [0.1, 2]"),
        (list[int], ["1"], "--x ['1']: must be a list of whole numbers, written [1, 2]"),
        (AtLeast1 | list[AtLeast1], "a", "--x a: must be a whole number or a list, written [a, b]"),
        (AtLeast1, True, "--x True: must be a whole number"),
        (AtLeast1, 2.0, "--x 2.0: must be a whole number"),
        (float, "2", "--x 2: must be a number"),
        (Literal["a", "b"] | None, "c", "--x c: must be one of a, b"),
        (int, 2**63, "--x 9223372036854775808: is too large; whole numbers go up to 9223372036854775807"),
        (dict[str, Any], {"a": [float("inf")]}, "--x.a inf: must be a finite number"),
        (str, 5, "--x 5: must be text"),
    ],
)
def test_what_does_not_fit_is_told(hint: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked("--x", hint, value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("hint", "value", "found"),
    [
        (Share, 1, 1.0),
        (Share | None, None, None),
        (list[float], (1, 2.5), [1.0, 2.5]),
        (str, Path("a/b"), "a/b"),
        (AtLeast0, np.int64(3), 3),
        (float, np.float32(0.5), 0.5),
        (bool, np.True_, True),
        (list[AtLeast1], np.arange(1, 3), [1, 2]),
        (list[AtLeast1], [np.int64(3)], [3]),
        (list[str], [Path("a/b")], ["a/b"]),
        (dict[str, Any], {"steps": np.int64(3)}, {"steps": 3}),
        (AtLeast1 | list[AtLeast1], [1, 2], [1, 2]),
    ],
)
def test_what_fits(hint: Any, value: Any, found: Any) -> None:
    given = checked("--x", hint, value)
    assert given == found and type(given) is type(found)
    assert repr(given) == repr(found), "what it holds is of Python's types too"


@dataclass
class Spoon(Checked):
    """A spoon."""

    length: Positive = 1.0


@dataclass
class Cauldron(Checked):
    """A cauldron, with a spoon in it."""

    spoon: Spoon = field(default_factory=Spoon)


def test_python_names_the_argument() -> None:
    assert Spoon(length=2).length == 2.0
    with pytest.raises(ConfigError, match="length must be positive, not -1"):
        Spoon(length=-1)


def test_options_within_options_are_of_their_class() -> None:
    assert Cauldron(spoon=Spoon(length=2)).spoon.length == 2.0
    with pytest.raises(ConfigError, match="spoon must be an instance of Spoon, not {'length': 2}"):
        Cauldron(spoon={"length": 2})  # type: ignore[arg-type]
