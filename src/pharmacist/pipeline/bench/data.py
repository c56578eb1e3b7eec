"""Inputs of the stages of a grid: files and models with hashes of their content, and rows of the synthetic world."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.files import check_ordinary
from pharmacist.core.hashing import sha256_content, sha256_file, sha256_text
from pharmacist.core.registry import closest
from pharmacist.data.formats import HUB_ID, open_source
from pharmacist.data.formats.saved import open_folder
from pharmacist.nn.models import model_fingerprint
from pharmacist.pipeline.bench.options import PoolEntry
from pharmacist.pipeline.bench.stages import Input
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.labels import REASON_OF, read_entries
from pharmacist.worlds import BASE_MODEL, SETS, World, json_lines


WORLD = "world"
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")


class Data:
    """Finds the inputs that options name, and collects the synthetic rows that ``data/`` must hold."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.texts: dict[Path, str] = {}
        """File -> text of the synthetic rows that belong in it."""
        self.worth_keeping: dict[str, dict[int, bool]] = {}
        """Pool whose labels are known (of a synthetic one the file, else the entry's name) -> row -> whether it is
        worth keeping; rows without a label are not in it."""
        self.labels: dict[str, str] = {}
        """``labels`` and the name of a pool -> hash of the file of its labels, as an input of the benchmark."""
        self._contents: dict[str, str] = {}
        self._rows: dict[str, Input] = {}

    def rows(self, spec: str, where: str, cell: Any) -> Input:
        """Rows that an option names: a path, a split of a saved dataset (``FOLDER:SPLIT``), a Hub id, a name known to
        the stage (``sst2``, ``harmbench:FILE``), or a set of the synthetic world of the cell's pool or seed
        (``world:NAME:ROWS``).

        Raises:
            DataError: There is no such file or saved dataset, or it cannot be read.
            ConfigError: There is no such set.
        """
        if spec == WORLD or spec.startswith(f"{WORLD}:"):
            return self._made_up(spec, where, cell.pool, cell.seed)
        if spec not in self._rows:
            folder, _, split = spec.rpartition(":")
            for path, part in ((spec, None), (folder, split)):
                if path and os.path.isdir(path := os.path.expanduser(path)):
                    open_folder(Path(path), part, spec, where)  # refuses any other folder, however much is in it
                    break
            self._rows[spec] = self.encoder(spec, where)
        return self._rows[spec]

    def encoder(self, spec: str, where: str) -> Input:
        """The same of an encoder, for which any folder may stand."""
        path = Path(os.path.expanduser(spec))
        (name, _, file), (folder, _, split) = spec.partition(":"), spec.rpartition(":")
        check_ordinary(path, f"{where} {spec}")
        for before, place, after in (("", spec, ""), (f"{name}:", file, ""), ("", folder, f":{split}")):
            place = os.path.expanduser(place)
            # Unlike the methods of Path, these raise no error for names that no file system accepts.
            if os.path.isdir(place) if after else os.path.exists(place):
                found = self._local(Path(place), f"{where} {spec}")
                return Input(f"{before}{found.source}{after}", f"{before}{found.content}{after}")
        if path.suffix.lower() in _FILES or spec.startswith((".", "/", "~")) or not HUB_ID.fullmatch(spec):
            raise DataError(f"{where} {spec}: no such file; check the path")
        return Input(spec, f"hub:{spec}")

    def model(self, spec: str, where: str) -> Input:
        """A model that an option names; ``world`` is the tiny model of the synthetic world.

        Raises:
            DataError: There is no such folder.
        """
        path = Path(BASE_MODEL if spec == WORLD else os.path.expanduser(spec))
        source = str(path.resolve()) if os.path.isdir(path) else spec
        if source not in self._contents:
            try:
                self._contents[source] = model_fingerprint(source)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return Input(source, self._contents[source])

    def read_labels(self, pool: PoolEntry) -> None:
        """Reads what people said of a pool's rows, by which rankings and selections of it are measured; of a synthetic
        pool everything is known.

        Raises:
            DataError: The file is none of labels, or is about another pool.
        """
        if pool.labels is not None and pool.pool != WORLD and pool.name not in self.worth_keeping:
            who, source = f"pool '{pool.name}', labels", open_source(pool.pool, name="pool")
            rows, file = [row.number for row in source.scan()], self.encoder(pool.labels, who)
            known = read_entries(file.source, source.fingerprint(), rows, where=f"{who} {pool.labels}")
            self.labels[f"labels {pool.name}"] = file.content
            self.worth_keeping[pool.name] = {row: REASON_OF[label] == CRITICAL for row, label in known.items()}

    def _local(self, path: Path, what: str) -> Input:
        path = path.resolve()
        if str(path) not in self._contents:
            try:
                self._contents[str(path)] = sha256_file(path) if path.is_file() else sha256_content(path)
            except OSError as error:
                raise DataError(f"{what}: cannot be read ({error.strerror}); check path and permissions") from error
        return Input(str(path), self._contents[str(path)])

    def _made_up(self, spec: str, where: str, pool: PoolEntry, seed: int) -> Input:
        _, _, rest = spec.partition(":")
        name, _, number = rest.partition(":")
        known = [*SETS, "answers"]
        if spec != WORLD and name not in known:
            raise ConfigError(f"{where} {spec}: the synthetic world has no set '{name}'{closest(name, known)}")
        if number and not number.isdecimal():
            raise ConfigError(f"{where} {spec}: '{number}' is not a number of rows")
        if name == "answers" and pool.pool != WORLD:
            raise ConfigError(f"{where} {spec}: are answers to a synthetic pool, and {pool.pool} is not one")
        world, planted = seed if pool.seed is None else pool.seed, (pool.rows, pool.mislabel, pool.kind)
        text = _text(name, world, int(number) if number else None, planted)
        content = sha256_text(text)
        path = self.root / "data" / f"{name or 'pool'}-{content[:16]}.jsonl"
        if not name and path not in self.texts:
            rows = World(world).labelled(*planted)
            self.worth_keeping[str(path)] = {n: row.worth_keeping(pool.kind) for n, row in enumerate(rows)}
        self.texts[path] = text
        return Input(str(path), content)


@cache
def _text(name: str, seed: int, n: int | None, pool: tuple[int, float, str]) -> str:
    """Rows of one set as JSON lines; of the pool and the answers to it `pool` says how many."""
    world = World(seed)
    if name not in ("", "answers"):
        return json_lines(world.rows(name, n))
    found = [row.row | {"category": row.category} for row in world.labelled(*pool)]
    return json_lines(world.harmful_answers(found) if name else found)
