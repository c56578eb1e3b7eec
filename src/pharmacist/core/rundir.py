"""Output folders of runs: locking, identity, completeness and resuming."""

import fcntl
import itertools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import IO, Any

from pydantic import ValidationError

from pharmacist.core.env import process_index, versions
from pharmacist.core.errors import BusyError, ConfigError, DataError, OtherRunError
from pharmacist.core.files import FULL_DISK, atomic_folder, is_whole_tensors, read_json, remove, write_json
from pharmacist.core.hashing import sha256_json
from pharmacist.core.inputs import check_outside
from pharmacist.core.manifest import Phase, RunManifest, check_unchanged, missing_output, output_files, read_manifest
from pharmacist.core.options import RunOptions, as_json, identifying
from pharmacist.core.progress import say, warn


KEPT_EVERY = 10.0
"""Seconds after which the cost of a phase is written again, which a killed run thus loses at most."""
EARLIER = "earlier"
"""Folder, in that of a run, of the results that it had before it was reopened with other options."""
_MADE_FROM: ContextVar[Mapping[str, str]] = ContextVar("made_from")


@contextmanager
def made_from(results: Mapping[str, str]) -> Iterator[None]:
    """Sets `RunManifest.made_from` of the runs that are begun in the block, which are part of the run around them."""
    token = _MADE_FROM.set(results)
    try:
        yield
    finally:
        _MADE_FROM.reset(token)


