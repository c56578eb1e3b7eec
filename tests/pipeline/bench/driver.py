"""``python -m tests.pipeline.bench.driver WORDS...``: the command line with fake stages."""

import sys

from pharmacist.cli.main import main
from tests.pipeline.bench.fakes import install


if __name__ == "__main__":
    install()
    sys.exit(main(sys.argv[1:]))
