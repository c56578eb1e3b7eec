"""Executors of a graph of stages: this process, or Ray."""

import logging
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pharmacist.core.env import world_size
from pharmacist.core.errors import CompatibilityError, PharmacistError, one_line
from pharmacist.core.method import Method
from pharmacist.core.progress import silenced
from pharmacist.core.registry import Registry
from pharmacist.core.typed import AtLeast0, Checked, NotNegative
from pharmacist.pipeline.bench.stages import Outcome, StageRun, attempt


class Executor(Method, ABC):
    """Base of executors."""

    @abstractmethod
    def run(self, waiting: Sequence[StageRun], stages: Mapping[str, StageRun]) -> Generator[Outcome, None, None]:
        """Runs the stages of a graph that wait, in an order in which each comes after those that it needs.

        Yields:
            How each of them went; closed early, it stops.
        """


class Local(Executor):
    """Runs one stage after the other, in this process."""

    def run(self, waiting: Sequence[StageRun], stages: Mapping[str, StageRun]) -> Generator[Outcome, None, None]:
        """See `Executor.run`."""
        ran: dict[str, Outcome] = {}
        for stage in waiting:
            parents = [ran[name] for name in stage.parents if name in ran]
            ran[stage.name] = attempt(stage, stages, *parents)
            yield ran[stage.name]


@dataclass
class RayConfig(Checked):
    """Options of ray."""

    address: str | None = None
    """Address of a Ray cluster, such as auto or ray://HOST:PORT; by default a local one is started for this run. All
    machines must see the output folder under the same path."""
    cpus: NotNegative = 1.0
    """CPU cores per stage."""
    gpus: NotNegative = 0.0
    """GPUs per stage that loads a model."""
    max_retries: AtLeast0 = 3
    """Restarts of a stage whose worker was lost; it resumes from its last checkpoint."""


class Ray(Executor):
    """Runs independent stages in parallel, on one machine or on a cluster."""

    Config = RayConfig
    config: RayConfig

    def run(self, waiting: Sequence[StageRun], stages: Mapping[str, StageRun]) -> Generator[Outcome, None, None]:
        """See `Executor.run`."""
        if not waiting:
            return
        ray = self._started()
        try:
            remote = ray.remote(max_retries=self.config.max_retries)(_in_worker)
            futures: dict[str, Any] = {}
            for stage in waiting:
                gpus = self.config.gpus if stage.kind != "select" else 0.0
                parents = [futures[name] for name in stage.parents if name in futures]
                futures[stage.name] = remote.options(num_cpus=self.config.cpus, num_gpus=gpus, name=stage.name).remote(
                    stage, _needed(stage, stages), *parents
                )
            names = {future: name for name, future in futures.items()}
            lost: set[str] = set()
            while names:
                (ready, *_), _ = ray.wait(list(names))
                name = names.pop(ready)
                try:
                    yield ray.get(ready)
                except ray.exceptions.RayError as error:
                    # Where the worker of a stage was lost too often, the stages that need its result are skipped.
                    after = not lost.isdisjoint(stages[name].parents)
                    lost.add(name)
                    yield Outcome(name, error=None if after else error, skipped=after)
        finally:
            ray.shutdown()

    def _started(self) -> Any:
        if world_size() > 1:
            raise CompatibilityError("--executor ray: starts workers of its own; leave the launcher out")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise CompatibilityError("--executor ray needs the package ray: pip install 'pharmacist[ray]'") from error
        local: dict[str, Any] = {} if self.config.address else {"include_dashboard": False}
        try:
            ray.init(address=self.config.address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise CompatibilityError(
                f"--executor.address {self.config.address}: no Ray cluster found ({one_line(error)})"
            ) from error
        there = ray.cluster_resources() if local else {}  # a cluster may still grow
        for name, needed in (("CPU", self.config.cpus), ("GPU", self.config.gpus)):
            if local and needed > there.get(name, 0):
                ray.shutdown()
                raise CompatibilityError(
                    f"--executor.{name.lower()}s {needed:g}: this machine has {there.get(name, 0):g}, so that no "
                    "stage could ever start; ask for fewer"
                )
        return ray


class RemoteError(Exception):
    """A stage failed in a worker; the note holds its traceback."""


def _in_worker(stage: StageRun, stages: Mapping[str, StageRun], *parents: Outcome) -> Outcome:
    with silenced():
        outcome = attempt(stage, stages, *parents)
    if outcome.error is None or isinstance(outcome.error, PharmacistError):
        return outcome
    # Not every exception can be pickled, and no traceback can.
    error = RemoteError(f"{type(outcome.error).__name__}: {outcome.error}")
    error.add_note("".join(traceback.format_exception(outcome.error)))
    return Outcome(stage.name, error=error)


def _needed(stage: StageRun, stages: Mapping[str, StageRun]) -> dict[str, StageRun]:
    """All ancestors of a stage: the base model of an adapter may be the result of an earlier stage than its parent."""
    found: dict[str, StageRun] = {}
    for name in stage.parents:
        found |= _needed(stages[name], stages) | {name: stages[name]}
    return found


EXECUTORS: Registry[Executor] = Registry(
    "executor", {"local": f"{__name__}:Local", "ray": f"{__name__}:Ray"}, group="pharmacist.executors"
)
