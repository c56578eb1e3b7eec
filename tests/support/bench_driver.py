"""``python -m tests.support.bench_driver WORDS...``: the command line with fake stages."""

import os
import sys
from collections.abc import Mapping

from pharmacist.cli.main import main
from tests.support.bench_fakes import install


def run_with_fakes(words: list[str], environment: Mapping[str, str]) -> None:
    """In a process of its own: one command with fake stages."""
    os.environ.update(environment)
    install()
    sys.exit(main(words))


if __name__ == "__main__":
    run_with_fakes(sys.argv[1:], {})
