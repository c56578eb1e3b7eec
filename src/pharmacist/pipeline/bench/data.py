"""What the stages of a grid read: files and models by content, and the rows of the made-up world."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import check_ordinary
from pharmacist.core.hashing import sha256_content, sha256_file, sha256_text
from pharmacist.core.registry import closest
from pharmacist.pipeline.bench.options import PoolEntry
from pharmacist.pipeline.bench.stages import Input


WORLD = "world"
SIZES = {
    "safe": 96,
    "harmful": 96,
    "utility": 96,
    "answers": 0,
    "attack": 64,
    "task": 640,
    "task-test": 150,
    "prompts": 120,
    "borderline": 60,
    "judge-safe": 120,
    "judge-harmful": 120,
    "judge-utility": 120,
}
"""Sets of the made-up world and how many rows they have unless ``world:NAME:ROWS`` says so; answers are the harmful
answers to the cell's own pool."""
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")


class Data:
    """Finds what options name, and notes which made-up rows must be written before the grid runs.

    Args:
        root: Of the benchmark; made-up rows go to ``data/``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._texts: dict[Path, str] = {}
        self._contents: dict[str, str] = {}

    def rows(self, spec: str, where: str, seed: int, pool: PoolEntry) -> Input:
        """Rows that an option names.

        Args:
            spec: A path, a hub id, a name that the stage knows (``sst2``, ``harmbench:FILE``), or a set of the made-up
                world, ``world:NAME`` or ``world:NAME:ROWS``.
            where: For messages.
            seed: Of the cell.
            pool: Of the cell, which has a world of its own where it is made up.

        Raises:
            DataError: There is no such file.
            ConfigError: There is no such set.
        """
        if spec == WORLD or spec.startswith(f"{WORLD}:"):
            return self._made_up(spec, where, seed, pool)
        name, colon, file = spec.partition(":")
        path = Path(spec).expanduser()
        check_ordinary(path, f"{where} {spec}")
        if path.exists():
            return Input(str(path.resolve()), self._content(path.resolve()))
        if colon and Path(file).expanduser().exists():
            path = Path(file).expanduser().resolve()
            return Input(f"{name}:{path}", f"{name}:{self._content(path)}")
        if path.suffix.lower() in _FILES or spec.startswith((".", "/", "~")):
            raise DataError(f"{where} {spec}: no such file; check the path")
        return Input(spec, f"hub:{spec}")

    def model(self, spec: str, where: str) -> Input:
        """A model that an option names; ``world`` is the made-up world's own.

        Raises:
            DataError: There is no such folder.
        """
        from pharmacist.nn.models import model_fingerprint
        from pharmacist.worlds import BASE_MODEL

        path = Path(str(BASE_MODEL) if spec == WORLD else spec).expanduser()
        place = str(path.resolve()) if path.is_dir() else spec
        if place not in self._contents:
            try:
                self._contents[place] = model_fingerprint(place)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return Input(place, self._contents[place])

    def text(self, place: str) -> str | None:
        """Rows of the made-up world that a stage will read there; None of what is no such file."""
        return self._texts.get(Path(place))

    @property
    def written(self) -> list[Path]:
        """Files that `write` writes."""
        return list(self._texts)

    def write(self) -> None:
        """Writes the made-up rows that were asked for."""
        from pharmacist.core.files import write_text

        for path, text in self._texts.items():
            if not path.is_file():
                write_text(path, text)

    def _content(self, path: Path) -> str:
        if str(path) not in self._contents:
            self._contents[str(path)] = sha256_file(path) if path.is_file() else sha256_content(path)
        return self._contents[str(path)]

    def _made_up(self, spec: str, where: str, seed: int, pool: PoolEntry) -> Input:
        _, _, rest = spec.partition(":")
        name, _, number = rest.partition(":")
        world = seed if pool.seed is None else pool.seed
        if spec == WORLD:
            rows = _pool(world, pool.rows, pool.mislabel, pool.kind)
        elif name not in SIZES:
            raise ConfigError(f"{where} {spec}: the made-up world has no set '{name}'{closest(name, SIZES)}")
        elif number and not number.isdigit():
            raise ConfigError(f"{where} {spec}: '{number}' is no number of rows")
        elif name == "answers":
            if pool.pool != WORLD:
                raise ConfigError(f"{where} {spec}: are answers to a made-up pool, and {pool.pool} is none")
            rows = _answers(world, pool.rows, pool.mislabel, pool.kind)
        else:
            rows = _set(name, world, int(number or SIZES[name]))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        content = sha256_text(text)
        path = self.root / "data" / f"{name or 'pool'}-{content[:16]}.jsonl"
        self._texts[path] = text
        return Input(str(path), content)


@cache
def _pool(seed: int, rows: int, mislabel: float, kind: str) -> Sequence[dict[str, Any]]:
    from pharmacist.worlds import World

    world = World(seed)
    planted = world.clean_planted(rows) if kind == "clean" else world.planted(rows, mislabel)
    return [row.row | {"category": row.category} for row in planted]


@cache
def _answers(seed: int, rows: int, mislabel: float, kind: str) -> Sequence[dict[str, Any]]:
    from pharmacist.worlds import World

    return World(seed).harmful_answers(list(_pool(seed, rows, mislabel, kind)))


@cache
def _set(name: str, seed: int, n: int) -> Sequence[dict[str, Any]]:
    from pharmacist.worlds import World

    world = World(seed)
    if name.startswith("judge-"):
        return world.judge_references(n)[name.removeprefix("judge-")]
    makers: dict[str, Any] = {
        "safe": world.safe,
        "harmful": world.harmful,
        "utility": world.utility,
        "attack": world.attack_harmful,
        "task": world.task_train,
        "task-test": world.task_test,
        "prompts": world.eval_prompts,
        "borderline": world.borderline,
    }
    rows: Sequence[dict[str, Any]] = makers[name](n)
    return rows


def with_references(pool: PoolEntry) -> PoolEntry:
    """A made-up pool with its world's references, unless it has others."""
    if pool.pool != WORLD:
        return pool
    missing: dict[str, Any] = {
        name: f"{WORLD}:{name}" for name in ("safe", "harmful", "utility") if getattr(pool, name) is None
    }
    return replace(pool, **missing)
