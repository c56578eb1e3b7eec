import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest

from pharmacist.cli.main import main


PRELOADED = (
    "pipeline.curate",
    "pipeline.align",
    "pipeline.attack",
    "selectors.pharmacist",
    "report.html",
    "data.tokenize",
    "training.loop",
    "training.saving",
    "defenses.alignment.sft",
    "pipeline.evaluate",
    "evaluation.evaluator",
    "evaluation.judges.keyword",
    "pipeline.bench.grid",
)


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Makes processes that have all imports behind them, so that a kill falls into the work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"pharmacist.{name}" for name in PRELOADED])
    first = context.Process(target=main, args=(["--version"],))
    first.start()  # waits for the imports
    first.join()
    return context
