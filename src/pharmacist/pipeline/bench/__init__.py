"""The command `bench`: a grid of selectors, defenses and attacks as a graph of stages, each of which runs once."""

from pharmacist.pipeline.bench.command import BenchResult, StagesFailed, bench
from pharmacist.pipeline.bench.options import BenchOptions


__all__ = ["BenchOptions", "BenchResult", "StagesFailed", "bench"]
