"""Rankings of natural answers that people have labelled: are bad rows ranked down, are reasons and p(safe) right?

    python benchmarks/natural.py --pool POOL --labels LABELS.json --safe S --harmful H --utility U --model MODEL \
        --output-dir DIR [--selectors NAME[:OPTION=VALUE...] ...] [--sample PROMPTS] [--labels-used N ...]

LABELS.json lists, in the order of the pool's rows, a label or an object with the key `label`: safe (a risky prompt and
an answer that does no harm), harmful (a risky prompt, a harmful answer), complies (an unsafe prompt, full compliance),
overrefusal (a harmless prompt that looks unsafe, refused), benign (the same, answered). Without --selectors every
selector runs, and the default one with each of its cheaper readers; --sample takes all rows of so many prompts, for
costly ones. --labels-used lets the person who labelled the pool answer what the selector asks (`to_label.jsonl`), so
many rows in all; rows of a prompt that was asked about are then left out of every figure.

Every ranking is an ordinary folder of `curate`, so the benchmark resumes. Writes natural.md and natural.parquet. AUC
is of safe rows against those of each label; its intervals resample prompts, since answers to one prompt are alike.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from hard_pools import calibration_error
from sklearn.metrics import brier_score_loss

from pharmacist import CurateOptions, curate
from pharmacist.core.errors import ConfigError, DataError, PharmacistError, one_line
from pharmacist.core.files import atomic_path, read_json, write_json, write_text
from pharmacist.core.manifest import read_manifest
from pharmacist.core.progress import silenced
from pharmacist.core.seeding import derive
from pharmacist.data.formats import open_source, write_rows
from pharmacist.data.records import read_records
from pharmacist.evaluation.statistics import Estimate
from pharmacist.selectors import SELECTORS


BAD = ("harmful", "complies", "overrefusal")
LABELS = ("safe", *BAD, "benign")
REASONS = {
    "safe": {"critical", "duplicate"},
    "harmful": {"teaches_compliance"},
    "complies": {"teaches_compliance"},
    "overrefusal": {"over_refusal"},
    "benign": {"not_safety_critical"},
}
ANSWERS = {
    "safe": "good",
    "harmful": "harmful",
    "complies": "harmful",
    "overrefusal": "over_refusal",
    "benign": "not_safety_critical",
}
"""What a person says of a row with such a label, in the words of curate's labels."""
TOP = 0.3
SHARES = (TOP, 0.4)
READERS = ("lexical", "probe", "lexical,probe")
NOT_THE_SELECTOR = ("read", "find duplicates")
"""Phases of curate that cost the same whatever the selector."""


# --- figures --------------------------------------------------------------------------------------------------------


def auc(score, good, bad, prompts, *, resamples=2000, seed=0):
    """Area under the ROC curve of good against bad rows, with a 95 % percentile interval over resampled prompts.

    Args:
        score: Higher = better, shape [rows].
        good: Boolean mask, shape [rows].
        bad: Boolean mask, shape [rows].
        prompts: A key per row; rows of one prompt are drawn together, shape [rows].
        resamples: Bootstrap samples; those without a good or a bad row count for nothing.
        seed: Of the resampling.

    Returns:
        The estimate, its `n` being the number of bad rows; NaN where there is no pair.
    """
    if not good.any() or not bad.any():
        return Estimate(float("nan"), float("nan"), float("nan"), int(bad.sum()))
    _, prompt = np.unique(prompts, return_inverse=True)
    n = prompt.max() + 1
    # Pairs won by prompt of the good and of the bad row: a resample weighs them by how often both were drawn.
    won = np.zeros((n, n))
    up, down = score[good][:, None], score[bad][None]
    np.add.at(won, (prompt[good][:, None], prompt[bad][None]), (up > down) + 0.5 * (up == down))
    of_good, of_bad = (np.bincount(prompt[rows], minlength=n) for rows in (good, bad))
    drawn = np.random.default_rng(derive(seed, "prompts")).multinomial(n, np.full(n, 1 / n), resamples)
    pairs = (drawn @ of_good) * (drawn @ of_bad)
    values = ((drawn @ won) * drawn).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (np.nan, np.nan)
    return Estimate(float(won.sum() / (good.sum() * bad.sum())), float(low), float(high), int(bad.sum()))


def make_up(labels):
    """Share of each label among some rows."""
    return {label: float((labels == label).mean()) if len(labels) else float("nan") for label in LABELS}


