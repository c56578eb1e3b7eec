"""Writes all files that smollm2.yaml reads, from public data sets, among them natural answers that people labelled.

    python recipes/natural.py FOLDER [--local NAME=FILE ...] [--rows 320] [--longest 800] [--seed 0]

| set | gives | from |
|---|---|---|
| do-not-answer | risky questions, answers of six assistants, labels of people | LibrAI/do-not-answer, Apache-2.0 |
| xstest | unsafe prompts and safe ones that look so, five assistants, labels | natolambert/xstest-v2-copy |
| clean, safe | the pool without faults; references | safety-tuned of references.py |
| harmful, attack | references; other rows for the attack | beavertails of references.py |
| utility | references | alpaca of references.py |
| judge-safe, judge-harmful, judge-utility | the judge's references: other rows | as safe, harmful, utility |
| sst2, agnews | fine-tuning tasks | stanfordnlp/sst2, fancyzhx/ag_news |

A local copy of do-not-answer or xstest has the columns of the set; all others are rows that `curate` reads. The
judge's references are other rows of the same files; if a local file has none left, give the judge one of its own. A
task is given as sst2=TRAIN, of which some rows become the test, or as sst2=TRAIN and sst2-test=TEST.

--local pool=POOL labels=LABELS takes natural answers that are already labelled instead of the first two sets: a file
of prompts and completions, and a list, in the same order, of objects with label (safe, harmful, complies, overrefusal,
benign), source, action and kind. --local clean=POOL clean-labels=LABELS takes the rows whose label is good.

Labels of natural rows: safe, a risky prompt with a harmless answer; harmful, a risky prompt with a harmful answer;
complies, an unsafe prompt with full compliance; overrefusal, a safe prompt that looks unsafe, fully refused; benign,
such a prompt answered. The pool contains 78 % safe rows, 10 % benign rows and 12 % of the three bad kinds, none longer
than --longest characters. The prompts to evaluate occur neither in the pool nor in the references or the attack.

Writes pool.jsonl, labels.json (as `curate --labels` reads it), rows.json (labels as people gave them), clean.jsonl,
safe.jsonl, harmful.jsonl, utility.jsonl, attack.jsonl, judge-safe.jsonl, judge-harmful.jsonl, judge-utility.jsonl,
prompts.jsonl (risky), benign-prompts.jsonl (look unsafe), margin.jsonl (prompt, chosen refusal, rejected harmful
answer), sst2.jsonl, sst2-test.jsonl, agnews.jsonl, agnews-test.jsonl and sources.json. Some of these rows are harmful:
research material, not advice.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from references import SETS, contents, draw, local_files, pairs_of, read, true

from pharmacist.core.errors import ConfigError, DataError, PharmacistError
from pharmacist.core.files import atomic_folder, read_json, write_json, write_text
from pharmacist.core.registry import closest
from pharmacist.core.seeding import derive
from pharmacist.data.formats import open_source
from pharmacist.data.normalise import prompt_key
from pharmacist.data.records import read_records
from pharmacist.data.tasks import open_task
from pharmacist.selectors.labels import write_labels


DO_NOT_ANSWER = "LibrAI/do-not-answer:train"
MAKE_UP = {"harmful": 0.044, "complies": 0.035, "overrefusal": 0.044, "benign": 0.1}
"""Share of each label in the pool, scarce ones first; the rest is safe."""
ANSWERS = {
    "safe": "good",
    "harmful": "harmful",
    "complies": "harmful",
    "overrefusal": "over_refusal",
    "benign": "not_safety_critical",
}
"""Label of a row -> what a person says of it, in the words of curate's labels."""
DEFAULTS = {
    "safe": ("safety-tuned", "safe"),
    "harmful": ("beavertails", "harmful"),
    "utility": ("alpaca", "utility"),
    "attack": ("beavertails", "harmful"),
    "clean": ("safety-tuned", "safe"),
}
"""Name -> set of references.py, and what of it."""
SIZES = {"safe": 128, "harmful": 60, "utility": 100, "attack": 40, "clean": 0}
JUDGE = "judge-"
# Drawn last, so that all others are the same as without them.
SIZES |= {f"{JUDGE}{name}": SIZES[name] for name in ("safe", "harmful", "utility")}
PROMPTS, BENIGN, PAIRS, TRAIN, TEST, LONGEST = 60, 40, 36, 400, 80, 1200
TASK_LONGEST = 600
"""Most characters of a task's prompt: a longer one can fill all 200 tokens of a row in the grid, which is refused."""
ABOUT = ("label", "source", "action", "kind")
TASKS = ("sst2", "agnews")
NAMES = (
    *("do-not-answer", "xstest", "pool", "labels", "clean-labels", *SIZES, *TASKS),
    *(f"{name}-test" for name in TASKS),
)


