"""Several selectors as one, ``--selector a+b``: the mean of their ranks."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from pharmacist.core.errors import ConfigError
from pharmacist.core.registry import checked_options
from pharmacist.data.arrays import FloatArray
from pharmacist.selectors.base import RANKED, Scores, SelectionContext, Selector


class Composite(Selector):
    """Base of selectors that rank by other selectors.

    Attributes:
        parts: The others by name; set before the ``__post_init__`` of this class is called.
    """

    parts: Mapping[str, Selector]

    def __post_init__(self) -> None:
        self.needs = self.needs.union(*(part.needs for part in self.parts.values()))
        self.uses = self.uses.union(*(part.uses for part in self.parts.values()))
        options = dict[str, Any]()
        for part in self._every_part():  # partial results lie under the names of selectors, whatever their options
            if options.setdefault(part.name, part.config) != part.config:
                raise ConfigError(
                    f"selector '{self.name}': ranks by '{part.name}' twice, with different options; give both the same"
                )

    def _every_part(self) -> Iterator[Selector]:
        for part in self.parts.values():
            yield part
            if isinstance(part, Composite):
                yield from part._every_part()

    def notice(self, given: Collection[str]) -> str | None:
        return "; ".join(filter(None, (part.notice(given) for part in self.parts.values()))) or None

    def learns_from_labels(self) -> bool:
        return any(part.learns_from_labels() for part in self.parts.values())

    def check_room(self, rows: int, folder: Path) -> None:
        for part in self.parts.values():
            part.check_room(rows, folder)


@dataclass
class MixConfig:
    """Options of the parts, each under its selector's name, hyphens as underscores."""


class MixSelector(Composite):
    """Ranks by several selectors and averages a row's relative ranks; all count equally, whatever their scale."""

    Config = MixConfig
    name = "mix"
    paper = "rank averaging (Borda count)"
    kinds: Mapping[str, type[Selector]] = {}

    def __post_init__(self) -> None:
        self.parts = {}
        for (name, kind), option in zip(self.kinds.items(), fields(self.config), strict=True):
            given = getattr(self.config, option.name)
            if not isinstance(given, kind.Config):
                given = checked_options(f"selector '{name}'", kind.Config, given)
                setattr(self.config, option.name, given)
            self.parts[name] = kind(given)
        super().__post_init__()

    def rank(self, context: SelectionContext) -> Scores:
        ranks, signals, report, warnings = list[FloatArray](), dict[str, Any](), dict[str, Any](), list[str]()
        reason = np.full(len(context.pool), RANKED)
        for name, part in self.parts.items():
            context.forget_changed_model()
            found = part.rank(context)
            ranks.append(share_of_rows_behind(found.score))
            reason = np.where(reason == RANKED, found.reason, reason)  # the first that judges a row says what it is
            signals[f"{_identifier(name)}_place"] = ranks[-1]
            signals |= {f"{_identifier(name)}_{signal}": values for signal, values in found.signals.items()}
            report[name] = found.report
            warnings += found.warnings
        # How far to trust the reasons: what the part that gives them says.
        asked: dict[str, Any] = next((own for own in report.values() if "questions" in own), {})
        report |= {name: asked[name] for name in ("questions", "held_out_by", "cannot_see") if name in asked}
        return Scores(np.mean(ranks, axis=0), reason, signals, report, warnings)


def share_of_rows_behind(score: FloatArray) -> FloatArray:
    """A row's relative rank: 1 for the best, 0 for the last; equal scores share their mean rank."""
    return np.asarray((rankdata(score) - 1) / max(len(score) - 1, 1))


def mixture(name: str, parts: Mapping[str, type[Selector]]) -> type[MixSelector]:
    """The class of a mixture called ``a+b``, with the options of its parts; a ConfigError where it makes no sense."""
    names = name.split("+")
    for part in names:
        if names.count(part) > 1:
            raise ConfigError(f"selector '{name}': '{part}' is named twice; name different selectors")
        if parts[part].keeps_all or parts[part].is_random:
            does = "ranks nothing" if parts[part].keeps_all else "adds nothing but chance"
            raise ConfigError(f"selector '{name}': '{part}' {does}; leave it out")
    options = [(_identifier(part), kind.Config, field(default_factory=kind.Config)) for part, kind in parts.items()]
    config = make_dataclass("MixedConfig", options, bases=(MixConfig,))
    return type("MixSelector", (MixSelector,), {"Config": config, "name": name, "kinds": dict(parts)})


def _identifier(name: str) -> str:
    return name.replace("-", "_")
