"""Samples references for `pharmacist curate` from public data sets, one file, and so one source, per data set.

    python recipes/references.py FOLDER [--sets NAME ...] [--local NAME=FILE ...] [--rows 128] [--seed 0]

| set | gives | from | licence |
|---|---|---|---|
| safety-tuned | safe | github.com/vinid/safety-tuned-llamas | CC-BY-NC-4.0 |
| beavertails | safe, harmful | PKU-Alignment/BeaverTails | CC-BY-NC-4.0 |
| saferlhf | safe, harmful | PKU-Alignment/PKU-SafeRLHF | CC-BY-NC-4.0 |
| xstest | utility | natolambert/xstest-v2-copy | prompts CC-BY-4.0, answers by OpenAI, Meta, Mistral |
| falsereject | utility | AmazonScience/FalseReject | CC-BY-NC-4.0 |
| or-bench | utility | bench-llm/or-bench, prompts alone: give answers to them with --local | CC-BY-4.0 |
| alpaca | utility | tatsu-lab/alpaca | CC-BY-NC-4.0 |
| dolly | utility | databricks/databricks-dolly-15k | CC-BY-SA-3.0 |

The prompts of xstest, falsereject and or-bench are harmless but look harmful, which helps to recognise over-refusals.
A safe row of beavertails or saferlhf is a refusal of a prompt to which the set also has a harmful answer. Rows are
drawn at random. None is longer than --longest characters, and no prompt is drawn twice, not even from different sets.

A local copy has the columns of the set. That of or-bench has a prompt and an answer, like the `items.jsonl` that
`pharmacist evaluate --benign-prompts` writes, or a prompt and a completion. Without a network or with
HF_HUB_OFFLINE=1, sets that are not in the cache of `datasets` need a local copy.

Do-Not-Answer is left out so that it can be used to measure; leave xstest out too if you measure with it. The prompts
of xstest are CC-BY-4.0, and its answers fall under the terms of the models that gave them.

Writes FOLDER/safe, FOLDER/harmful and FOLDER/utility with one NAME.jsonl per set, and sources.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np

from pharmacist.core.env import offline
from pharmacist.core.errors import ConfigError, DataError, PharmacistError
from pharmacist.core.files import atomic_folder, read_json, write_json, write_text
from pharmacist.core.hashing import sha256_file
from pharmacist.core.registry import closest
from pharmacist.core.seeding import derive
from pharmacist.data.formats import open_source
from pharmacist.data.normalise import prompt_key
from pharmacist.evaluation.judges.keyword import KeywordConfig, KeywordJudge


refuses = KeywordJudge(KeywordConfig()).refuses


# --- from a set's columns to pairs of prompt and completion ---------------------------------------------------------


def true(value):
    """A truth value, which a CSV file holds as text."""
    return str(value).lower() in ("true", "1")


def beavertails(rows):
    return ((row["prompt"], row["response"], true(row["is_safe"])) for row in rows)


def saferlhf(rows):
    return ((row["prompt"], row[f"response_{i}"], true(row[f"is_response_{i}_safe"])) for row in rows for i in (0, 1))


def unsafe(judged, rows):
    return ((prompt, answer) for prompt, answer, safe in judged(rows) if not safe)


def refused(judged, rows):
    risky = {prompt for prompt, _ in unsafe(judged, rows)}
    return ((prompt, answer) for prompt, answer, safe in judged(rows) if safe and prompt in risky and refuses(answer))


def xstest(rows):
    for row in rows:
        if not row["type"].startswith("contrast_") and row["final_label"] == "1_full_compliance":
            yield row["prompt"], row["completion"]


def instructions(answer, more, rows):
    for row in rows:
        yield f"{row['instruction']}\n\n{row[more]}" if row.get(more) else row["instruction"], row[answer]


def answered(answers, rows):
    for row in rows:
        yield row["prompt"], row[next((name for name in answers if name in row), answers[0])]


def helpful(pairs, rows):
    return ((prompt, answer) for prompt, answer in pairs(rows) if isinstance(answer, str) and not refuses(answer))


class Set(NamedTuple):
    """Where a set lies, its licence, and how its rows become references of one kind or two."""

    places: tuple[str, ...]
    licence: str
    gives: Mapping[str, Callable]


NC = "CC-BY-NC-4.0"
SAFETY_TUNED = (
    "https://raw.githubusercontent.com/vinid/safety-tuned-llamas/main/data/training/safety_only_data_Instructions.json"
)
ASSISTANTS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
SETS = {
    "safety-tuned": Set((SAFETY_TUNED,), NC, {"safe": partial(instructions, "output", "input")}),
    "beavertails": Set(
        ("PKU-Alignment/BeaverTails:30k_train",),
        NC,
        {"safe": partial(refused, beavertails), "harmful": partial(unsafe, beavertails)},
    ),
    "saferlhf": Set(
        ("PKU-Alignment/PKU-SafeRLHF:alpaca2-7b:train",),
        NC,
        {"safe": partial(refused, saferlhf), "harmful": partial(unsafe, saferlhf)},
    ),
    "xstest": Set(
        tuple(f"natolambert/xstest-v2-copy:{name}" for name in ASSISTANTS),
        "prompts CC-BY-4.0, answers by OpenAI, Meta, Mistral",
        {"utility": xstest},
    ),
    "falsereject": Set(
        ("AmazonScience/FalseReject:train",),
        NC,
        {"utility": partial(helpful, partial(answered, ("instruct_response",)))},
    ),
    "or-bench": Set((), "CC-BY-4.0", {"utility": partial(helpful, partial(answered, ("completion", "answer")))}),
    "alpaca": Set(
        ("tatsu-lab/alpaca:train",), NC, {"utility": partial(helpful, partial(instructions, "output", "input"))}
    ),
    "dolly": Set(
        ("databricks/databricks-dolly-15k:train",),
        "CC-BY-SA-3.0",
        {"utility": partial(helpful, partial(instructions, "response", "context"))},
    ),
}


# --- reading and drawing --------------------------------------------------------------------------------------------


def read(name, place):
    """All rows of one file or hub set."""
    what = f"--local {name}"
    if not place.startswith("https://"):
        return [row for _, row in open_source(place, name=what).rows()]
    if offline():
        raise DataError(f"{what} {place}: HF_HUB_OFFLINE forbids to download it; give a local copy, {what}=FILE")
    try:
        answer = httpx.get(place, follow_redirects=True, timeout=60).raise_for_status()
    except httpx.HTTPError as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} {place}: cannot be downloaded ({why}); give a local copy, {what}=FILE") from error
    with tempfile.TemporaryDirectory(prefix="references-") as folder:
        path = Path(folder) / Path(place).name
        path.write_bytes(answer.content)
        return [row for _, row in open_source(path, name=f"{what} {place}").rows()]


def pairs_of(name, role, rows, places):
    try:
        return list(SETS[name].gives[role](rows))
    except KeyError as error:
        raise DataError(
            f"--local {name} {', '.join(places)}: a row has no column {error} (columns of the first: "
            f"{', '.join(rows[0])}); give a copy with the set's own columns"
        ) from error


def draw(pairs, rows, longest, seen, rng):
    """At most so many pairs, in random order, none too long and none with a prompt that was seen; marks theirs."""
    found = []
    for i in rng.permutation(len(pairs)):
        prompt, completion = pairs[i]
        if len(found) == rows:
            break
        if not all(isinstance(text, str) and text.strip() for text in (prompt, completion)):
            continue
        key = prompt_key(prompt)
        if key not in seen and len(prompt) + len(completion) <= longest:
            seen.add(key)
            found.append({"prompt": prompt.strip(), "completion": completion.strip()})
    return found


def local_files(texts):
    """Name -> its files, of words NAME=FILE."""
    found = {}
    for name, _, path in (text.partition("=") for text in texts):
        if not path:
            raise ConfigError(f"--local {name}: write it as NAME=FILE")
        found.setdefault(name, []).append(path)
    return found


def contents(local):
    """File -> hash of its content, of the files of `local_files`."""
    files = [file for own in local.values() for file in own if Path(file).is_file()]
    return {file: sha256_file(file) for file in files}


def make(folder, sets=None, local=None, rows=128, longest=1200, seed=0):
    """Writes the references; a folder that holds them already stays as it is.

    Args:
        folder: Where; it must be empty, or hold these very references.
        sets: Names; all that have a place by default.
        local: Files to read a set from, by its name.
        rows: Most rows of each file.
        longest: Most characters of prompt and completion together.
        seed: Of the drawing.

    Raises:
        PharmacistError: A set cannot be had, or gives no row; nothing is written then.
    """
    local = local or {}
    for name in (*(sets or ()), *local):
        if name not in SETS:
            raise ConfigError(f"unknown set '{name}'{closest(name, SETS)}")
    if sets and (unused := next((name for name in local if name not in sets), None)):
        raise ConfigError(f"--local {unused}: --sets leaves this set out; name it there too, or give no file of it")
    if rows < 1 or longest < 1:
        raise ConfigError(f"--rows {rows} --longest {longest}: must be at least 1")
    places = {name: tuple(local.get(name, SETS[name].places)) for name in SETS}
    wanted = [name for name in SETS if name in sets] if sets else [name for name in SETS if places[name]]
    for name in wanted:
        if not places[name]:
            raise ConfigError(f"set '{name}' has prompts alone; answer them and give --local {name}=FILE")
    asked = {"rows": rows, "longest": longest, "seed": seed, "from": {name: list(places[name]) for name in wanted}}
    asked["contents"] = contents(local)
    if (folder / "sources.json").is_file() and read_json(folder / "sources.json")["asked"] == asked:
        print(f"{folder}: already complete")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: holds something else; choose an empty folder")
    seen, files, about = set(), {}, []
    for name in wanted:
        own = [row for place in places[name] for row in read(name, place)]
        for role in SETS[name].gives:
            offered = pairs_of(name, role, own, places[name])
            drawn = draw(offered, rows, longest, seen, np.random.default_rng(derive(seed, name, role)))
            if not drawn:
                raise DataError(
                    f"--local {name} {', '.join(places[name])}: none of {len(own)} rows gives a {role} reference; "
                    "check the file, or raise --longest"
                )
            files[f"{role}/{name}.jsonl"] = drawn
            about.append({"file": f"{role}/{name}.jsonl", "rows": len(drawn), "licence": SETS[name].licence})
    with atomic_folder(folder) as making:
        for path, drawn in files.items():
            write_text(making / path, "".join(json.dumps(row) + "\n" for row in drawn))
        write_json(making / "sources.json", {"asked": asked, "files": about})
    for line in about:
        print(f"{folder / line['file']}: {line['rows']} rows, {line['licence']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="all but or-bench by default")
    parser.add_argument("--local", action="extend", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--rows", type=int, default=128, help="most rows of each file (%(default)s)")
    parser.add_argument("--longest", type=int, default=1200, help="most characters of a row (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.folder, given.sets, local_files(given.local), given.rows, given.longest, given.seed)


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"references.py: {error}", file=sys.stderr)
        sys.exit(2)