# --- natural answers ------------------------------------------------------------------------------------------------


def do_not_answer(rows):
    """Six rows of each question; `action` says what the assistant did, 0 being that it cannot assist."""
    for row in rows:
        for name in (column.removesuffix("_response") for column in row if column.endswith("_response")):
            yield {
                "prompt": row["question"],
                "completion": row[f"{name}_response"],
                "label": "harmful" if true(row[f"{name}_harmful"]) else "safe",
                "source": f"dna/{name}",
                "action": int(row[f"{name}_action"]),
                "kind": row["types_of_harm"],
            }


def xstest(rows, source):
    """Rows that people call full compliance or full refusal."""
    labels = {
        (False, "1_full_compliance"): "benign",
        (False, "2_full_refusal"): "overrefusal",
        (True, "1_full_compliance"): "complies",
        (True, "2_full_refusal"): "safe",
    }
    for row in rows:
        if label := labels.get((row["type"].startswith("contrast_"), row["final_label"])):
            own = {"prompt": row["prompt"], "completion": row["completion"], "label": label}
            yield own | {"source": f"xstest/{source}", "action": -1, "kind": row["type"]}


def natural(local):
    """All labelled rows, and where they come from."""
    if "pool" in local or "labels" in local:
        pool, labels = (one(local, name) for name in ("pool", "labels"))
        rows = texts(pool, "pool")
        for number, label in enumerate(said := labels_of(local, "labels", rows, pool)):
            where = f"--local labels={labels}: row {number}"
            if not isinstance(label, dict):
                raise DataError(f"{where}: {label!r} is no object with {', '.join(ABOUT)}")
            if label.get("label") not in tuple(ANSWERS):
                raise DataError(f"{where}: label {label.get('label')!r} is none of {', '.join(ANSWERS)}")
            if label["label"] == "safe" and "action" not in label:
                raise DataError(f"{where}: has no action; give -1 where it is not known")
        return [row | label for row, label in zip(rows, said, strict=True)], [pool, labels]
    places = local.get("do-not-answer", [DO_NOT_ANSWER]), local.get("xstest", SETS["xstest"].places)
    found = []
    for name, own in zip(("do-not-answer", "xstest"), places, strict=True):
        for place in own:
            source = place.rpartition(":")[2] if place in SETS["xstest"].places else Path(place).name.split(".")[0]
            rows = read(name, place)
            try:
                found += do_not_answer(rows) if name == "do-not-answer" else xstest(rows, source)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"--local {name}={place}: a row lacks or garbles a column ({error})") from error
    return found, [*places[0], *places[1]]


# --- the rest -------------------------------------------------------------------------------------------------------


def one(local, name):
    """The one file of a name."""
    if len(files := local.get(name, [])) != 1:
        raise ConfigError(f"--local {name}: give one file")
    return files[0]


def labels_of(local, name, rows, of):
    """One label for each of the rows of a file, out of the one JSON list of a name."""
    path = one(local, name)
    try:
        said = read_json(path)
    except OSError as error:
        raise DataError(f"--local {name}={path}: cannot be read ({error.strerror}); check the path") from error
    if not isinstance(said, list) or len(said) != len(rows):
        raise DataError(f"--local {name}={path}: must list one label for each of the {len(rows)} rows of {of}")
    return said


def texts(source, name):
    """Prompts and completions of rows in any format."""
    side = "rejected" if name in ("harmful", "attack", "judge-harmful") else "chosen"
    with tempfile.TemporaryDirectory(prefix="natural-") as folder:
        found = read_records(open_source(source, name=f"--local {name}"), work_dir=folder, side=side).dataset
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in found]


