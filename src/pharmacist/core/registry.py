"""Names of methods, resolved lazily: one table line per method."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from pharmacist.core.errors import ConfigError, UnknownNameError
from pharmacist.core.typed import Given, cut


T = TypeVar("T")


def closest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint such as ``; did you mean 'random'?``; where no name is close, `otherwise` or the known names.

    Names that end in all the words of the given one come first, up to four of them, then one that has them all, then
    one that is only spelled alike.
    """
    known, words = sorted(known), _words(name)
    last = [one for one in known if words and _words(one)[-len(words) :] == words]
    longer = last or [one for one in known if words and set(words) <= set(_words(one))]
    matches = difflib.get_close_matches(name, longer, n=4 if last else 1, cutoff=0)
    matches = matches or difflib.get_close_matches(name, known, n=1)
    if not matches:
        return f"; {otherwise or 'known: ' + (', '.join(known) or 'none')}"
    offered = " or ".join(f"'{match}'" for match in matches)
    return f"; did you mean {offered}?"


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


@cache
def _plugins(group: str) -> dict[str, str]:
    # Looking through all installed packages takes tens of milliseconds.
    return {point.name: f"{point.module}:{point.attr}" for point in entry_points(group=group)} if group else {}


def checked_options(whose: str, config: type[Any], params: Mapping[str, Any]) -> Any:
    """Builds an options dataclass; a ConfigError, which begins with `whose`, for a parameter that is no field."""
    if not isinstance(params, Mapping):
        raise ConfigError(f"{whose}: options must be a mapping such as {{'option': value}}, not {cut(repr(params))}")
    known = {field.name for field in dataclasses.fields(config)}
    for key in params:
        if key not in known:
            raise ConfigError(f"{whose} has no option '{key}'{closest(key, known)}")
    return config(**params)


class Choice(Given, dict[str, Any]):
    """Name and options of a method, with its class `method`, which need not be registered."""

    def __init__(self, options: Mapping[str, Any], method: type[Any]) -> None:
        super().__init__(options)
        self.method = method


class Registry(Generic[T]):
    """Maps a method's name to its class without importing it.

    Args:
        kind: What the names stand for, for messages ("selector").
        table: name -> ``"module:Class"`` of a `Method`, or of any class that has a dataclass `Config` and is built as
            ``Class(Config(...))``.
        group: Entry-point group through which other packages add methods; empty for none.
        options: name -> ``"module:Config"`` where the options of a method lie apart from its class, so that ``--help``
            need not import the libraries of the method.
    """

    def __init__(
        self, kind: str, table: Mapping[str, str], *, group: str, options: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self._table, self._group, self._options = kind, dict(table), group, options or {}

    def table(self) -> dict[str, str]:
        """Name -> ``"module:Class"``; plug-ins included."""
        return _plugins(self._group) | self._table

    def names(self, within: tuple[str, ...] = ("",)) -> list[str]:
        """Known names, sorted: plug-ins, and this package's methods whose paths begin with one of `within`."""
        return sorted(
            name for name, path in self.table().items() if name not in self._table or path.startswith(within)
        )

    def get(self, name: str) -> type[T]:
        """The class called `name`; an UnknownNameError offers the nearest name where there is none."""
        table = self.table()
        if name not in table:
            raise UnknownNameError(f"unknown {self.kind} '{name}'{closest(name, table)}")
        try:
            found: type[T] = resolve_name(table[name])
        except Exception as error:  # of another package anything may be wrong
            if name in self._table:
                raise
            raise ConfigError(
                f"{self.kind} '{name}': its entry point {table[name]} cannot be imported ({error}); fix or uninstall "
                "the package that brings it"
            ) from error
        return found

    def classes(self) -> dict[str, str]:
        """Name of a class -> ``"module:Class"``, plug-ins left out."""
        return {path.rpartition(":")[2]: path for path in self._table.values()}

    def config_type(self, name: str) -> type[Any]:
        """The options dataclass of the method called `name`."""
        apart = self._options.get(name)
        found: type[Any] = resolve_name(apart) if apart else self.get(name).Config  # type: ignore[attr-defined]
        return found

    def build(self, name: str, params: Mapping[str, Any]) -> T:
        """Builds the method from its parameters; a ConfigError where it has no such parameter."""
        options = checked_options(f"{self.kind} '{name}'", self.config_type(name), params)
        return self.get(name)(options)  # type: ignore[call-arg]

    def build_from(self, choice: Mapping[str, Any]) -> T:
        """Builds from ``{"name": ..., **params}``, the form that options files hold."""
        name, params = choice["name"], {key: value for key, value in choice.items() if key != "name"}
        if isinstance(choice, Choice):
            options = checked_options(f"{self.kind} '{name}'", choice.method.Config, params)
            built: T = choice.method(options)
            return built
        return self.build(name, params)
