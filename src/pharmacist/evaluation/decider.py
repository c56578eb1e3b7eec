"""The base of judges and graders."""

from dataclasses import fields
from pathlib import Path
from typing import ClassVar

from pharmacist.core.hashing import sha256_json
from pharmacist.core.method import Method
from pharmacist.core.typed import default_of


class Decider(Method):
    """A method that decides on answers one by one: a decision depends on no other answer."""

    version: ClassVar[int] = 1
    """Raised whenever the same answer could get another decision."""
    option: str
    """Option of the command line that chooses it, for messages."""
    work: Path | None = None
    """Folder of partial state, which is deleted after the run; set by the stage."""
    replies: Path | None = None
    """Folder in which an endpoint's replies are kept as they arrive, for later runs too; set by the stage."""
    missing: int = 0
    """Number of verdicts that an endpoint failed to give, which another call asks for again."""

    @property
    def who(self) -> str:
        """Option and name, for messages."""
        return f"{self.option} {self.name}"

    @property
    def revision(self) -> str:
        """Version of the decisions, which changes whenever one of them could, also by an option."""
        return self.with_options(str(self.version))

    @property
    def label(self) -> str:
        """``name@revision``, by which metrics name who decided."""
        return f"{self.name}@{self.revision}"

    def with_options(self, version: str, *besides: str) -> str:
        """A version, with a hash of the options that are not the defaults, if there are any.

        Only options that can change a decision count (`identity`), `besides` not.
        """
        defaults = {field.name: default_of(field) for field in fields(self.config) if field.name not in besides}
        given = self.identity()
        options = {name: given[name] for name in defaults if name in given and given[name] != defaults[name]}
        return version + (f"+{sha256_json(options)[:8]}" if options else "")

    def fingerprint(self) -> str | None:
        """Hash of the files that it reads besides references and task; None if there are none."""
        return None

    def check(self) -> None:
        """Checks options and files before any answer is generated.

        Raises:
            PharmacistError: Missing option or file.
        """
