"""Content fingerprints: sha256 of files, texts and canonical JSON."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


_NOT_LOADED = (".md", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pth", ".tflite")


def sha256_text(text: str) -> str:
    """Hex sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of key order."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str))


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: str | Path, counts: Callable[[Path], bool] = lambda name: True) -> str:
    """Hex sha256 over the relative names and contents of the files in a folder, or of those whose name counts."""
    root = Path(path)
    names = sorted(file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return sha256_json([[str(name), sha256_file(root / name)] for name in names if counts(name)])


def sha256_content(path: str | Path) -> str:
    """`sha256_folder` over all that can be loaded from a folder: a model, an adapter, an encoder, a saved dataset.

    Every file counts but hidden ones, texts for people, weights of other programs, and the caches that libraries put
    beside what they have loaded.
    """

    def counts(name: Path) -> bool:
        cache = name.suffix == ".arrow" and name.name.startswith(("cache-", "tmp")) or "__pycache__" in name.parts
        return not cache and name.suffix not in _NOT_LOADED and not any(part.startswith(".") for part in name.parts)

    return sha256_folder(path, counts)
