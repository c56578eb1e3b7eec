"""What judges and graders have in common."""

from abc import ABC, abstractmethod
from pathlib import Path

from pharmacist.core.method import Method


class Decider(Method, ABC):
    """A method that decides on answers, each by itself: order and company of the answers change nothing."""

    work: Path | None = None
    """Folder for verdicts that cost much, kept as they come; set by the stage."""
    missing: int = 0
    """Verdicts that failed on the way, which another call would ask for again."""

    @property
    @abstractmethod
    def revision(self) -> str:
        """Changes whenever a verdict could."""

    @property
    def label(self) -> str:
        """``name@revision``, as metrics say who decided."""
        return f"{self.name}@{self.revision}"

    def fingerprint(self) -> str | None:
        """Hash of the files that it reads besides references and task; None where it reads none."""
        return None

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Refuses at once what cannot work, before any answer is generated.

        Raises:
            PharmacistError: Missing option or file.
        """
