"""How quickly the page of a long ranking opens and answers, in a headless Chromium.

    python benchmarks/page.py [--rows 100000]

Needs Playwright and an installed Chromium. Times are milliseconds until the next frame is painted; a search counts
from the key press and holds the 20 ms that the page waits for further ones.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from pharmacist.report.html import render_ranking
from pharmacist.worlds import World
from tests.support.browser import measure, running
from tests.support.pages import REASON_OF, manifest, report, scores, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    n = parser.parse_args().rows
    # Words of the synthetic world at random: longer and less alike than its own rows are.
    vocabulary = sorted({word for row in World(0).pool(1000)[0] for word in " ".join(row.values()).split()})
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(vocabulary, k=words))

    rows = [{"prompt": f"{i} {text(20)}", "completion": text(60)} for i in range(n)]
    reasons = [list(REASON_OF.values())[i % len(REASON_OF)] for i in range(n)]
    table, given = scores(reasons, 3 * n // 10), texts(rows)
    with tempfile.TemporaryDirectory() as folder, running() as browser:
        path = Path(folder) / "report.html"
        start = time.perf_counter()
        render_ranking(path, scores=table, texts=given, manifest=manifest(n, report()))
        print(f"{n} rows: written in {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
        for name, times in measure(browser, path).items():
            times = times if isinstance(times, list) else [times]
            print(f"{name:<16}median {sorted(times)[len(times) // 2]:5.0f} ms   slowest {max(times):5.0f} ms")


if __name__ == "__main__":
    main()
