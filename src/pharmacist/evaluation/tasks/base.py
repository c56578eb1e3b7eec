"""What every task is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple


class Grade(NamedTuple):
    """Whether an answer is right.

    Attributes:
        correct: By our own, strict matching.
        published: By the looser matching of published evaluations, for comparison with their figures.
    """

    correct: bool
    published: bool


@dataclass
class NoOptions:
    """A task without options."""


class Task(ABC):
    """Grades answers; pure text against text.

    Args:
        config: Options, of type `Config`.
    """

    Config: ClassVar[type] = NoOptions
    name: ClassVar[str]
    version: ClassVar[int]
    """Raised whenever a grade could change."""
    matching: ClassVar[tuple[str, str]]
    """Names of the strict and of the published matching."""

    def __init__(self, config: Any = None) -> None:
        self.config = config

    @property
    def label(self) -> str:
        """``name@version``, as metrics name a grader."""
        return f"{self.name}@{self.version}"

    def prepare(self, targets: Sequence[str]) -> None:
        """Learns from all targets what it needs, such as the labels.

        Raises:
            DataError: The targets are not of this kind.
        """
        del targets

    @abstractmethod
    def grade(self, targets: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """One grade per answer, in order."""

    def report(self) -> dict[str, Any]:
        """What it found out about the targets."""
        return {}