def others(local, name):
    """Pairs of the clean pool, the references or the attack, and where they come from."""
    if name not in local:
        name = name.removeprefix(JUDGE)
    default, role = DEFAULTS[name.removeprefix(JUDGE)]
    if name not in local:
        places = list(SETS[default].places)
        return pairs_of(default, role, [row for place in places for row in read(name, place)], places), places
    rows, places = [row for file in local[name] for row in texts(file, name)], local[name]
    if name == "clean" and "clean-labels" in local:
        said = labels_of(local, "clean-labels", rows, ", ".join(local[name]))
        rows = [row for row, label in zip(rows, said, strict=True) if label == "good"]
        places = [*places, *local["clean-labels"]]
    return [(row["prompt"], row["completion"]) for row in rows], places


def task(local, name, rng):
    """Rows to train on, rows to test on, and where they come from."""
    places = local.get(name, [name])
    train = [row for place in places for row in rows_of(place, name)]
    if name not in local or f"{name}-test" in local:
        tests = local.get(f"{name}-test", [name])
        test = [row for place in tests for row in rows_of(place, name, test=True)]
        places = [*places, *tests]
    else:  # one file gives both
        train = [train[i] for i in rng.permutation(len(train))]
        test, train = train[:TEST], train[TEST:]
    if len(train) < TRAIN / 2 or len(test) < TEST / 2:
        raise DataError(f"--local {name}: {len(train)} rows to train on and {len(test)} to test on are too few")
    return sample(train, TRAIN, rng), sample(test, TEST, rng), places


def rows_of(place, name, test=False):
    rows = (row for _, row in open_task(place, name=f"--local {name}", test=test).rows())
    return [row for row in rows if len(row["prompt"]) <= TASK_LONGEST]


def sample(rows, n, rng):
    """At most so many, in random order."""
    return [rows[i] for i in rng.permutation(len(rows))[:n]]


# --- who goes where -------------------------------------------------------------------------------------------------


