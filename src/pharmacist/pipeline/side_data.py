"""The harmful rows of `align`, and the streams that its defenses draw from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from pharmacist.core.errors import ConfigError, DataError, NoMatchError
from pharmacist.core.progress import console
from pharmacist.core.rundir import RunDir
from pharmacist.core.seeding import derive
from pharmacist.data.formats import Source
from pharmacist.data.records import Records, column
from pharmacist.data.streams import PairedRows, SideStream, pair_rows
from pharmacist.data.tokenize import Encoded
from pharmacist.data.where import conditions_of
from pharmacist.nn.models import LoadedModel
from pharmacist.pipeline.rows import read, texts, tokenise
from pharmacist.pipeline.stages.align import AlignOptions
from pharmacist.training.strategy import GradientStrategy


@dataclass
class SideData:
    """What a defense reads besides the alignment set."""

    options: AlignOptions
    wanted: frozenset[str]  # names of streams
    alignment: Records
    harmful: Records | None  # where a stream needs them
    held_out_share: float  # of the harmful rows' prompts, which goes to ``held_out`` and not to ``harmful``
    counts: dict[str, int] = field(default_factory=dict)  # filled as streams are made, for the manifest

    @classmethod
    def read(
        cls,
        sources: Mapping[str, Source],
        alignment: Records,
        strategy: GradientStrategy,
        options: AlignOptions,
        run: RunDir,
    ) -> "SideData":
        """Reads the harmful rows if the defense needs any.

        Raises:
            ConfigError: There are none.
            DataError: They are the alignment rows.
        """
        wanted, name, share = frozenset(strategy.streams), options.defense["name"], strategy.held_out
        if "harmful" not in strategy.needs:
            if "harmful" in sources:
                console().print(f"--harmful: the defense '{name}' does not use it", soft_wrap=True)
            return cls(options, wanted, alignment, None, share)
        if "harmful" not in sources and alignment.layout != "preference":
            raise ConfigError(
                f"--defense {name} needs harmful rows: give --harmful FILE, or a --data file with prompt, chosen and "
                "rejected"
            )
        of = "harmful" if "harmful" in sources else "data"
        where, work = conditions_of(options.where, sources)[of], run.work("data", "harmful")
        harmful = read(sources[of], options, work, harmful=True, usual_names=True, where=where)
        harmful.announce()
        if texts(harmful) == texts(alignment):
            raise DataError("--data and --harmful hold the same rows; check the two files")
        return cls(options, wanted, alignment, harmful, share)

    def streams(self, encoded: Encoded, loaded: LoadedModel, run: RunDir) -> dict[str, Any]:
        """The streams by name; `encoded` are the alignment rows.

        Raises:
            NoMatchError: No alignment row has a harmful partner.
            DataError: Too few harmful rows to hold some out.
        """
        place: dict[str, Any] = {"pad_token_id": loaded.tokenizer.pad_token_id, "device": loaded.device}
        size = self.options.harmful_batch_size or int(self.options.effective_train["per_device_train_batch_size"])

        def endless(name: str, rows: Encoded) -> SideStream:
            return SideStream(rows, size, seed=derive(self.options.seed, "stream", name), **place)

        def tokens(name: str, rows: datasets.Dataset) -> Encoded:
            return tokenise(rows, f"tokens-{name}", loaded, self.options, run, where="--harmful")

        found: dict[str, Any] = {}
        if "retain" in self.wanted:
            found["retain"] = endless("retain", encoded)
        if self.harmful is None:
            return found
        self.counts["harmful_rows"] = len(self.harmful)
        parts = self._split(self.harmful.dataset)
        for name in sorted(self.wanted & parts.keys()):
            found[name] = endless(name, tokens(name, parts[name]))
            self.counts[f"{name}_rows"] = len(parts[name])
        if "paired" in self.wanted:
            by = self.options.pair_by
            harmful = tokens("paired", self.harmful.dataset)
            position = {row: number for number, row in enumerate(harmful.dataset["row"])}
            pairs = pair_rows(self.alignment.dataset, self.harmful.dataset, by)
            kept = set(encoded.dataset["row"])
            pairs = {a: position[h] for a, h in pairs.items() if a in kept and h in position}
            self.counts["pairs"] = len(pairs)
            if not pairs:
                raise NoMatchError(
                    f"none of {len(encoded)} alignment rows has a harmful row with the same {by}; give harmful "
                    "answers to the same prompts, or --pair-by turn"
                )
            how = "in turn" if by == "turn" else f"same {by}"
            told = f"{len(pairs)} of {len(encoded)} alignment rows have a harmful partner ({how})"
            console().print(told, soft_wrap=True)
            found["paired"] = PairedRows(harmful, pairs, **place)
        return found

    def _split(self, rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """Harmful rows by stream; where some are held out, no prompt is in both parts."""
        if "held_out" not in self.wanted:
            return {"harmful": rows}
        keys = column(rows, "prompt_key")
        prompts = np.random.default_rng(derive(self.options.seed, "held out")).permutation(np.unique(keys))
        number = max(1, round(self.held_out_share * len(prompts)))
        if len(prompts) <= number:
            raise DataError(f"--harmful: {len(prompts)} prompts are too few to hold out a share {self.held_out_share}")
        held_out = np.isin(keys, prompts[:number])
        return {"harmful": rows.select(np.flatnonzero(~held_out)), "held_out": rows.select(np.flatnonzero(held_out))}