def right_reasons(reasons, labels):
    """Share of the rows of each label, and of all rows, whose reason is the right one."""
    right = np.array([reason in REASONS[label] for reason, label in zip(reasons, labels, strict=True)])
    found = {label: float(right[labels == label].mean()) for label in LABELS if (labels == label).any()}
    return found | {"all": float(right.mean())}


def reliability(p, truth, bins=10):
    """Per bin of a probability with any rows: its lower end, mean probability, frequency of the truth, rows."""
    place = np.minimum((p * bins).astype(int), bins - 1)
    return [
        (b / bins, float(p[place == b].mean()), float(truth[place == b].mean()), int((place == b).sum()))
        for b in range(bins)
        if (place == b).any()
    ]


def figures(table, labels, prompts):
    """All figures of one ranking but its cost.

    Args:
        table: Of `curate`, with the pool's row numbers in `row`; rows that do not count are left out of it.
        labels: Label per row of the pool, shape [rows of the pool].
        prompts: Key of its prompt, likewise.

    Returns:
        Mappings of ``measure``, ``label``, ``value``, ``low``, ``high`` and ``n``.
    """
    row, score = table["row"].to_numpy(), table["score"].to_numpy()
    labels, prompts = labels[row], prompts[row]
    found = []

    def note(measure, label, value, n, low=None, high=None):
        found.append({"measure": measure, "label": label, "value": value, "low": low, "high": high, "n": int(n)})

    against = {label: labels == label for label in (*BAD, "benign")} | {"all bad": np.isin(labels, BAD)}
    for label, bad in against.items():
        estimate = auc(score, labels == "safe", bad, prompts)
        note("AUC", label, estimate.value, estimate.n, estimate.low, estimate.high)
    order = np.lexsort((row, -score))
    subsets = {f"top {100 * share:.0f} %": order[: round(share * len(row))] for share in SHARES}
    for name, rows in (subsets | {"selected": np.flatnonzero(table["selected"])}).items():
        for label, share in make_up(labels[rows]).items():
            note(name, label, share, len(rows))
    if len(set(table["reason"]) - {"duplicate"}) > 1:  # a selector that judges
        for label, share in right_reasons(table["reason"], labels).items():
            note("right reason", label, share, len(row) if label == "all" else (labels == label).sum())
    if "p_safe" in table:
        p, safe = table["p_safe"].to_numpy(), labels == "safe"
        note("mean p(safe)", "safe", float(p.mean()), len(p))
        note("safe rows", "safe", float(safe.mean()), len(p))
        note("Brier", "safe", float(brier_score_loss(safe, p)), len(p))
        note("calibration error", "safe", calibration_error(p, safe), len(p))
        for low, mean, share, n in reliability(p, safe):
            note("reliability", f"{low:.1f}", share, n)
            note("reliability, mean p(safe)", f"{low:.1f}", mean, n)
    return found


# --- a person who labels --------------------------------------------------------------------------------------------


def answer(asked, labels):
    """What the person who labelled the pool says of the rows that are asked for."""
    return [{"row": int(row), "label": ANSWERS[labels[row]]} for row in asked]


def of_other_prompts(prompts, labelled):
    """Which rows share no prompt with a labelled one, shape [rows of the pool]."""
    return ~np.isin(prompts, prompts[list(labelled)])


def still_asked(folder, known):
    """Rows that a ranking wants labels for and has none yet, in its own order."""
    path = folder / "to_label.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: this selector asks for no labels (no to_label.jsonl); leave --labels-used away")
    asked = (row["row"] for _, row in open_source(str(path), name="rows to label").rows())
    return [row for row in asked if row not in known]


# --- rankings -------------------------------------------------------------------------------------------------------


