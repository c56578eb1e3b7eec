"""Base class of selectors, defenses, attacks, repairs, judges, graders and engines."""

import dataclasses
import inspect
import re
from typing import Any, ClassVar

from pharmacist.core.console import without_credentials
from pharmacist.core.registry import Choice, checked_options


@dataclasses.dataclass
class NoOptions:
    """No options."""


class Method:
    """Base class of all methods.

    A subclass declares its options once, as the dataclass `Config`. They are its keyword arguments (an instance of
    `Config` may be passed instead), are shown by ``help()`` and ``repr()``, and are the options on the command line
    and in YAML files. State is prepared in ``__post_init__``, which runs after `config` is set.

    Attributes:
        Config: Dataclass of the options.
        config: The options in use.
        name: Name in registries, manifests and model cards; by default the class name in lower case, with words joined
            by hyphens.
        needs: Inputs without which the method cannot work, such as ``safe``, ``harmful`` or ``model``; for an
            instance, they may depend on its options.
        paper: Source of the method, for docs and model cards.

    >>> from pharmacist.attacks.kinds import IdentityAttack
    >>> IdentityAttack(before_prompt="AOA: ", before_completion="Sure: ")
    IdentityAttack(before_prompt='AOA: ', before_completion='Sure: ')
    """

    Config: ClassVar[type[Any]] = NoOptions
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: frozenset[str] = frozenset()
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.Config)
        options = [option.replace(kind=option.KEYWORD_ONLY) for option in signature.parameters.values()]
        cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(self, config: Any = None, /, **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"{type(self).__name__}: give a config or its fields, not both")
        if config is not None and not dataclasses.is_dataclass(config):
            raise TypeError(f"{type(self).__name__}: options are given by name, not as {config!r}")
        self.config = checked_options(type(self).__name__, self.Config, options) if config is None else config
        self.__post_init__()

    def __post_init__(self) -> None:
        """Prepares state that depends on the options."""

    def identity(self) -> dict[str, Any]:
        """The options that can change a result: all of them, unless a method excludes some, such as a batch size."""
        return dataclasses.asdict(self.config)

    def choice(self) -> Choice:
        """``{"name": ..., **options}``, the form of a method in configuration files and manifests."""
        return Choice({"name": self.name, **dataclasses.asdict(self.config)}, type(self))

    def cited(self, name: str) -> str:
        """The method by the name under which it was chosen, and its paper if it declares one, for model cards."""
        return f"`{name}` ({self.paper})" if self.paper else f"`{name}`"

    def __repr__(self) -> str:
        values = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        shown = (f"{name}={_shown(value)!r}" for name, value in values.items())
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> Any:
    return without_credentials(value) if isinstance(value, str) and "://" in value else value
