"""A benchmark at a URL: stages run in a folder here, and what is finished is uploaded for every machine to find.

| at the URL | holds |
| --- | --- |
| ``stages/NAME/DIGEST/`` | a finished stage's folder, named by its content, so that two copies never mix |
| ``finished/NAME.json`` | `Marker`, written last: which copy counts |
| ``data/`` | rows of the made-up world |
| ``results.parquet``, ... | table, page and manifest, of the driver that wrote last |
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ValidationError

import pharmacist
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, PharmacistError
from pharmacist.core.files import atomic_folder
from pharmacist.core.hashing import sha256_file, sha256_json, sha256_text
from pharmacist.core.manifest import RunManifest, read_manifest


class Marker(BaseModel):
    """What ``finished/NAME.json`` says.

    Attributes:
        folder: Of the copy, relative to the URL.
        files: Path in the folder -> sha256.
        places: Folders of the machine that made it, which files may name: of its benchmark and of its package.
        manifest: Of the stage, so that nobody need download a model to read what it scored.
    """

    folder: str
    files: dict[str, str]
    places: dict[str, str]
    manifest: RunManifest

    @property
    def foreign(self) -> str | None:
        """A name in it with which a download could write, or read, outside the stage's folder; None as it should be.

        Whoever can write to the URL decides what markers say.
        """
        return next((name for name in (self.folder, *self.files) if not _is_plain(name)), None)


@dataclass(frozen=True)
class Remote:
    """The place behind a URL that fsspec opens (``s3://``, ``gs://``, ``file://``, ``memory://``).

    Every method raises a `DataError` where the place cannot be reached, or does not hold what it should.

    Attributes:
        url: Without a slash at its end.
    """

    url: str

    @classmethod
    def of(cls, place: str, option: str = "--output-dir") -> "Remote | None":
        """The place, unless it is a folder.

        Args:
            place: URL or folder.
            option: That gave it, for messages.

        Raises:
            ConfigError: Nobody knows the protocol, or the URL is a pattern.
            CompatibilityError: Its driver is not installed.
        """
        if "://" not in place:
            return None
        if not {"*", "?", "["}.isdisjoint(place):  # which fsspec takes for patterns
            raise ConfigError(f"{option} {place}: a URL must hold none of * ? [")
        remote = cls(place.rstrip("/"))
        try:
            remote._place()
        except ImportError as error:
            raise CompatibilityError(f"{option} {place}: {error} with pip") from error
        except ValueError as error:
            raise ConfigError(f"{option} {place}: {error}; give a folder, or s3://, gs://, ...") from error
        return remote

    @property
    def work_dir(self) -> Path:
        """Where stages run unless another folder is named: below the user's cache, the same for the same URL."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "pharmacist" / "bench" / sha256_text(self.url)[:16]

    def finished(self, names: Sequence[str]) -> dict[str, Marker]:
        """Those stages that are finished at the URL; an upload that was cut is none.

        Args:
            names: Of stages.
        """
        fs, root = self._place()
        paths = {name: f"{root}/finished/{name}.json" for name in names}
        with self._told("read"):
            texts = fs.cat(list(paths.values()), on_error="return") if paths else {}
        return {name: marker for name, path in paths.items() if (marker := self._parsed(path, texts[path]))}

    def publish(self, folder: Path) -> None:
        """Uploads the folder of a finished stage and then declares it finished.

        Args:
            folder: ``stages/NAME`` of a benchmark.
        """
        # What a run leaves under work/ is no result, and what is half written has a dot before its name.
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".tmp" and path.relative_to(folder).parts[0] != "work"
        )
        files = {name: sha256_file(folder / name) for name in names}
        place = f"stages/{folder.name}/{sha256_json(files)[:16]}"
        marker = Marker(folder=place, files=files, places=_places(folder), manifest=read_manifest(folder))
        self.put(folder, names, place)
        fs, root = self._place()
        with self._told("written"):
            fs.makedirs(f"{root}/finished", exist_ok=True)
            fs.pipe_file(f"{root}/finished/{folder.name}.json", marker.model_dump_json(indent=2).encode())

    def bring(self, folders: Iterable[Path]) -> None:
        """Downloads stages that are finished at the URL and lie here otherwise or not at all; whole or not at all.

        Args:
            folders: ``stages/NAME`` of a benchmark.
        """
        wanted = {folder.name: folder for folder in folders}
        for name, marker in self.finished(list(wanted)).items():
            folder = wanted[name]
            with _locked(folder.parents[1] / "locks" / name):
                if _is_here(folder, marker):
                    continue
                for leftover in folder.parent.glob(f".{name}.*.tmp"):  # of a download that was killed
                    shutil.rmtree(leftover)
                with atomic_folder(folder) as temporary:
                    self._get(marker.folder, marker.files, temporary)
                    _move(temporary, marker.places, _places(folder))

    def bring_rows(self, folder: Path, names: Sequence[str]) -> None:
        """Downloads rows of the made-up world that are not here.

        Args:
            folder: ``data`` of a benchmark.
            names: Of files, which end with the beginning of their content's sha256.
        """
        missing = {name: Path(name).stem.rpartition("-")[2] for name in names if not (folder / name).is_file()}
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as temporary:
            self._get("data", missing, Path(temporary))
            for name in missing:
                os.replace(Path(temporary) / name, folder / name)

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Downloads files that lie beside the stages.

        Args:
            names: Theirs.
            folder: Where to.
        """
        self._get("", dict.fromkeys(names, ""), folder)

    def put(self, folder: Path, names: Sequence[str], place: str = "") -> None:
        """Uploads files.

        Args:
            folder: Where they lie.
            names: Theirs, relative to the folder.
            place: Where they shall lie, relative to the URL.
        """
        fs, root = self._place()
        targets = [_joined(root, place, name) for name in names]
        with self._told("written"):
            for parent in sorted({target.rpartition("/")[0] for target in targets}):
                fs.makedirs(parent, exist_ok=True)
            fs.put([str(folder / name) for name in names], targets)

    def _get(self, place: str, files: Mapping[str, str], folder: Path) -> None:
        """Downloads files: name -> sha256, or how it begins.

        Args:
            place: Where they lie, relative to the URL.
            files: Names that cannot leave the folder.
            folder: A temporary one, so that nothing is where it belongs before its content is checked.
        """
        assert all(map(_is_plain, files))
        fs, root = self._place()
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with self._told("read"):
            if files:
                fs.get([_joined(root, place, name) for name in files], [str(folder / name) for name in files])
        if wrong := [name for name, digest in files.items() if not sha256_file(folder / name).startswith(digest)]:
            raise DataError(
                f"{self.url}/{place}/{wrong[0]}: is not what was uploaded; delete the stage's file in "
                f"{self.url}/finished, and the stage is run anew"
            )

    def _parsed(self, path: str, text: bytes | Exception) -> Marker | None:
        if isinstance(text, FileNotFoundError):
            return None
        if isinstance(text, Exception):  # nothing is trained again because a network failed
            with self._told("read"):
                raise text
        try:
            value = json.loads(text)
        except ValueError:  # cut while it was written
            return None
        except RecursionError as error:
            raise DataError(f"{path}: is nested too deeply; delete it, and the stage is run anew") from error
        try:
            marker = Marker.model_validate(value)
        except ValidationError as error:
            raise DataError(f"{path}: written by a newer version of pharmacist; update the package") from error
        if (name := marker.foreign) is not None:
            raise DataError(
                f"{path}: names the file {name!r}, which lies outside the stage's folder; pharmacist writes no such "
                "name, so see who can write there, and delete the file"
            )
        return marker

    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(self.url)
        return fs, root.rstrip("/")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turns what drivers raise, each its own, into one line."""
        try:
            yield
        except PharmacistError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.url}: cannot be {what} ({type(error).__name__}: {reason}); check address, network and rights"
            ) from error


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path that goes down only, and no pattern to fsspec."""
    parts = name.split("/")
    return set(parts).isdisjoint({"", ".", ".."}) and set(name).isdisjoint("\\:*?[") and name.isprintable()


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _is_here(folder: Path, marker: Marker) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    own, other = read_manifest(folder), marker.manifest
    return (own.key, own.created, own.finished) == (other.key, other.created, other.finished)


def _places(folder: Path) -> dict[str, str]:
    return {"bench": str(folder.parents[1]), "package": str(Path(pharmacist.__file__).parent)}


def _move(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Lets JSON files name the folders of this machine: an adapter its base, a ranking its pool."""
    moved = {
        json.dumps(f"{place}/", ensure_ascii=a)[:-1]: json.dumps(f"{now[name]}/")[:-1]
        for name, place in before.items()
        for a in (True, False)
        if now.get(name, place) != place
    }
    for path in folder.rglob("*.json") if moved else ():
        text = path.read_text(encoding="utf-8")
        for old, new in moved.items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
