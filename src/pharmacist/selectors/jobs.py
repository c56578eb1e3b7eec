"""Adapter trainings as independent jobs: shared out among processes, each done once, found again after a kill."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pharmacist.core.progress import Bar, bar
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.distributed import barrier, my_share


@dataclass(frozen=True)
class Job:
    """Training of adapters that belong together.

    Attributes:
        adapters: Their names in the bank.
        folder: Each is saved in ``folder/name``.
        steps: Updates, for the progress bar.
        run: (checkpoint file, advance) -> None; trains the adapters in the bank.
    """

    adapters: tuple[str, ...]
    folder: Path
    steps: int
    run: Callable[[Path, Callable[[], object]], None]

    @property
    def done(self) -> bool:
        """Whether all its adapters are saved; the JSON file is written last."""
        return all((self.folder / name / "adapter_config.json").is_file() for name in self.adapters)


def run_jobs(bank: AdapterBank, jobs: Sequence[Job], description: str) -> None:
    """Runs the jobs that are not done yet. Afterwards every process can load every adapter from its folder."""
    mine = my_share(jobs)
    with bar(description, sum(job.steps for job in mine)) as progress:
        for job in mine:
            if job.done:
                progress.advance(job.steps)
            else:
                _run(bank, job, progress)
    barrier()


def _run(bank: AdapterBank, job: Job, progress: Bar) -> None:
    checkpoint = job.folder / f"{'+'.join(job.adapters)}.partial.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    job.run(checkpoint, progress.advance)
    for name in job.adapters:
        bank.save(name, job.folder / name)
    checkpoint.unlink(missing_ok=True)