class RunDir:
    """One stage's output folder, `root`, and the `manifest` of its run.

    Finished results lie in it; ``work/`` holds partial state until `finish` removes it. Only the first process of a
    data-parallel run writes here, apart from what the others put under ``work/`` themselves. Where no folder was asked
    for (``output_dir`` is empty, from Python), a `temporary` one holds the partial state, and `close` deletes it;
    there is no use in writing weights.
    """

    def __init__(
        self,
        root: Path,
        manifest: RunManifest,
        lock: IO[str] | None,
        temporary: TemporaryDirectory[str] | None = None,
        made: Sequence[Path] = (),
    ) -> None:
        """`made` are the folder and those around it, the inner first, that did not exist before this run."""
        self.root, self.manifest, self._lock, self.temporary, self._made = root, manifest, lock, temporary, made

    @classmethod
    def open(
        cls,
        options: RunOptions,
        *,
        stage: str,
        version: int,
        inputs: Mapping[str, str],
        final: frozenset[str] = frozenset(),
        final_inputs: frozenset[str] = frozenset(),
        reopen: bool = False,
        keep: bool = False,
        read_again: tuple[str, ...] = (),
    ) -> "RunDir":
        """Takes possession of the output folder.

        Args:
            options: The stage's options; all but folder, verbosity and overwriting identify the run.
            stage: Name of the stage ("curate").
            version: Raised by hand whenever the stage's results change, so that old folders are not taken for new.
            inputs: Fingerprint per input.
            final: Options that no partial state depends on; an unfinished run goes on when they change.
            final_inputs: Inputs of which the same is true.
            reopen: A finished run goes on too when only these change; it keeps its phases, counts and extras, and the
                stage reads from its results what need not be computed again.
            keep: Whether its results so far are kept then, in a folder of their own in `EARLIER`.
            read_again: Outputs that the stage reads where the run is finished already; none may have been changed.

        Raises:
            ConfigError: The folder holds another run, other files or an input, is a file, is in use, or is one that
                the run around it deletes.
        """
        temporary = None if options.output_dir else TemporaryDirectory(prefix="pharmacist-")
        root = Path(temporary.name if temporary else options.output_dir)
        check_usable(root, options)
        config = as_json(options)
        # Of an input its content counts, not the path that led to it.
        paths = {name for name in inputs if isinstance(config.get(name), str | list)}
        relevant = {name: value for name, value in identifying(config).items() if name not in paths}

        def key_without(options: frozenset[str], contents: frozenset[str]) -> str:
            own = {name: value for name, value in relevant.items() if name not in options}
            read = {name: value for name, value in inputs.items() if name not in contents}
            return sha256_json({"stage": stage, "version": version, "config": own, "inputs": read})

        manifest = RunManifest(
            stage=stage,
            status="started",
            key=key_without(frozenset(), frozenset()),
            work_key=key_without(final, final_inputs),
            config=config,
            inputs=dict(inputs),
            versions=versions(),
            seeds={"seed": options.seed},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            made_from=dict(_MADE_FROM.get({})),
        )
        if process_index() != 0:
            return cls(root, manifest, None, temporary)
        if os.path.isdir(root):  # a folder that is not this run's is not touched, not even by a lock
            if not options.overwrite:
                found = _previous(root, manifest, relevant, reopen)
                check_unchanged(root, *read_again)
                if found is not None and found.status == "success" and found.key == manifest.key:
                    lost = missing_output(root, found)
                    if lost is None:
                        if (root / "work").is_dir():  # left by a kill, or in use by a run that goes on
                            with suppress(ConfigError, OSError), _lock(root):
                                remove(root / "work", as_far_as_possible=True)
                        return cls(root, found, None)
                    say(f"{root}: {lost} is missing, so this run is repeated")
            elif (root / "manifest.json").is_file():
                if other := next(_runs_within(root, but=_own_folders(read_manifest(root))), None):
                    raise ConfigError(
                        f"{root}: --overwrite would delete another run too, {other}; move that elsewhere, or delete it"
                    )
            _refuse_links(root, options.overwrite)
        made = [folder for folder in (root, *root.parents) if not os.path.lexists(folder)]
        with ExitStack() as on_failure:
            on_failure.callback(_remove_empty, made)
            lock = _lock(root)
            on_failure.callback(lock.close)
            if options.overwrite:
                _clear(root)
            found = _previous(root, manifest, relevant, reopen)
            if found is not None:
                stays = ("created", "phases", "counts", "extra", "device", "outputs")
                kept = {name: getattr(found, name) for name in stays}
                whole = found.status != "success" or missing_output(root, found) is None
                if keep and found.status != "started" and found.key != manifest.key:
                    _keep(root, found)
                manifest = found if found.key == manifest.key and whole else manifest.model_copy(update=kept)
                _drop_damaged_tensors(root / "work")
            if manifest is not found:
                manifest.write(root)
            for leftover in list(_leftovers(root)):
                remove(leftover)
            on_failure.pop_all()
        return cls(root, manifest, lock, temporary, made)

    @property
    def complete(self) -> bool:
        """Whether a finished run with the same options and inputs lies here."""
        return self.manifest.status == "success"

    def path(self, *parts: str) -> Path:
        """A path in the output folder."""
        return self.root.joinpath(*parts)

    def work(self, *parts: str) -> Path:
        """A path for partial state; its parent folder exists."""
        path = self.root.joinpath("work", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Measures a phase; its wall time adds up over resumes, also of killed runs, and ends in the manifest.

        So do its tokens, which begin at those of earlier attempts: add to them what was read in this one, or set them
        to those of all.
        """
        path = self.work("phases", f"{name}.json")
        before = _read_phase(path) if path.is_file() else Phase()
        current, start = Phase(tokens=before.tokens, extra=before.extra), time.perf_counter()

        def keep() -> None:
            current.seconds = before.seconds + time.perf_counter() - start
            if self._lock is not None:
                write_json(path, current.model_copy(update={"extra": dict(current.extra)}).model_dump(mode="json"))

        try:
            with _repeated(keep, KEPT_EVERY):
                yield current
        finally:
            self.manifest.phases[name] = current
            keep()

    def record(self, **results: Any) -> None:
        """Notes results in the manifest without writing it yet, for pages that show them.

        `results` are fields of `RunManifest`; mappings, such as ``counts``, are merged into those of the manifest.
        """
        manifest = self.manifest
        for file in sorted(self.root.glob("work/phases/*.json")):
            manifest.phases.setdefault(file.stem, _read_phase(file))
        for name, value in results.items():
            before = getattr(manifest, name)
            setattr(manifest, name, before | dict(value) if isinstance(before, dict) else value)

    def finish(self, *, outputs: list[str], partial: bool = False, **results: Any) -> None:
        """Declares the run complete, or `partial`: writes the manifest, then removes the partial state.

        `outputs` are the files and folders that make up the result; `results` are as in `record`. Of a partial run
        something failed on the way: its results may be used, but the partial state stays, for the same run to go on.
        """
        self.record(**results)
        manifest = self.manifest
        manifest.status, manifest.outputs = "partial" if partial else "success", outputs
        manifest.files = output_files(self.root, outputs) if self._lock is not None else {}
        manifest.finished = datetime.now(UTC).isoformat(timespec="seconds")
        if self._lock is not None:
            manifest.write(self.root)
            self.close()

    def begin_again(self) -> None:
        """Takes possession of the folder of a complete run, for `finish` to declare new results of it.

        Raises:
            ConfigError: It is in use, or cannot be written.
        """
        if process_index() == 0:
            self._lock = _lock(self.root)
        self.manifest.status = "started"

    def claim(self, *folders: str) -> None:
        """Notes in which of its folders this run will have runs of its own; others in the folder are not deleted."""
        self.manifest.outputs = list(dict.fromkeys([*self.manifest.outputs, *folders]))
        if self._lock is not None:
            self.manifest.write(self.root)

    def holds(self, pattern: str) -> bool:
        """Whether a file that matches a pattern, such as ``work/**/*.safetensors``, has content."""
        return any(path.is_file() and path.stat().st_size for path in self.root.glob(pattern))

    def discard(self, *outputs: str) -> None:
        """Forgets a run without results, and files that it wrote: the folder is free for one with corrected input.

        Folders that this run has made are deleted too.
        """
        if self._lock is None:
            return
        for name in outputs:
            self.path(name).unlink(missing_ok=True)
        parts = list(self.root.iterdir())
        if all(path.name in ("manifest.json", "work") or _is_hollow(path) for path in parts):
            for path in sorted(parts, key=lambda path: path.name != "manifest.json"):
                remove(path, as_far_as_possible=True)
            self.close()
            _remove_empty(self._made)

    def close(self) -> None:
        """Releases the folder; partial state stays unless the run is complete."""
        if self._lock is not None:
            if self.complete:
                remove(self.root / "work", as_far_as_possible=True)
            self._lock.close()
            self._lock = None
        if self.temporary is not None:
            self.temporary.cleanup()


@contextmanager
def _repeated(job: Callable[[], None], seconds: float) -> Iterator[None]:
    """Does a job every so many seconds, in a thread, while the block runs."""
    over = Event()

    def repeat() -> None:
        while not over.wait(seconds):
            with suppress(OSError):  # a full disk, say, which the block itself reports
                job()

    thread = Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def check_usable(root: Path, options: RunOptions) -> None:
    """Refuses an output folder in which no run with these options can begin or go on, by a ConfigError."""
    check_outside(root, options)
    if process_index() != 0:  # the first process looks after the folder
        return
    if os.path.isfile(root):  # unlike Path's own, no error for names that no file system takes
        raise ConfigError(f"{root}: is a file; --output-dir needs a folder")
    if os.path.isdir(root) and not _ours(root):
        remedy = "so --overwrite leaves them alone" if options.overwrite else "choose an empty --output-dir"
        raise ConfigError(f"{root}: contains files that do not belong to a pharmacist run; {remedy}")
    if _MADE_FROM.get(None) is None and (options.overwrite or not os.path.isfile(root / "manifest.json")):
        _check_place(Path(os.path.realpath(root)))


def _check_place(root: Path) -> None:
    """Refuses a folder for a new run where the run around it deletes or replaces it."""
    for outer in root.parents:
        try:
            own = _own_folders(read_manifest(outer)) if (outer / "manifest.json").is_file() else ()
        except (DataError, OSError):  # of something else
            continue
        if (name := root.relative_to(outer).parts[0]) in own:
            raise ConfigError(
                f"{root}: lies in {outer / name}, which is deleted or replaced with the run in {outer}; choose "
                "another --output-dir"
            )


def _own_folders(manifest: RunManifest) -> set[str]:
    """Names of the folders in that of a run which belong to it, with all runs in them."""
    return {"work", EARLIER, *manifest.outputs}


def _runs_within(root: Path, *, but: Collection[str]) -> Iterator[Path]:
    """Folders of runs in a folder, but not in some of its subfolders nor in each other."""
    for folder, below, files in os.walk(root):
        if Path(folder) == root:
            below[:] = [name for name in below if name not in but]
        elif "manifest.json" in files:
            below.clear()
            yield Path(folder)


def _leftovers(root: Path) -> Iterator[Path]:
    """What a killed run was about to write; not in the folders of other runs, which may be writing it now."""
    for folder, below, files in os.walk(root):
        if Path(folder) != root and "manifest.json" in files:
            below.clear()
            continue
        found = [name for name in (*below, *files) if fnmatchcase(name, ".*.tmp")]
        below[:] = [name for name in below if name not in found]
        yield from (Path(folder, name) for name in found)


def _keep(root: Path, manifest: RunManifest) -> None:
    """Copies the results of a run into a folder of their own, which is that of a run like its own."""
    folder = root / EARLIER / manifest.key[:16]
    with atomic_folder(folder) as copy:
        for path in (root / name for name in manifest.outputs):
            if path.exists():
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy / path.name)
        manifest.write(copy)
    say(f"{root}: the results so far are kept in {folder}")


def _drop_damaged_tensors(work: Path) -> None:
    """Deletes damaged tensors of a run's partial state, so that they are computed again."""
    for path in [path for path in work.rglob("*.safetensors") if "checkpoints" not in path.parts]:
        if not is_whole_tensors(path):
            say(f"{path}: is damaged and was deleted; it is computed again")
            path.unlink()
            (path.parent / "adapter_config.json").unlink(missing_ok=True)  # it says that the adapter is whole


def _is_hollow(path: Path) -> bool:
    """Whether a folder has no files, as runs in it leave it that were discarded."""
    return path.is_dir() and not path.is_symlink() and all(_is_hollow(part) for part in path.iterdir())


def _remove_empty(folders: Iterable[Path]) -> None:
    """Deletes empty folders, each in the next, as far as possible."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _read_phase(path: Path) -> Phase:
    """Cost of a phase before the run was interrupted; nothing, with a warning, where its file is damaged."""
    try:
        return Phase.model_validate(read_json(path))
    except (DataError, ValidationError):
        warn(f"{path}: is damaged; time and tokens that this phase took before are not counted")
        return Phase(extra={"before_lost": True})


def _refuse_links(root: Path, overwrite: bool) -> None:
    """Partial state never lies behind a link, for it is deleted in the end; overwriting unlinks what is in the way."""
    work = root / "work"
    if overwrite:
        for link in (work, work / "lock"):
            if link.is_symlink():
                link.unlink()
        return
    # Not by `Path.rglob`, which fails where another run deletes a folder meanwhile: the lock is taken only later.
    below = (Path(folder, name) for folder, *names in os.walk(work) for name in itertools.chain(*names))
    for path in (work, *below):
        if path.is_symlink():
            raise ConfigError(
                f"{path}: is a link, but partial results must lie in the output folder itself; delete the link (to "
                "use another disk, link the whole output folder)"
            )


def _lock(root: Path) -> IO[str]:
    path = root / "work" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise ConfigError(f"{root}: cannot be written ({error.strerror}); choose another --output-dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise BusyError(
            f"{root}: another process is working in this folder; wait for it or choose another --output-dir"
        ) from error
    except OSError:
        pass  # a file system without locks, such as Lustre mounted without flock: the user must see to it
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
            return lock
    lock.close()  # a run that finished in between has deleted the file
    return _lock(root)


def _ours(root: Path) -> bool:
    """Whether a folder is empty or holds a run, possibly one that was killed before its first manifest."""
    if (root / "manifest.json").is_file():
        return True
    # A run killed before its first manifest leaves at most a work folder with a lock.
    names = {path.name for path in root.iterdir() if not path.name.startswith(".manifest.json.")}
    return names <= {"work"} and {path.name for path in root.glob("work/*")} <= {"lock"}


def _previous(root: Path, manifest: RunManifest, relevant: Mapping[str, Any], reopen: bool) -> RunManifest | None:
    """The manifest in `root` if it is of the same run as `manifest`; raises if it is of another."""
    if not (root / "manifest.json").is_file():
        return None
    found = read_manifest(root)
    unfinished = found.status == "started" or reopen
    if found.key == manifest.key or (unfinished and found.work_key == manifest.work_key):
        return found
    if found.stage != manifest.stage:
        difference = f"a run of '{found.stage}'"
    else:
        changed = [name for name, value in relevant.items() if found.config.get(name) != value]
        changed += [f"content of {name}" for name, value in manifest.inputs.items() if found.inputs.get(name) != value]
        changed += [name for name in found.inputs if name not in manifest.inputs]
        difference = f"a run with other {', '.join(dict.fromkeys(changed)) or 'code'}"
    raise OtherRunError(f"{root}: holds {difference}; choose another --output-dir, or --overwrite to delete it")


def _clear(root: Path) -> None:
    """Deletes an earlier run, all but its lock."""
    if (root / "manifest.json").is_file():
        # Killed from here on, the folder is still a run that may be overwritten, but none that looks complete.
        read_manifest(root).model_copy(update={"status": "started", "key": "", "work_key": ""}).write(root)
    for path in sorted(root.iterdir(), key=lambda path: path.name == "manifest.json"):
        for part in path.iterdir() if path.name == "work" else (path,):
            if part != root / "work" / "lock":
                remove(part)
