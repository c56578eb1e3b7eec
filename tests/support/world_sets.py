"""The sets of the synthetic world, and words in them."""

import re
from collections.abc import Iterable
from pathlib import Path

from pharmacist.worlds import World


def sets(world: World) -> dict[str, list[dict[str, str]]]:
    return {
        "pool": world.pool(600)[0],
        "clean pool": [row.row for row in world.labelled(600, kind="clean")],
        "safe": world.rows("safe", 96),
        "harmful": world.rows("harmful", 96),
        "utility": world.rows("utility", 96),
        "judge": [row for kind in ("safe", "harmful", "utility") for row in world.rows(f"judge-{kind}", 120)],
        "attack": world.rows("attack", 80),
        "task train": world.rows("task", 600),
        "eval": world.rows("prompts", 150),
        "borderline": world.rows("borderline", 80),
        "task test": world.rows("task-test", 150),
    }


def normalised(prompt: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", prompt.lower()))


def words_of(rows: Iterable[dict[str, str]]) -> set[str]:
    texts = (row[name] for row in rows for name in ("prompt", "completion") if name in row)
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def reviewed_words() -> set[str]:
    text = Path(__file__).parents[1].joinpath("worlds", "lexicon.txt").read_text(encoding="utf-8")
    return {word for line in text.splitlines() if not line.startswith("#") for word in line.split()}
