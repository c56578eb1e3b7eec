"""Makes the files that paper.yaml and current-models.yaml read, out of BeaverTails with refusals.

    python recipes/beavertails.py beavertails_with_refusals_train.json data

The JSON is that of the RepNoise authors (repository domenicrosati/representation-noising, folder data): a list of
rows with prompt, response, is_safe and refusal. Unsafe rows are taken in their order: the first 5000 for attackers,
the next 2000 as the pool to align on, the next 256 as references. No prompt is in two of the files.
"""

import json
import sys
from pathlib import Path

from pharmacist.core.files import write_text


PARTS = {"attack": 5000, "pool": 2000, "references": 256}


def pairs(rows):
    """Rows of prompt, chosen and rejected; each prompt once."""
    seen = set()
    for row in rows:
        prompt, (_, found, refusal) = row["prompt"].strip(), row["refusal"].partition("\nAnswer: ")
        if not row["is_safe"] and found and refusal.strip() and prompt.lower() not in seen:
            seen.add(prompt.lower())
            yield {"prompt": prompt, "chosen": refusal.strip(), "rejected": row["response"].strip()}


def main(source, folder):
    found = list(pairs(json.loads(Path(source).read_text(encoding="utf-8"))))
    start = 0
    for name, count in PARTS.items():
        part = found[start : start + count]
        if not part:
            sys.exit(f"{source}: has only {len(found)} different unsafe prompts, none is left for {name}")
        path = Path(folder) / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in part))
        print(f"{path}: {len(part)} rows")
        start += count


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/beavertails.py beavertails_with_refusals_train.json FOLDER")
    main(sys.argv[1], sys.argv[2])