def parse_selector(text):
    """``name:option=value:option=value`` as curate takes it."""
    name, *options = text.split(":")
    pairs = [option.partition("=") for option in options]
    if not name or any(not key or not equals for key, equals, _ in pairs):
        raise ConfigError(f"--selectors {text}: write it as NAME:OPTION=VALUE:OPTION=VALUE")
    try:
        return {"name": name} | {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise ConfigError(f"--selectors {text}: a value is no YAML ({one_line(error)})") from error


def slug(text):
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def every_selector():
    readers = (f"pharmacist:form=evidence:readers={reader}" for reader in READERS)
    return [*SELECTORS.names(), *readers]


def read_pool(pool, labels_file, sample, seed, root):
    """File, labels and prompt keys of the pool, or of a sample of its prompts."""
    source = open_source(pool, name="--pool")
    try:
        given = read_json(labels_file)
        labels = np.array([value["label"] if isinstance(value, dict) else value for value in given], dtype=object)
    except (OSError, DataError, KeyError, TypeError) as error:
        reason = repr(error.__cause__ or error)
        raise DataError(f"--labels {labels_file}: is no JSON list of labels ({reason}); check the file") from error
    prompts = np.array(read_records(source, work_dir=root / "rows").dataset["prompt_key"])
    if len(labels) != len(prompts):
        raise DataError(f"--labels {labels_file}: {len(labels)} labels for {len(prompts)} rows; give this pool's own")
    unknown = sorted({str(label) for label in labels} - set(LABELS))
    if unknown:
        raise DataError(f"--labels {labels_file}: unknown label '{unknown[0]}'; known are {', '.join(LABELS)}")
    if sample is None:
        return pool, labels, prompts
    different = np.unique(prompts)
    if not 0 < sample <= len(different):
        raise ConfigError(f"--sample {sample}: the pool has {len(different)} prompts; give 1 to that number")
    chosen = np.random.default_rng(derive(seed, "sample of prompts")).choice(different, sample, replace=False)
    rows = np.flatnonzero(np.isin(prompts, chosen))
    path = root / f"pool-{sample}-prompts.jsonl"
    write_rows(source, rows.tolist(), path, format="jsonl")
    return str(path), labels[rows], prompts[rows]


def ranked(folder, options):
    """Ranks the pool, or finds that it was; its table, and what the selector cost in seconds and tokens."""
    curate(CurateOptions(**options, top=TOP, output_dir=str(folder)))
    phases = [phase for name, phase in read_manifest(folder).phases.items() if name not in NOT_THE_SELECTOR]
    cost = {"seconds": sum(phase.seconds for phase in phases), "tokens": sum(phase.tokens for phase in phases)}
    return pd.read_parquet(folder / "scores.parquet"), cost


def rank_with_labels(name, folder, numbers, options, labels, prompts):
    """Ranks with so many labels, asked for in rounds; each beside the ranking without, on the same rows."""
    known, lines = {}, []
    unlabelled, _ = ranked(folder, options)
    fingerprint, place = open_source(options["pool"]).fingerprint(), folder
    for number in sorted(numbers):
        while len(known) < number:
            asked = still_asked(place, known)[: number - len(known)]
            if not asked:
                raise DataError(f"{place}: asks for no row after {len(known)} labels; give less than {number}")
            known |= {value["row"]: value for value in answer(asked, labels)}
            place = folder.with_name(f"{folder.name}-labels-{len(known)}")
            path = folder.with_name(f"{place.name}.json")
            write_json(path, {"pool": fingerprint, "labels": list(known.values())})
            table, cost = ranked(place, options | {"labels": str(path), "resume_selector": str(folder)})
        counts = of_other_prompts(prompts, known)
        lines.append((f"{name}, without the {number} labels, same rows", only(unlabelled, counts), {}))
        lines.append((f"{name}, {number} labels", only(table, counts), cost))
    return lines


def only(table, counts):
    return table[counts[table["row"].to_numpy()]].reset_index(drop=True)


# --- what is written ------------------------------------------------------------------------------------------------


def number(value, digits=3):
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def markdown(results):
    """Tables of all rankings; `results` are figures with their `ranking`."""
    frame = pd.DataFrame(results)
    names = list(dict.fromkeys(frame["ranking"]))

    def cells(name, measure, labels, show):
        own = frame[(frame["ranking"] == name) & (frame["measure"] == measure)].set_index("label")
        return [show(own.loc[label]) if label in own.index else "" for label in labels] if len(own) else None

    def lines(measure, labels, show, *more):
        for name in names:
            found = cells(name, measure, labels, show)
            if found is not None:
                yield f"| {' | '.join([name, *(own for extra in more for own in extra(name)), *found])} |"

    def section(title, columns, rows):
        rows = list(rows)
        head = [title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        return [*head, *rows, ""] if rows else []

    def value(figure):
        return number(figure["value"])

    def interval(figure):
        return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"

    def rows_of(measure):
        return lambda name: [str(frame[(frame["ranking"] == name) & (frame["measure"] == measure)]["n"].iloc[0])]

    def cost(name):
        own = frame[frame["ranking"] == name].set_index("measure")["value"]
        return [number(own.get(what), digits) for what, digits in (("seconds", 1), ("tokens", 0))]

    against = (*BAD, "benign", "all bad")
    columns = ["ranking", "seconds", "tokens read", *against]
    text = section("AUC of safe rows against those of each label:", columns, lines("AUC", against, interval, cost))
    for name in (*(f"top {100 * share:.0f} %" for share in SHARES), "selected"):
        rows = lines(name, LABELS, value, rows_of(name))
        text += section(f"Make-up, {name}:", ["ranking", "rows", *LABELS], rows)
    rows = lines("right reason", (*LABELS, "all"), value)
    text += section("Share of right reasons:", ["ranking", *LABELS, "all"], rows)
    measures = ("safe rows", "mean p(safe)", "Brier", "calibration error")
    text += section(
        "Calibration of p(safe):",
        ["ranking", *measures],
        (
            f"| {' | '.join([name, *(cells(name, measure, ['safe'], value)[0] for measure in measures)])} |"
            for name in names
            if cells(name, "Brier", ["safe"], value)
        ),
    )
    bins = [f"{b / 10:.1f}" for b in range(10)]
    rows = lines("reliability", bins, lambda figure: f"{number(figure['value'], 2)} ({figure['n']})")
    text += section(
        "Share of safe rows by p(safe), rows in brackets:", ["ranking", *(f"from {low}" for low in bins)], rows
    )
    return "\n".join(text)


def write(root, results):
    with atomic_path(root / "natural.parquet") as path:
        pd.DataFrame(results).to_parquet(path, index=False)
    write_text(root / "natural.md", markdown(results))


@silenced()
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pool", "labels", "model"):
        parser.add_argument(f"--{name}", required=name != "model")
    for name in ("safe", "harmful", "utility"):
        parser.add_argument(f"--{name}", nargs="+", metavar="FILE")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--selectors", nargs="+", metavar="NAME[:OPTION=VALUE...]")
    parser.add_argument("--sample", type=int, metavar="PROMPTS", help="rank the rows of so many prompts")
    parser.add_argument("--labels-used", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--dtype", default="auto", help="of the model, as in curate")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.dtype != "auto" and not given.model:
        raise ConfigError(f"--dtype {given.dtype}: is that of --model; give it too, or leave --dtype away")
    root = given.output_dir
    pool, labels, prompts = read_pool(given.pool, given.labels, given.sample, given.seed, root)
    choices = {text: parse_selector(text) for text in given.selectors or every_selector()}
    for choice in choices.values():
        SELECTORS.build_from(choice)
    if any(n < 1 for n in given.labels_used):
        raise ConfigError(f"--labels-used {min(given.labels_used)}: must be at least 1")
    files = {name: getattr(given, name) for name in ("safe", "harmful", "utility") if getattr(given, name)}
    options = {name: paths[0] if len(paths) == 1 else paths for name, paths in files.items()}
    options |= {"pool": pool, "model": given.model, "seed": given.seed, "dtype": given.dtype}
    results, skipped = [], []
    for name, choice in choices.items():
        folder = root / (slug(name) + (f"-{given.sample}-prompts" if given.sample else ""))
        own = options | {"selector": choice}
        try:
            lines = [(name, *ranked(folder, own))]
        except PharmacistError as error:  # such as references that were not given
            skipped.append(f"{name}: {error}")
            print(f"skipped {skipped[-1]}", flush=True)
            continue
        if given.labels_used:
            lines += rank_with_labels(name, folder, given.labels_used, own, labels, prompts)
        for title, table, cost in lines:
            found = figures(table, labels, prompts)
            found += [{"measure": what, "label": "", "value": spent, "n": len(table)} for what, spent in cost.items()]
            results += [{"ranking": title, **figure} for figure in found]
            print(title, {v["label"]: round(v["value"], 3) for v in found if v["measure"] == "AUC"}, flush=True)
        write(root, results)
    if not results:
        raise ConfigError("no selector could rank the pool")
    print("\n" + (root / "natural.md").read_text(encoding="utf-8"))
    for line in skipped:
        print(f"skipped {line}")


if __name__ == "__main__":
    try:
        main()
    except PharmacistError as error:
        print(f"natural.py: {error}", file=sys.stderr)
        sys.exit(2)