def split(rows, n, longest, seen, seed):
    """The pool, risky prompts, safe prompts that look unsafe, and pairs of a harmful answer and a refusal.

    Scarce bad rows go to the pool first; then prompts are held out, with all their rows; the rest of the pool is drawn
    from the other prompts.
    """

    def stream(name):
        return np.random.default_rng(derive(seed, "natural", name))

    keyed = [(prompt_key(row["prompt"]), row) for row in rows]
    keyed = [(key, row) for key, row in keyed if key not in seen and row["completion"] and row["completion"].strip()]
    by_prompt = defaultdict(list)
    for key, row in keyed:
        by_prompt[key].append(row)
    safe_looking = {key for key, own in by_prompt.items() if own[0]["label"] in ("benign", "overrefusal")}
    pool, held = [], set()

    def take(label):
        wanted = n - len(pool) if label == "safe" else round(n * MAKE_UP[label])
        offered = [
            pair for pair in keyed if pair[1]["label"] == label and pair[0] not in held and fits(pair[1], longest)
        ]
        if len(offered) < wanted:
            raise DataError(f"{len(offered)} {label} rows fit, not {wanted}; lower --rows or raise --longest")
        pool.extend(sample(offered, wanted, stream(label)))

    for label in ("harmful", "complies", "overrefusal"):
        take(label)
    used = {key for key, _ in pool}
    pairs = []
    for key in by_prompt:
        bad, good = (
            [row for row in by_prompt[key] if fits(row, 2 * longest) and test(row)] for test in (harms, refuses)
        )
        if bad and good and key not in used:
            pairs.append((key, *(sample(own, 1, stream(f"pair {key}"))[0] for own in (bad, good))))
    pairs = sample(pairs, PAIRS, stream("pairs"))
    held |= {key for key, *_ in pairs}
    free = [key for key in by_prompt if key not in used | held]
    risky = sample([key for key in free if key not in safe_looking], PROMPTS - len(pairs), stream("prompts"))
    benign = sample([key for key in free if key in safe_looking], BENIGN, stream("benign prompts"))
    risky = [key for key, *_ in pairs] + risky
    held |= {*risky, *benign}
    for label in ("benign", "safe"):
        take(label)
    pool = sample([row for _, row in pool], len(pool), stream("order"))
    prompts, benign_prompts = ([{"prompt": by_prompt[key][0]["prompt"]} for key in keys] for keys in (risky, benign))
    margin = [
        {"prompt": bad["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
        for _, bad, good in pairs
    ]
    return pool, prompts, benign_prompts, margin


def fits(row, longest):
    return len(row["prompt"]) + len(row["completion"]) <= longest


def harms(row):
    return row["label"] in ("harmful", "complies")


def refuses(row):
    return row["label"] == "safe" and row["action"] in (-1, 0)


def make(folder, local=None, rows=320, longest=800, seed=0):
    """Writes all files; a folder that holds them already stays as it is.

    Args:
        folder: Where; it must be empty, or hold these very files.
        local: Files to read a set from, by its name.
        rows: Rows of each pool.
        longest: Most characters of prompt and completion of a row of a pool.
        seed: Of the drawing.

    Raises:
        PharmacistError: A set cannot be had, or gives too few rows; nothing is written then.
    """
    local = local or {}
    for name in local:
        if name not in NAMES:
            raise ConfigError(f"--local: unknown set '{name}'{closest(name, NAMES)}")
    if "clean-labels" in local and "clean" not in local:
        raise ConfigError("--local clean-labels: give the rows too that they are of, --local clean=FILE")
    if ("pool" in local or "labels" in local) and (unused := local.keys() & {"do-not-answer", "xstest"}):
        raise ConfigError(f"--local {min(unused)}: pool and labels take its place; give the one or the others")
    if rows < 60 or longest < 1:
        raise ConfigError(f"--rows {rows} --longest {longest}: must be at least 60 and 1")
    asked = {"rows": rows, "longest": longest, "seed": seed, "local": local, "contents": contents(local)}
    if (folder / "sources.json").is_file() and read_json(folder / "sources.json")["asked"] == asked:
        print(f"{folder}: already complete")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: holds something else; choose an empty folder")
    seen, files, places = set(), {}, {}
    for name, wanted in SIZES.items():
        pairs, places[name] = others(local, name)
        cut = (rows, longest) if name == "clean" else (wanted, sys.maxsize if name in local else LONGEST)
        files[name] = draw(pairs, *cut, seen, np.random.default_rng(derive(seed, name)))
        if not files[name]:
            other = "give it a file of its own" if name.startswith(JUDGE) else "check the file"
            raise DataError(f"--local {name}: none of {len(pairs)} rows can be used; {other}")
    labelled, places["pool"] = natural(local)
    pool, *held = split(labelled, rows, longest, {prompt_key(row["prompt"]) for n in SIZES for row in files[n]}, seed)
    files["pool"] = [{name: row[name] for name in ("prompt", "completion")} for row in pool]
    files |= dict(zip(("prompts", "benign-prompts", "margin"), held, strict=True))
    for name in TASKS:
        files[name], files[f"{name}-test"], places[name] = task(local, name, np.random.default_rng(derive(seed, name)))
    with atomic_folder(folder) as making:
        for name, own in files.items():
            write_text(making / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in own))
        fingerprint = open_source(making / "pool.jsonl").fingerprint()
        write_labels(making / "labels.json", fingerprint, {i: ANSWERS[row["label"]] for i, row in enumerate(pool)})
        write_json(making / "rows.json", [{name: row.get(name) for name in ABOUT} for row in pool])
        write_json(
            making / "sources.json",
            {"asked": asked, "from": {name: list(map(str, own)) for name, own in places.items()}},
        )
    for name, own in files.items():
        print(f"{folder / name}.jsonl: {len(own)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--local", action="extend", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--rows", type=int, default=320, help="rows of each pool (%(default)s)")
    parser.add_argument("--longest", type=int, default=800, help="most characters of a row of them (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.folder, local_files(given.local), given.rows, given.longest, given.seed)


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"natural.py: {error}", file=sys.stderr)
        sys.exit(2)
