"""The stage `curate`: `reading` opens and checks the inputs, `command` ranks and writes the results."""

from pharmacist.pipeline.curate.command import curate, rank
from pharmacist.pipeline.ranking import Ranking
from pharmacist.pipeline.stages.curate import CurateOptions


__all__ = ["CurateOptions", "Ranking", "curate", "rank"]
