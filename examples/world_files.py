"""Writes the synthetic world as ordinary files, so that every example of the docs runs as it stands.

    python examples/world_files.py FOLDER

FOLDER then holds pool.jsonl, references (safe, harmful, utility), attack.jsonl, task.jsonl, test sets, and MODEL, the
tiny base model. Every word in them is harmless: the "forbidden" acts are those of a village in a fairy tale.
"""

import argparse
import json
import shutil
from pathlib import Path

from pharmacist.worlds import BASE_MODEL, SETS, World, json_lines


def write_world(folder: Path, rows: int = 600, seed: int = 0) -> None:
    """Writes the files.

    Args:
        folder: Made where it is missing.
        rows: Of the pool; their known labels go to ``labels.json``.
        seed: Of the world.
    """
    world = World(seed)
    pool, labels = world.pool(rows)
    sizes = SETS | {"attack": 100, "task": 1000, "task-test": 100, "prompts": 60, "borderline": 40}
    sets = {"pool": pool} | {name: world.rows(name, number) for name, number in sizes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in sets.items():
        (folder / f"{name}.jsonl").write_text(json_lines(own), encoding="utf-8")
    answers = [
        {"prompt": row["prompt"], "answer": row["completion"]}
        for row in world.rows("safe", 20) + world.rows("harmful", 20)
    ]
    (folder / "answers.jsonl").write_text(json_lines(answers), encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    shutil.copytree(BASE_MODEL, folder / "MODEL", dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the synthetic world as ordinary files.")
    parser.add_argument("folder", type=Path, help="folder for the files; made if it is missing")
    folder = parser.parse_args().folder
    write_world(folder)
    print(f"written to {folder}")
