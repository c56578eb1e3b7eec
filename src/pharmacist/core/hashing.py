"""Content fingerprints: sha256 of files, texts and canonical JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any


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


def sha256_folder(path: str | Path, suffixes: tuple[str, ...] | None = None) -> str:
    """Hex sha256 over the relative names and contents of the files in a folder.

    Args:
        path: The folder.
        suffixes: Only files with these suffixes count; all files by default.
    """
    root = Path(path)
    files = sorted(f for f in root.rglob("*") if f.is_file() and (suffixes is None or f.suffix in suffixes))
    return sha256_json([[str(f.relative_to(root)), sha256_file(f)] for f in files])
