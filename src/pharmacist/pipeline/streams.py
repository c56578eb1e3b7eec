"""Auxiliary streams of batches for defenses that read more than the rows that are trained on."""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.core.progress import say
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.formats import Source
from pharmacist.data.records import Records, column
from pharmacist.data.streams import PairedRows, SideStream, pair_rows
from pharmacist.data.tokenize import Encoded
from pharmacist.data.where import conditions_of
from pharmacist.nn.models import LoadedModel
from pharmacist.pipeline.rows import name_unused, read, texts, tokenise
from pharmacist.pipeline.stages.align import AlignOptions
from pharmacist.training.options import TrainingStageOptions
from pharmacist.training.strategy import GradientStrategy


def endless_stream(
    name: str, rows: Encoded, loaded: LoadedModel, options: TrainingStageOptions, batch_size: int = 0
) -> SideStream:
    """Endless batches of tokenised rows, shuffled, by default of the training's batch size."""
    return SideStream(
        rows,
        batch_size or int(options.effective_train["per_device_train_batch_size"]),
        seed=derive(options.seed, "stream", name),
        pad_token_id=loaded.tokenizer.pad_token_id,
        device=loaded.device,
    )


def read_harmful_rows(
    sources: Mapping[str, Source], alignment: Records, strategy: GradientStrategy, options: AlignOptions, run: RunDir
) -> Records | None:
    """Reads the harmful rows of `align`; None where the defense needs none.

    Args:
        sources: The opened ``data`` and maybe ``harmful``; without it the rejected answers of a preference file.
        alignment: The rows of ``data``.
        strategy: The defense.
        options: The stage's.
        run: Its folder.

    Raises:
        ConfigError: There are no harmful rows.
        DataError: They are the alignment rows.
    """
    name = options.defense["name"]
    name_unused(options, ["harmful"], strategy.needs, f"defense '{name}'")
    if "harmful" not in strategy.needs:
        return None
    if "harmful" not in sources and alignment.layout != "preference":
        raise ConfigError(
            f"--defense {name} needs harmful rows: give --harmful FILE, or a --data file with prompt, chosen and "
            "rejected"
        )
    source = "harmful" if "harmful" in sources else "data"
    conditions, work = conditions_of(options.where, sources), run.work("data", "harmful")
    harmful = read(sources[source], options, work, harmful=True, usual_names=True, where=conditions[source])
    harmful.announce()
    if texts(harmful) == texts(alignment):
        raise DataError("--data and --harmful hold the same rows; check the two files")
    return harmful


def alignment_streams(
    strategy: GradientStrategy,
    alignment: Records,
    encoded: Encoded,
    harmful: Records | None,
    loaded: LoadedModel,
    options: AlignOptions,
    run: RunDir,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Makes the streams that an alignment-stage defense draws from (`GradientStrategy.streams`).

    Args:
        strategy: The defense.
        alignment: The alignment rows.
        encoded: Those of them that are trained on, tokenised.
        harmful: From `read_harmful_rows`.
        loaded: The model.
        options: The stage's.
        run: Its folder.

    Returns:
        The streams by name, and numbers of rows for the manifest.

    Raises:
        NoMatchError: No alignment row has a harmful partner.
        DataError: Too few harmful rows to hold some out.
    """
    streams: dict[str, Any] = {}
    if "retain" in strategy.streams:
        streams["retain"] = endless_stream("retain", encoded, loaded, options, options.harmful_batch_size)
    if harmful is None:
        return streams, {}
    counts = {"harmful_rows": len(harmful)}
    rows = {"harmful": harmful.dataset, "paired": harmful.dataset}
    if "held_out" in strategy.streams:
        rows |= _hold_out(harmful, strategy.held_out, options.seed)
    for name in sorted(rows.keys() & {*strategy.streams}):
        tokens = tokenise(rows[name], f"tokens-{name}", loaded, options, run, where=harmful.source.where)
        if name == "paired":
            streams[name] = _pair(tokens, alignment, encoded, harmful, loaded, options)
            counts["pairs"] = len(streams[name])
        else:
            streams[name] = endless_stream(name, tokens, loaded, options, options.harmful_batch_size)
            counts[f"{name}_rows"] = len(rows[name])
    return streams, counts


def _pair(
    tokens: Encoded, alignment: Records, encoded: Encoded, harmful: Records, loaded: LoadedModel, options: AlignOptions
) -> PairedRows:
    """Batches of the harmful partners of alignment rows, out of the tokenised harmful rows."""
    by, position = options.pair_by, {row: number for number, row in enumerate(tokens.dataset["row"][:])}
    trained = set(encoded.dataset["row"][:])
    found = pair_rows(alignment.dataset, harmful.dataset, by)
    pairs = {row: position[partner] for row, partner in found.items() if row in trained and partner in position}
    if not pairs:
        raise NoMatchError(
            f"none of {len(encoded)} alignment rows has a harmful row with the same {by}; give harmful "
            "answers to the same prompts, or --pair-by turn"
        )
    how = "in turn" if by == "turn" else f"same {by}"
    say(f"{len(pairs)} of {len(encoded)} alignment rows have a harmful partner ({how})")
    return PairedRows(tokens, pairs, pad_token_id=loaded.tokenizer.pad_token_id, device=loaded.device)


def _hold_out(harmful: Records, share: float, seed: int) -> dict[str, datasets.Dataset]:
    """Splits harmful rows into those to attack with and those of a share of the prompts, held out."""
    rows, keys = harmful.dataset, column(harmful.dataset, "prompt_key")
    prompts = np.random.default_rng(derive(seed, "held out")).permutation(np.unique(keys))
    number = max(1, round(share * len(prompts)))
    if len(prompts) <= number:
        raise DataError(f"{harmful.source.where}: {len(prompts)} prompts are too few to hold out a share {share}")
    held_out = np.isin(keys, prompts[:number])
    return {"harmful": rows.select(np.flatnonzero(~held_out)), "held_out": rows.select(np.flatnonzero(held_out))}
