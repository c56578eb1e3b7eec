"""Writes the files that paper.yaml and current-models.yaml read, from BeaverTails with refusals.

    python recipes/beavertails.py beavertails_with_refusals_train.json data

The JSON is that of the RepNoise authors (repository domenicrosati/representation-noising, folder data): a list of rows
with prompt, response, is_safe and refusal. Unsafe rows are taken in their order: the first 5000 for attackers, the
next 2000 as the pool to align on, the next 256 as references. No prompt is in two of the files. If a file of one of
these names exists with other content, nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path

from pharmacist.core.errors import ConfigError, DataError, PharmacistError
from pharmacist.core.files import read_json, write_text


PARTS = {"attack": 5000, "pool": 2000, "references": 256}


def pairs(rows):
    """Rows of prompt, chosen and rejected; each prompt once."""
    seen = set()
    for row in rows:
        prompt, (_, found, refusal) = row["prompt"].strip(), row["refusal"].partition("\nAnswer: ")
        if not row["is_safe"] and found and refusal.strip() and prompt.lower() not in seen:
            seen.add(prompt.lower())
            yield {"prompt": prompt, "chosen": refusal.strip(), "rejected": row["response"].strip()}


def make(source, folder):
    """Writes all files, or none.

    Raises:
        PharmacistError: The source has other rows or too few, or something else lies in the folder.
    """
    try:
        found = list(pairs(read_json(source)))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check the path") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{source}: is no list of rows with prompt, response, is_safe and refusal ({error!r}); give the file of "
            "the RepNoise authors"
        ) from error
    parts, start = {}, 0
    for name, count in PARTS.items():
        part = found[start : start + count]
        if not part:
            raise DataError(f"{source}: has only {len(found)} different unsafe prompts, none is left for {name}")
        parts[folder / f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in part)
        start += count
    for path, text in parts.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
            raise ConfigError(f"{path}: holds something else; choose another folder, or move it away")
    for path, text in parts.items():
        write_text(path, text)
        print(f"{path}: {len(text.splitlines())} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="beavertails_with_refusals_train.json")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    make(given.source, given.folder)


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"beavertails.py: {error}", file=sys.stderr)
        sys.exit(2)
