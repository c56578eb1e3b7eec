"""Writes the made-up world as ordinary files, so that every example of the docs runs as it stands.

    python examples/world_files.py FOLDER

FOLDER then holds pool.jsonl, references (safe, harmful, utility), attack.jsonl, task.jsonl, test sets, and MODEL, the
tiny base model. Every word in them is harmless: the "forbidden" acts are those of a village in a fairy tale.
"""

import json
import shutil
import sys
from pathlib import Path

from pharmacist.worlds import BASE_MODEL, World


def write_world(folder: Path, rows: int = 600, seed: int = 0) -> None:
    """Writes the files.

    Args:
        folder: Made where it is missing.
        rows: Of the pool; their known labels go to ``labels.json``.
        seed: Of the world.
    """
    world = World(seed)
    pool, labels = world.pool(rows, mislabel=0.05)
    files = {
        "pool": pool,
        "safe": world.safe(),
        "harmful": world.harmful(),
        "utility": world.utility(),
        "attack": world.attack_harmful(100, ("potions",)),
        "task": world.task_train(1000),
        "task-test": world.task_test(100),
        "answers": [
            {"prompt": row["prompt"], "answer": row["completion"]} for row in world.safe(20) + world.harmful(20)
        ],
        "prompts": world.eval_prompts(60),
        "borderline": world.borderline(40),
        **{f"judge-{name}": rows for name, rows in world.judge_references().items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in files.items():
        lines = (json.dumps(row) + "\n" for row in members)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    shutil.copytree(BASE_MODEL, folder / "MODEL", dirs_exist_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/world_files.py FOLDER")
    write_world(Path(sys.argv[1]))
    print(f"written to {sys.argv[1]}")
